"""A basis that moves every step, and Adam's moments in coordinates that move along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoopt.distributed.sharding import Rows
from zoopt.first_order.projected.geometry import Geometry
from zoopt.first_order.projected.subspace import balanced, factors, orthonormal, times
from zoopt.kernels.dispatch import multiplies_into_float32, native_bfloat16

#: A matrix, or e of them where e are treated at once.
Part = Tensor | Sequence[Tensor]


def next_basis(
    parts: Sequence[Part],
    average: Tensor,
    basis: Tensor,
    rho: float,
    geo: Geometry,
    rows: Rows | None = None,
) -> Tensor:
    """One step of power iteration, from the last basis, on

        B = rho up(mhat) + (1 - rho) A:    P+ = orth(B^T (B P)), or orth(B (B^T P)) on the left

    without B itself: up(mhat) is mhat times P's transpose, and P's columns are orthonormal.

    Args:
        parts: matrices (m, n) whose sum is A.
        average: mhat, (channels, r).
        basis: P, (n, r) or (m, r).
        rows: where the parts, and on the right mhat, have some of the rows.

    Of e matrices at once, each part is e of them, and all else has a first axis of e.
    """
    left = geo.side == "left"
    mine = basis if rows is None or not left else rows.mine(basis)
    image = rho * average + (1.0 - rho) * over_rows(parts, mine, rows, transposed=left)
    # A multiple of B P, whose columns are normalised anyway.
    image = balanced(image) if rows is None else balanced(image, rows.greatest_)
    inner = average.mT @ image
    if rows is not None and not left:
        inner = rows.total(inner)
    back = over_rows(parts, image, rows, transposed=not left)
    if rows is not None and left:
        back = rows.gathered(back)
    return orthonormal(rho * (basis @ inner) + (1.0 - rho) * back)


def over_rows(
    parts: Sequence[Part], factor: Tensor, rows: Rows | None, *, transposed: bool
) -> Tensor:
    """A F, or A^T F summed over all rows, where A is the sum of the parts, which, and so F where
    it is transposed, have some of the rows."""
    product = sum_times(parts, factor, transposed=transposed)
    return product if rows is None or not transposed else rows.total(product)


def sum_times(parts: Sequence[Part], factor: Tensor, *, transposed: bool) -> Tensor:
    """A F, or A^T F, where A is the sum of the parts."""
    first, *others = parts
    total = _times(first, factor, transposed)
    for part in others:
        total += _times(part, factor, transposed)
    return total


def _times(part: Part, factor: Tensor, transposed: bool) -> Tensor:
    if isinstance(part, Tensor):
        return times(part, factor, transposed=transposed)
    if multiplies_into_float32(part[0]) or native_bfloat16(part[0]):
        factor, wide = factor.to(part[0].dtype), factor.dtype  # at once, not one by one
    else:
        wide = factor.dtype
    rows = part[0].shape[1 if transposed else 0]
    out = factor.new_empty(len(part), rows, factor.shape[-1], dtype=wide)
    for own, its, product in zip(part, factor, out, strict=True):
        times(own, its, transposed=transposed, out=product)
    return out


def rotated(
    average: Tensor, square: Tensor, change: Tensor, corrections: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Adam's moments in a new basis: with m, v (channels, r) and C = P^T P+ (r, r),

        m <- m C,    vhat <- |(vhat - mhat^2) C^2 + (mhat C)^2|,    squares of elements

    because a mean transforms by C, and variances of uncorrelated coordinates by its squares.

    Args:
        corrections: 1 - b1^t and 1 - b2^t, that make mhat and vhat of m and v.
    """
    first, second = corrections
    moved = average @ change
    variance = square / second - (average / first).square()
    return moved, (variance @ change.square() + (moved / first).square()).abs() * second


def lost_factors(
    projected: Tensor,
    average: Tensor,
    moved: Tensor,
    basis: Tensor,
    following: Tensor,
    beta1: float,
    geo: Geometry,
) -> tuple[Tensor, Tensor]:
    """left (m, 2 r) and right (n, 2 r) with A + left right^T what the step leaves out of A:

        E = A - up+(R) + b1 / (1 - b1) (up(m) - up+(m'))

    Args:
        projected, average, moved: R, m, m': (channels, r).
        basis, following: P and P+, of `up` and `up+`.
    """
    weight = beta1 / (1.0 - beta1)
    now = factors(-(projected + weight * moved), {"basis": following}, geo)
    before = factors(weight * average, {"basis": basis}, geo)
    return torch.cat((now[0], before[0]), -1), torch.cat((now[1], before[1]), -1)
