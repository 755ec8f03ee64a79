"""Projections of a gradient whose rows are sharded over processes.

The bases are whole everywhere: one process makes them from the whole gradient, and sends them out.
With Q on the right a part of R = G Q is that of G's rows, and so are the moments. With P on the
left R = G^T P is a sum over the parts, the same everywhere, and so are the moments.
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
    """Make the bases anew, in one of the processes that share the parameter, for all of them.

    Args:
        names: of the state that `refresh` makes of the whole gradient, (m, n).
    """
    assert site.param.grad is not None
    gradient = matrix(whole(site.param.grad))
    if is_owner(site.param, site.position):
        refresh(gradient)
    for name in names:
        broadcast_(state[name], site.param, site.position)


def rows_of(bases: dict[str, Tensor], param: Tensor, geo: Geometry) -> dict[str, Tensor]:
    """The bases, with those rows of P (m, r) that belong to the part of the gradient here."""
    first, count = first_row(param), local(param).shape[0]
    left = {"left": "basis", "both": "basis_left"}.get(geo.side)
    return {
        name: basis[first : first + count] if name == left else basis
        for name, basis in bases.items()
    }


def first_row(param: Tensor) -> int:
    """The number of the first row that lies here."""
    return offset(param) // max(math.prod(param.shape[1:]), 1)
