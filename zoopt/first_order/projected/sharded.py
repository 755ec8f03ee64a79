"""Projections of a gradient whose rows are sharded over processes.

Every process has the whole bases: one computes them from the whole gradient and sends them to the
others. With Q on the right, each process has the rows of R = G Q and of the moments that belong to
its rows of G. With P on the left, R = G^T P is a sum over all processes, so R and the moments are
whole and equal everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from zoopt.distributed.sharding import (
    Rows,
    anywhere,
    broadcast_,
    greatest_,
    in_runs,
    inner_dimension,
    is_owner,
    local,
    local_like,
    runs,
    shard_dimensions,
    sum_,
    whole,
)
from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.projected.basis import load_bases
from zoopt.first_order.projected.codecs import coded_units
from zoopt.first_order.projected.coded_shards import whole_blocks
from zoopt.first_order.projected.geometry import Geometry, matrix
from zoopt.first_order.projected.state import ProjectedState, count
from zoopt.first_order.projected.subspace import BLIND, down, silence_rounding_
from zoopt.first_order.site import Site
from zoopt.kernels.journal import kept, once, pieces
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
            if self._rule(group).elementwise and self._units(param, group):
                self._step_blocks(site, gradient)
            elif inner_dimension(param) and self._is_rounded(param, group):
                self._step_runs(site, gradient)
            else:
                super()._step_shard(site, gradient)
            return
        state = self._local_state(site)
        completed, grad = int(state["step"]), matrix(local_like(gradient, param))
        # A refresh can widen the gap. A step that is run again must not ask anew.
        if kept(self._refresh_due, site, state):
            if not anywhere(not grad.isfinite().all(), param):
                refresh = functools.partial(self._refresh, site, state, geo)
                names = self._basis_specs(geo, group, param.dtype)
                once(refresh_together, site, gradient, state, names, refresh)
            elif self._waits(completed):
                return
        bases = rows_of(load_bases(site, state, geo, completed), param, geo)
        reduced = kept(lambda: down([grad], [bases], geo)[0].to(accumulator_dtype(grad.dtype)))
        if geo.side != "right":
            sum_(reduced, param)
        if group["projector"] not in BLIND:
            silence_rounding_(reduced, geo, greatest=functools.partial(greatest_, param=param))
        first = Rows(param).first * geo.rank if geo.side == "right" else 0
        key = NoiseKey(site.seed, site.stream, first)
        stack = reduced.unsqueeze(0)
        self._run(lambda: stack, [site.shard], [state], [key], [grad], [bases], geo, param)

    def _is_rounded(self, param: Tensor, group: Group) -> bool:
        """Whether a step by itself rounds numbers, which depends on their places in the whole."""
        specs = self.declared_state(param, group).values()
        return param.itemsize == 2 or any(spec.dtype == torch.bfloat16 for spec in specs)

    def _step_runs(self, site: Site, gradient: Tensor) -> None:
        """Step a parameter by itself whose part here consists of runs, as if each were one."""
        param, group = site.param, site.group
        state = self._local_state(site)
        part, starts = local(param), runs(param)
        if not part.numel():
            count([state])
            return
        divided = {name: in_runs(own, param) for name, own in state.items() if name != "step"}
        grads = in_runs(local_like(gradient, param), param)
        sites = []
        for i, (own, start) in enumerate(zip(in_runs(part, param), starts, strict=True)):
            sites.append(dataclasses.replace(site, param=own, offset=start))
            self.state[own] = {name: values[i] for name, values in divided.items()}
            self.state[own]["step"] = state["step"].clone()
        try:
            if self._rule(group).write is not None:
                self._update_together(sites, grads)
            else:
                for each, grad in pieces(zip(sites, grads, strict=True)):
                    self._apply(each, grad, grad)
        finally:
            for each in sites:
                del self.state[each.param]
        count([state])

    def _step_blocks(self, site: Site, gradient: Tensor) -> None:
        """Step a parameter by itself whose moments are coded: whole blocks of it."""
        param, group = site.param, site.group
        state = self._local_state(site)
        part, grad = local(param), local_like(gradient, param)
        theta = kept(part.contiguous)
        units = self._units(param, group)
        with whole_blocks(
            param, tuple(param.shape), state, units, reads=[grad], writes=[theta]
        ) as cut:
            [grad], [own] = cut.reads, cut.writes
            if own.numel():
                self.state[own] = cut.state
                try:
                    self._apply(dataclasses.replace(site, param=own, offset=cut.first), grad, grad)
                finally:
                    del self.state[own]
            else:
                count([state])
        if theta is not part:
            once(part.copy_, theta)

    def _in_blocks(
        self,
        site: Site,
        reduced: Tensor,
        state: State,
        step: int,
        units: Mapping[str, int],
    ) -> Tensor:
        """The rule's direction of this process's rows of R, (1, rows, r), whose moments are
        coded."""
        param, group = site.whole, site.group
        geo, rule = self._geometry(param, group), self._rule(group)
        assert geo is not None
        needed = self._residual(group).needs_reduced
        direction = kept(reduced.clone if needed else reduced.contiguous)
        with whole_blocks(param, geo.reduced_shape, state, units, writes=[direction]) as cut:
            [own] = cut.writes
            if own.numel():
                key = NoiseKey(site.seed, site.stream, cut.first)
                values = own.view(1, -1)
                options = {"out": values} if rule.overwrites else {}
                values.copy_(rule.direction(values, [cut.state], group, step, [key], **options))
        return direction

    def _units(self, param: Tensor, group: Group) -> Mapping[str, int]:
        """Of the state of a sharded parameter's rows that is codes and scales, how many elements an
        entry stands for."""
        geo = self._geometry(param, group)
        if geo is not None and geo.side != "right":
            return {}
        shape = tuple(param.shape) if geo is None else geo.reduced_shape
        specs = self._rule(group).specs(shape, group, accumulator_dtype(param.dtype))
        return coded_units(specs, shape, group["state_dtype"])

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        geo = self._geometry(param, group)
        if name in self._units(param, group):
            return True
        if geo is None:
            return super()._follows_rows(name, spec, param, group)
        return geo.side == "right" and name not in geo.bases and spec.shape == geo.reduced_shape

    def _can_shard(self, param: Tensor, group: Group) -> bool:
        """Where the rule is one of single elements, or the class knows how; codes in blocks over
        one dimension of processes only."""
        if self._matrices_of(param, group) > 1:
            return False
        alone = self._geometry(param, group) is None and self._rule(group).elementwise
        if inner_dimension(param):
            return alone and not self._units(param, group)
        if len(shard_dimensions(param)) > 1 and self._units(param, group):
            return False
        return alone or self.shards


def refresh_together(
    site: Site,
    gradient: Tensor,
    state: State,
    names: Iterable[str],
    refresh: Callable[[Tensor], None],
) -> None:
    """Make new bases in one of the processes that share the parameter, and send them to the others.

    Args:
        gradient: the parameter's, sharded like it.
        names: of the state that `refresh` computes from the whole gradient, (m, n).
    """
    every = matrix(whole(gradient))
    if is_owner(site.param, site.position):
        once(refresh, every)
    for name in names:
        broadcast_(state[name], site.param, site.position)


def rows_of(bases: dict[str, Tensor], param: Tensor, geo: Geometry) -> dict[str, Tensor]:
    """The bases, where P (m, r) is cut to the rows of this process's part of the gradient."""
    left = {"left": "basis", "both": "basis_left"}.get(geo.side)
    return {
        name: Rows(param).mine(basis) if name == left else basis for name, basis in bases.items()
    }
