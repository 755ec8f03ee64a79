"""theta plus a low-rank product on the CPU. BLAS multiplies a chunk of rows, and a kernel adds and
rounds the chunk while it is in the cache. If BLAS itself rounds as required, it does everything."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels.dispatch import native_bfloat16
from zoopt.kernels.journal import pieces
from zoopt.kernels.noise import cpu
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.reference import (
    addend,
    blas_rounds,
    chunk_rows,
    row_chunks,
    scale,
    scaled_factors,
    squares,
)

__all__ = ["add_product", "scale", "squares"]


def add_product(
    theta: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    alpha: float,
    decay: float,
    gradient: Tensor | None,
    channel_scale: Tensor | None,
    sign_of: tuple[Tensor, Tensor] | None,
    sign_step: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.add_product."""
    product_alone = channel_scale is None and sign_of is None
    native = native_bfloat16(theta)
    if product_alone and blas_rounds(theta, rounding_draw):
        if left is not None and right is not None:
            left, right = left.to(theta.dtype), right.to(theta.dtype)
            theta.addmm_(left, right.t(), alpha=alpha, beta=decay)
        elif decay != 1.0:
            theta.mul_(decay)
        return
    # Rounding factors and product to bfloat16 has an error of 2^-7 of the step, not of theta.
    if native and product_alone and left is not None and right is not None:
        assert rounding_draw is not None
        left, right = left.to(theta.dtype), right.to(theta.dtype)
        product = theta.new_empty(chunk_rows(theta), theta.shape[1])
        for rows in pieces(row_chunks(theta)):
            part = theta[rows]
            added = product[: len(part)].addmm_(left[rows], right.t(), beta=0.0, alpha=alpha)
            shifted = key.shifted(rows.start * theta.shape[1])
            cpu.add_stochastic(part, added, decay, shifted, rounding_draw)
        return
    left, right = scaled_factors(left, right, alpha, theta.dtype if native else torch.float32)
    for rows in pieces(row_chunks(theta)):
        part = theta[rows].view(-1)
        terms = addend(
            rows, left, right, gradient, channel_scale, sign_of, sign_step, torch.float32
        )
        cpu.weighted_sum(
            part,
            part,
            None if terms is None else terms.reshape(-1),
            [],
            [],
            decay,
            rounding_draw,
            key.shifted(rows.start * theta.shape[1]),
        )
