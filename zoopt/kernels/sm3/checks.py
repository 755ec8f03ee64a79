"""Checks of the operands of SM3's operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.kernels import dispatch
from zoopt.kernels.operands import (
    check_dense,
    check_like,
    check_read,
    check_tensor,
    check_unshared,
)


def rows_of(gradient: Tensor) -> Tensor:
    """The rows of a gradient that is sparse in them: int64, (k,), in order."""
    rows = gradient.indices()[0].contiguous()
    if rows.numel() and not dispatch.is_fake(rows):
        bounds = torch.stack((rows[0] >= 0, (rows.diff() > 0).all(), rows[-1] < len(gradient)))
        if not bounds.all():
            raise IndexError(
                f"gradient must have distinct rows in order, in [0, {len(gradient)}), "
                f"got rows from {int(rows.min())} to {int(rows.max())}; pass gradient.coalesce()"
            )
    return rows


def check_operands(
    theta: Tensor,
    gradient: Tensor,
    accumulators: Sequence[Tensor],
    buffer: Tensor | None,
    shape: tuple[int, ...],
) -> None:
    """Raise unless the operands of a tensor of this shape (one axis at least) match."""
    check_unshared("theta", theta)
    if gradient.is_sparse:
        check_tensor("gradient's values", gradient._values())
    else:
        check_read("gradient", gradient, theta)
    for axis, vector in enumerate(accumulators):
        check_read(f"accumulators[{axis}]", vector, theta)
        check_unshared(f"accumulators[{axis}]", vector)
    if gradient.shape != theta.shape:
        raise ValueError(
            f"gradient must have theta's shape {tuple(theta.shape)}, got {tuple(gradient.shape)}"
        )
    if gradient.is_sparse and (gradient.sparse_dim() != 1 or not gradient.is_coalesced()):
        raise ValueError(
            f"gradient must be sparse in its first axis only, and coalesced, got sparse_dim "
            f"{gradient.sparse_dim()}, is_coalesced() {gradient.is_coalesced()}; pass "
            f"gradient.to_dense() or gradient.coalesce()"
        )
    wide = accumulator_dtype(theta.dtype)
    if [(tuple(vector.shape), vector.dtype) for vector in accumulators] != [
        ((size,), wide) for size in shape
    ]:
        raise ValueError(
            f"accumulators must be {wide} vectors of {shape} elements, "
            f"got {[(vector.dtype, tuple(vector.shape)) for vector in accumulators]}"
        )
    if buffer is not None:
        check_tensor("buffer", buffer)
        check_like("buffer", buffer, theta, wide)
        check_dense("buffer", buffer)
