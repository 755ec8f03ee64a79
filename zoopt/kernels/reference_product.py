"""theta plus a low-rank product, defined: plain PyTorch, in rows that bound the temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels import philox
from zoopt.kernels.key import NoiseKey
from zoopt.kernels.reference import round_nearest, round_stochastic

#: Elements of theta a chunk of rows.
CHUNK = 1 << 18


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
    """theta (m, n) <- round(decay theta + left right^T + channel_scale gradient + sign_step S)."""
    for rows in row_chunks(theta):
        acc = update(theta, rows, left, right, decay, gradient, channel_scale, sign_of, sign_step)
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


def row_chunks(theta: Tensor) -> list[slice]:
    """Slices of some 2^18 elements of theta (m, n)."""
    m, n = theta.shape
    rows = max(1, CHUNK // max(n, 1))
    return [slice(start, min(start + rows, m)) for start in range(0, m, rows)]


def update(
    theta: Tensor,
    rows: slice,
    left: Tensor | None,
    right: Tensor | None,
    decay: float,
    gradient: Tensor | None,
    channel_scale: Tensor | None,
    sign_of: tuple[Tensor, Tensor] | None,
    sign_step: float,
) -> Tensor:
    """The new theta[rows] before it is rounded, in the accumulator's dtype."""
    wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
    acc = theta[rows].to(wide) * decay
    if left is not None and right is not None:
        acc.addmm_(left[rows], right.t())
    if gradient is not None:
        part = gradient[rows].to(wide)
        if channel_scale is not None:
            by_row = channel_scale.shape[0] > 1
            acc.addcmul_(part, channel_scale[rows] if by_row else channel_scale)
        if sign_of is not None:
            acc.add_(
                torch.addmm(part, sign_of[0][rows], sign_of[1].t(), alpha=-1).sign_(),
                alpha=sign_step,
            )
    return acc
