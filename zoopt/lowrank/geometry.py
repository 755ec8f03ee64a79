"""Which side of a gradient is projected, and the shapes that follow."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from torch import Tensor

from zoopt.optimizer import Group

ProjType = Literal["std", "reverse_std", "right", "left", "full"]
#: Projectors whose bases can span more than a gradient does.
SPANNING = ("columns", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A gradient G (m, n) and the subspaces that it is projected on.

    Right: R = G Q with Q (n, r). Left: R = G^T P with P (m, r), the transpose of GaLore's P^T G.
    Both: R = P^T G Q. So R is (channels, r) with the rank contiguous whatever the side, and a
    channel (what APOLLO and Fira scale as one) is a row of R.
    """

    m: int
    n: int
    rank: int
    side: Literal["right", "left", "both"]

    @property
    def reduced_shape(self) -> tuple[int, int]:
        """Of R: (channels, r)."""
        return {"right": self.m, "left": self.n, "both": self.rank}[self.side], self.rank

    @property
    def bases(self) -> dict[str, tuple[int, int]]:
        """The bases' state keys and shapes, columns orthonormal."""
        right, left = (self.n, self.rank), (self.m, self.rank)
        if self.side == "both":
            return {"basis_left": left, "basis": right}
        return {"basis": right if self.side == "right" else left}


def geometry(param: Tensor, group: Group) -> Geometry | None:
    """How the parameter is projected: from its shape alone; None if it is not.

    Tensors of more than two dimensions are matrices of shape (shape[0], product of the rest). A
    rank above the matrix's own is cut to it. `density` is the rank as a fraction of the side that
    is projected.
    """
    if not _is_projected(group) or param.dim() < 2:
        return None
    m, n = param.shape[0], math.prod(param.shape[1:])
    proj_type = group["proj_type"]
    if proj_type == "std":
        side = "right" if m >= n else "left"
    elif proj_type == "reverse_std":
        side = "left" if m >= n else "right"
    else:
        side = {"right": "right", "left": "left", "full": "both"}[proj_type]
    rank = min(m, n) and _rank(group, m if side == "left" else n, min(m, n))
    return Geometry(m, n, rank, side) if rank else None  # type: ignore[arg-type]


def _is_projected(group: Group) -> bool:
    """Not where `rank` or `density` is None, and not where all of a matrix is its density."""
    if "density" in group:
        return group["density"] not in (None, 1)
    return group.get("rank") is not None


def _rank(group: Group, dim: int, own: int) -> int:
    """The rank of a basis of `dim` dimensions, of a matrix whose own rank is at most `own`."""
    if "density" not in group:
        rank: int = group["rank"]
        return min(rank, own)
    rank = max(1, round(group["density"] * dim))
    return rank if group["projector"] in SPANNING else min(rank, own)


def matrix(tensor: Tensor) -> Tensor:
    """The tensor as (shape[0], product of the rest), a view where its memory allows it."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
