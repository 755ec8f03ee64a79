"""SM3 on a matrix, defined: plain PyTorch, in rows that bound the temporaries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.reference import round_nearest, round_stochastic
from zoopt.kernels.product.reference import row_chunks


class Bounds(NamedTuple):
    """The bounds of a gradient (k, n), in the accumulator's dtype.

    Attributes:
        row, column: (k,) and (n,).
        new_row, new_column: where the new ones go, (k,) and (n,), zeros before.
    """

    row: Tensor
    column: Tensor
    new_row: Tensor
    new_column: Tensor


class Numbers(NamedTuple):
    """The numbers of a step, rounded to the accumulator's dtype; see `sm3`."""

    keep: float
    gain: float
    eps: float
    decay: float
    momentum: float
    complement: float
    step_size: float


def sm3(
    theta: Tensor,
    gradient: Tensor,
    rows: Tensor | None,
    bounds: Bounds,
    buffer: Tensor | None,
    numbers: Numbers,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """nu = keep min(row, column) + gain (g g), (k, n), of the gradient's rows; in place

        u = g / (sqrt(nu) + eps), 0 where that divides by 0
        buffer[rows] <- momentum buffer[rows] + complement u,  u = buffer[rows]
        theta[rows]  <- round(decay theta[rows] + step_size u)
        new_row <- max_j nu_ij,  new_column <- max_i nu_ij

    Args:
        theta: (m, n).
        gradient: (k, n), in theta's dtype or the accumulator's.
        rows: int64 (k,), distinct: the gradient's rows. None: all of them, in order.
        bounds, numbers: row, column ... and keep, gain ... of the formulas.
        buffer: (m, n) in the accumulator's dtype, or None.
    """
    row, column, new_row, new_column = bounds
    for part in pieces(row_chunks(gradient)):
        place = part if rows is None else rows[part]
        g = gradient[part].to(row.dtype)
        # abs clears the sign of a NaN, so that its bits are above infinity's.
        nu = (torch.fmin(row[part, None], column) * numbers.keep + g * g * numbers.gain).abs()
        new_row[part] = nu.amax(1)
        torch.maximum(new_column, nu.amax(0), out=new_column)
        # Through float64: torch's float32 roots are not always correctly rounded.
        denominator = nu.double().sqrt().to(nu.dtype) + numbers.eps
        step = torch.where(denominator == 0.0, 0.0, g / denominator)
        if buffer is not None:
            step = kept(torch.add, buffer[place] * numbers.momentum, step * numbers.complement)
            once(buffer.__setitem__, place, step)
        acc = (theta[place].to(step.dtype) * numbers.decay + step * numbers.step_size).view(-1)
        if rounding_draw is None:
            rounded = round_nearest(acc, theta.dtype)
        else:
            bits = _rounding_bits(place, g, key, rounding_draw)
            rounded = round_stochastic(acc, theta.dtype, bits)
        theta[place] = rounded.view(g.shape)


def _rounding_bits(
    place: slice | Tensor, like: Tensor, key: NoiseKey, rounding_draw: int
) -> Tensor:
    """16 random bits for each element of theta[place], of like's shape (k, n): int64 (k n,)."""
    n, first = like.shape[1], key.offset
    if isinstance(place, slice):
        runs = [(first + place.start * n, first + place.stop * n)]
    else:
        runs = [(first + row * n, first + row * n + n) for row in place.tolist()]
    return torch.cat(
        [
            philox.halfwords(
                torch.arange(start, stop, device=like.device),
                seed=key.seed,
                stream=key.stream,
                draw=rounding_draw,
                purpose=philox.PURPOSE_ROUNDING,
            )
            for start, stop in runs
        ]
    )
