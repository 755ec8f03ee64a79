"""Multiplies tensors by numbers that are on the device; on a GPU, a batch in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import once, pieces
from zoopt.kernels.operands import check_read


def scale_(theta: Batch, factors: Tensor, *, impl: str | None = None) -> Batch:
    """theta_i <- factors_i theta_i, rounded to nearest.

    Args:
        theta: a batch.
        factors: (k,), one for each of its tensors, or (1,), one for all, on their device. They are
            used as they are, and not rounded to theta's dtype.
        impl: as for `perturb`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: other factors.
    """
    theta.check()
    check_read("factors", factors, theta.tensors[0])
    if factors.dim() != 1 or len(factors) not in (1, len(theta)):
        raise ValueError(
            f"factors must be one for each of the batch's {len(theta)} tensors, or one for all, "
            f"got shape {tuple(factors.shape)}"
        )
    backend = dispatch.choose(theta.tensors[0], impl, "product")
    with theta.contiguous() as dense:
        if dispatch.takes_batches(backend):
            once(backend.scale, dense, factors.to(torch.float32).contiguous())
            return theta
        every = factors.expand(len(theta)).unbind()
        for own, factor in pieces(zip(dense.tensors, every, strict=True)):
            backend.scale(own.detach(), factor)
    return theta
