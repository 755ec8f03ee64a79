"""Projections of a gradient whose rows are sharded over processes.

Every process has the whole bases: one computes them from the whole gradient and sends them to the
others. With Q on the right, each process has the rows of R = G Q and of the moments that belong to
its rows of G. With P on the left, R = G^T P is a sum over all processes, so R and the moments are
whole and equal everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from zoopt.distributed.sharding import (
    anywhere,
    broadcast_,
    greatest_,
    is_owner,
    local,
    local_like,
    offset,
    sum_,
    whole,
)
from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.base import Site
from zoopt.first_order.projected.basis import load_bases
from zoopt.first_order.projected.geometry import Geometry, matrix
from zoopt.first_order.projected.state import ProjectedState
from zoopt.first_order.projected.subspace import BLIND, down, silence_rounding_
from zoopt.kernels.noise.key import NoiseKey
from zoopt.optimizer import Group, TensorSpec

State = dict[str, Tensor]


class ShardedMatrices(ProjectedState):
    """Projected optimizers that step the rows of a matrix which this process has."""

    def _run(
        self,
        down: Callable[[], Tensor],
        sites: Sequence[Site],
        states: Sequence[State],
        keys: Sequence[NoiseKey],
        grads: Sequence[Tensor] | None,
        bases: Sequence[dict[str, Tensor]] | None,
        geo: Geometry,
        sharded: Tensor | None = None,
    ) -> None:
        """Run the residual's algorithm; `down` and `sharded` as in `Step`."""
        raise NotImplementedError

    def _step_shard(self, site: Site, gradient: Tensor) -> None:
        param, group = site.param, site.group
        geo = self._geometry(param, group)
        if geo is None:
            super()._step_shard(site, gradient)
            return
        state = {name: local(value) for name, value in self._state(param, group).items()}
        completed, grad = int(state["step"]), matrix(local_like(gradient, param))
        if self._refresh_due(site, state):
            if not anywhere(not grad.isfinite().all(), param):
                refresh = functools.partial(self._refresh, site, state, geo)
                refresh_together(site, state, self._basis_specs(geo, group, param.dtype), refresh)
            elif not completed:
                return
        bases = rows_of(load_bases(site, state, geo, completed), param, geo)
        reduced = down([grad], [bases], geo)[0].to(accumulator_dtype(grad.dtype))
        if geo.side != "right":
            sum_(reduced, param)
        if group["projector"] not in BLIND:
            silence_rounding_(reduced, geo, greatest=functools.partial(greatest_, param=param))
        part = dataclasses.replace(site, param=local(param), offset=offset(param))
        first = first_row(param) * geo.rank if geo.side == "right" else 0
        key = NoiseKey(site.seed, site.stream, first)
        stack = reduced.unsqueeze(0)
        self._run(lambda: stack, [part], [state], [key], [grad], [bases], geo, param)

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        geo = self._geometry(param, group)
        if geo is None:
            return super()._follows_rows(name, spec, param, group)
        return geo.side == "right" and name not in geo.bases and spec.shape == geo.reduced_shape

    def _can_shard(self, param: Tensor, group: Group) -> bool:
        """Where the rule is one of single elements, and so is the state of what is sharded: no
        codes in blocks. In a subspace too, if the class knows how."""
        if not self._rule(group).elementwise or self._matrices_of(param, group) > 1:
            return False
        geo = self._geometry(param, group)
        if geo is not None:
            return self.shards and (
                geo.side != "right" or group["state_dtype"] in ("float32", "bfloat16")
            )
        specs = self.declared_state(param, group)
        return all(
            name == "step" or spec.shape == tuple(param.shape) for name, spec in specs.items()
        )


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
