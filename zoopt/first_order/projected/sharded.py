"""Projections of a gradient whose rows are sharded over processes.

Every process has the whole bases: one computes them from the whole gradient and sends them to the
others. With Q on the right, each process has the rows of R = G Q and of the moments that belong to
its rows of G. With P on the left, R = G^T P is a sum over all processes, so R and the moments are
whole and equal everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from zoopt.distributed.sharding import broadcast_, is_owner, local, offset, whole
from zoopt.first_order.base import Site
from zoopt.first_order.projected.geometry import Geometry, matrix

State = dict[str, Tensor]


def refresh_together(
    site: Site, state: State, names: Iterable[str], refresh: Callable[[Tensor], None]
) -> None:
    """Make new bases in one of the processes that share the parameter, and send them to the others.

    Args:
        names: of the state that `refresh` computes from the whole gradient, (m, n).
    """
    assert site.param.grad is not None
    gradient = matrix(whole(site.param.grad))
    if is_owner(site.param, site.position):
        refresh(gradient)
    for name in names:
        broadcast_(state[name], site.param, site.position)


def rows_of(bases: dict[str, Tensor], param: Tensor, geo: Geometry) -> dict[str, Tensor]:
    """The bases, where P (m, r) is cut to the rows of this process's part of the gradient."""
    first, count = first_row(param), local(param).shape[0]
    left = {"left": "basis", "both": "basis_left"}.get(geo.side)
    return {
        name: basis[first : first + count] if name == left else basis
        for name, basis in bases.items()
    }


def first_row(param: Tensor) -> int:
    """The number of this process's first row."""
    return offset(param) // max(math.prod(param.shape[1:]), 1)
