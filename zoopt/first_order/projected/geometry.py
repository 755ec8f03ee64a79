"""Which side of a gradient is projected, and the shapes that follow."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from torch import Tensor

from zoopt.optimizer import Group

ProjType = Literal["std", "reverse_std", "right", "left", "full"]
#: Projectors whose bases can span more than the gradient does.
SPANNING = ("columns", "orthogonal")


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
    side: Literal["right", "left", "both"]

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


def geometry(param: Tensor, group: Group) -> Geometry | None:
    """How the parameter, or each matrix of a stack, is projected: from its shape alone; None if it
    is not.

    Tensors of more than two dimensions are matrices of shape (shape[0], product of the rest). The
    rank is at most the matrix's own. `density` is the rank as a fraction of the projected side.
    """
    if param.dim() < 2 or not _is_projected(group):
        return None
    share = (group["density"], group["projector"]) if "density" in group else None
    shape = shape_in_stack(tuple(param.shape), matrices_of(param, group))
    return _geometry(shape, group["proj_type"], group.get("rank"), share)


def matrices_of(param: Tensor, group: Group) -> int:
    """How many matrices are stacked along the parameter's first axis, each with its own subspace
    and state: the group's `matrices` if the parameter is projected."""
    count: int = group.get("matrices", 1)
    return count if param.dim() > 1 and _is_projected(group) else 1


def shape_in_stack(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of one of `count` matrices: (E, m, n) and (E m, n) hold E of (m, n)."""
    if count == 1:
        return shape
    return shape[1:] if shape[0] == count and len(shape) > 2 else (shape[0] // count, *shape[1:])


def in_stack(tensor: Tensor, count: int) -> Tensor:
    """A stack, (E, m, n) or (E m, n), as (E, m, n): a view."""
    shape = shape_in_stack(tuple(tensor.shape), count)
    return tensor.view(count, -1, *tensor.shape[1:]).view(count, *shape)


@functools.cache
def _geometry(
    shape: tuple[int, ...],
    proj_type: ProjType,
    rank: int | None,
    share: tuple[float, str] | None,
) -> Geometry | None:
    """By rank, or by density and projector."""
    m, n = shape[0], math.prod(shape[1:])
    if proj_type == "std":
        side = "right" if m >= n else "left"
    elif proj_type == "reverse_std":
        side = "left" if m >= n else "right"
    else:
        side = {"right": "right", "left": "left", "full": "both"}[proj_type]
    dim, own = m if side == "left" else n, min(m, n)
    if share is not None:
        density, projector = share
        rank = max(1, round(density * dim))
        own = dim if projector in SPANNING else own
    assert rank is not None
    rank = min(m, n) and min(rank, own)
    return Geometry(m, n, rank, side) if rank else None  # type: ignore[arg-type]


def _is_projected(group: Group) -> bool:
    """Whether matrices of the group are projected: not with a `rank` or `density` of None, nor with
    a density that covers the whole matrix."""
    if "density" in group:
        return group["density"] not in (None, 1)
    return group.get("rank") is not None


def matrix(tensor: Tensor) -> Tensor:
    """The tensor as (shape[0], product of the rest), a view if its memory allows that."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
