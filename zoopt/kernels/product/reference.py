"""The definition of theta plus a low-rank product, in plain PyTorch. Chunks of rows bound the
temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.kernels import dispatch
from zoopt.kernels.dispatch import native_bfloat16
from zoopt.kernels.journal import pieces
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.reference import round_nearest, round_stochastic

#: Elements of theta in a chunk of rows.
CHUNK = 1 << 20


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
    """theta (m, n) <- round(decay theta + alpha left right^T + channel_scale gradient
    + sign_step S)."""
    wide = accumulator_dtype(theta.dtype)
    left, right = scaled_factors(left, right, alpha, wide)
    for rows in pieces(row_chunks(theta)):
        acc = theta[rows].to(wide) * decay
        added = addend(rows, left, right, gradient, channel_scale, sign_of, sign_step, wide)
        if added is not None:
            acc = acc + added
        if rounding_draw is None:
            theta[rows] = round_nearest(acc, theta.dtype)
            continue
        first = key.offset + rows.start * theta.shape[1]
        index = torch.arange(first, first + acc.numel(), device=acc.device)
        bits = philox.halfwords(
            index,
            seed=key.seed,
            stream=key.stream,
            draw=rounding_draw,
            purpose=philox.PURPOSE_ROUNDING,
        )
        theta[rows] = round_stochastic(acc.view(-1), theta.dtype, bits).view(acc.shape)


def scaled_factors(
    left: Tensor | None, right: Tensor | None, alpha: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Cast the factors to this dtype, and multiply alpha into one that must be cast anyway."""
    if left is None or right is None:
        return None, None
    if left.dtype == dtype and right.dtype != dtype:
        right, left = _times(right, alpha, dtype), left
    else:
        left, right = _times(left, alpha, dtype), right.to(dtype)
    return left, right


def _times(factor: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    if alpha == 1.0:
        return factor.to(dtype)
    if dtype.itemsize > factor.dtype.itemsize:
        return factor.to(dtype).mul_(alpha)
    # This computes in the factor's dtype, and casts in the same pass.
    product = torch.empty(factor.shape, dtype=dtype, device=factor.device)
    return torch.mul(factor, alpha, out=product)


def blas_rounds(theta: Tensor, rounding_draw: int | None) -> bool:
    """Whether BLAS can add a product to theta as required: sum in float32, and round once, to
    nearest. On a GPU this includes float16."""
    half = dispatch.on_gpu(theta) and theta.dtype == torch.float16
    rounds = rounding_draw is None and (half or native_bfloat16(theta))
    return theta.dtype == torch.float32 or rounds


def chunk_rows(theta: Tensor) -> int:
    """How many rows of theta (m, n) have about 2^20 elements; at most m."""
    m, n = theta.shape
    return min(m, max(1, CHUNK // max(n, 1)))


def row_chunks(theta: Tensor) -> list[slice]:
    """Slices of `chunk_rows` rows that cover theta (m, n)."""
    m, rows = len(theta), max(1, chunk_rows(theta))
    return [slice(start, min(start + rows, m)) for start in range(0, m, rows)]


def addend(
    rows: slice,
    left: Tensor | None,
    right: Tensor | None,
    gradient: Tensor | None,
    channel_scale: Tensor | None,
    sign_of: tuple[Tensor, Tensor] | None,
    sign_step: float,
    wide: torch.dtype,
) -> Tensor | None:
    """The sum of the terms for theta[rows], in the accumulator's dtype; None without terms."""
    total = None
    if left is not None and right is not None:
        total = (left[rows] @ right.t()).to(wide)
    if gradient is None or (channel_scale is None and sign_of is None):
        return total
    part = gradient[rows].to(wide)
    if channel_scale is not None:
        scaled = part * (channel_scale[rows] if channel_scale.shape[0] > 1 else channel_scale)
        total = scaled if total is None else total.add_(scaled)
    if sign_of is not None:
        outside = torch.addmm(part, sign_of[0][rows], sign_of[1].t(), alpha=-1)
        signs = outside.sign_().mul_(sign_step)
        total = signs if total is None else total.add_(signs)
    return total


def squares(gradient: Tensor, axis: int, wide: torch.dtype) -> Tensor:
    """Sum the squares along an axis of (m, n), in this dtype, one chunk of rows at a time."""
    m, n = gradient.shape
    rows = max(1, CHUNK // max(n, 1))
    parts = [
        gradient[start : start + rows].to(wide).square().sum(axis)
        for start in range(0, max(m, 1), rows)
    ]
    return torch.stack(parts).sum(0) if axis == 0 else torch.cat(parts)


def scale(theta: Tensor, factor: Tensor) -> None:
    """theta <- round(factor theta), with a factor ()."""
    theta.mul_(factor)
