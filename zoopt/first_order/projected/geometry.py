"""Which side of a gradient is projected, and the shapes that follow."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from torch import Tensor

ProjType = Literal["std", "reverse_std", "right", "left", "full"]
Side = Literal["right", "left", "both"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A gradient G (m, n) and the subspaces onto which it is projected.

    Right: R = G Q with Q (n, r). Left: R = G^T P with P (m, r), the transpose of GaLore's P^T G.
    Both: R = P^T G Q. So R is (channels, r), with the rank contiguous for either side, and a
    channel, to which APOLLO and Fira give one scale, is a row of R.
    """

    m: int
    n: int
    rank: int
    side: Side

    @functools.cached_property
    def reduced_shape(self) -> tuple[int, int]:
        """Of R: (channels, r)."""
        return {"right": self.m, "left": self.n, "both": self.rank}[self.side], self.rank

    @functools.cached_property
    def bases(self) -> dict[str, tuple[int, int]]:
        """The bases' state keys and shapes, columns orthonormal."""
        right, left = (self.n, self.rank), (self.m, self.rank)
        if self.side == "both":
            return {"basis_left": left, "basis": right}
        return {"basis": right if self.side == "right" else left}


@functools.cache
def geometry(m: int, n: int, rank: int, side: Side) -> Geometry:
    """One object of each, for it keeps the shapes that follow."""
    return Geometry(m, n, rank, side)


@functools.cache
def projected_side(
    shape: tuple[int, ...], count: int, proj_type: ProjType
) -> tuple[int, int, Side]:
    """Rows, columns and the projected side of each of `count` matrices that a tensor of this shape
    holds. One of more than two dimensions is a matrix of (shape[0], product of the rest)."""
    rows, *rest = shape_in_stack(shape, count)
    m, n = rows, math.prod(rest)
    sides: dict[ProjType, Side] = {
        "std": "right" if m >= n else "left",
        "reverse_std": "left" if m >= n else "right",
        "right": "right",
        "left": "left",
        "full": "both",
    }
    return m, n, sides[proj_type]


def shape_in_stack(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of one of `count` matrices: (E, m, n) and (E m, n) hold E of (m, n)."""
    if count == 1:
        return shape
    return shape[1:] if shape[0] == count and len(shape) > 2 else (shape[0] // count, *shape[1:])


def in_stack(tensor: Tensor, count: int) -> Tensor:
    """A stack, (E, m, n) or (E m, n), as (E, m, n): a view."""
    shape = shape_in_stack(tuple(tensor.shape), count)
    return tensor.view(count, -1, *tensor.shape[1:]).view(count, *shape)


def matrix(tensor: Tensor) -> Tensor:
    """The tensor as (shape[0], product of the rest), a view if its memory allows that."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
