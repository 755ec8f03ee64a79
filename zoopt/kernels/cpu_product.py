"""theta plus a low-rank product on the CPU: BLAS adds a chunk's product, and the chunk is rounded
while it is still in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels import cpu
from zoopt.kernels.key import NoiseKey
from zoopt.kernels.reference_product import row_chunks, update


def add_product(
    theta: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    decay: float,
    gradient: Tensor | None,
    channel_scale: Tensor | None,
    sign_of: tuple[Tensor, Tensor] | None,
    sign_step: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference_product.add_product."""
    if theta.dtype == torch.float32:
        if left is not None and right is not None:
            theta.addmm_(left, right.t(), beta=decay)
        elif decay != 1.0:
            theta.mul_(decay)
        decay, left, right = 1.0, None, None
        if gradient is None:
            return
    for rows in row_chunks(theta):
        acc = update(theta, rows, left, right, decay, gradient, channel_scale, sign_of, sign_step)
        part = theta[rows].view(-1)
        if theta.dtype == torch.float32:
            part.copy_(acc.view(-1))
            continue
        cpu.weighted_sum(
            part,
            part,
            [],
            [],
            0.0,
            key.shifted(rows.start * theta.shape[1]),
            rounding_draw,
            acc.view(-1),
        )
