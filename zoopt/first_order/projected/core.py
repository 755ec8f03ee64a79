"""The projected core: gradient -> projector down -> rule -> residual and up -> one write."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from zoopt.distributed.sharding import anywhere, greatest_, local, local_like, offset, sum_
from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.base import Site, batch_kind, batch_of, descent_rate
from zoopt.first_order.projected.basis import basis_specs, load_bases, refresh, refresh_due
from zoopt.first_order.projected.geometry import Geometry, geometry, in_stack, matrices_of, matrix
from zoopt.first_order.projected.residuals import Parts, Residual, Terms
from zoopt.first_order.projected.rules import ADAM, Rule
from zoopt.first_order.projected.sharded import first_row, refresh_together, rows_of
from zoopt.first_order.projected.stacks import StackedMatrices, alone
from zoopt.first_order.projected.subspace import (
    BLIND,
    down,
    factors,
    silence_rounding_,
)
from zoopt.kernels.dispatch import known
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op import add_product_
from zoopt.optimizer import STEP, Group, TensorSpec


class ProjectedOptimizer(StackedMatrices):
    """A rule inside a subspace of each matrix's gradient; parameters of groups with `rank=None`,
    and those of fewer than two dimensions, get the rule itself.

    A subclass picks the parts: `_rule` and `_residual`. Hyperparameters are in the param groups:
    `rank`, `update_proj_gap`, `scale`, `proj_type`, `projector`, `state_dtype`, `state_rounding`.
    """

    def _rule(self, group: Group) -> Rule:
        return ADAM

    def _residual(self, group: Group) -> Residual:
        raise NotImplementedError

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """`step`, the bases, the rule's moments, and what the residual keeps; of a stack of
        matrices those of all, along a first axis."""
        count = matrices_of(param, group)
        if count == 1:
            return self._declared(param, group)
        one = self._declared(in_stack(param.detach(), count)[0], alone(group))
        return {
            name: dataclasses.replace(spec, shape=(count, *spec.shape))
            for name, spec in one.items()
        }

    def _declared(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """The state of one matrix, or of a parameter that is not projected."""
        geo = geometry(param, group)
        accumulator = accumulator_dtype(param.dtype)
        rule, step = self._rule(group), {"step": STEP}
        if geo is None:
            return {**step, **rule.specs(tuple(param.shape), group, accumulator)}
        return {
            **step,
            **self._basis_specs(geo, group, param.dtype),
            **rule.specs(geo.reduced_shape, group, accumulator),
            **self._residual(group).specs(geo, accumulator),
        }

    def _prepare(self, site: Site, gradient: Tensor) -> bool:
        """Make the bases anew if it is time: linear algebra, which can fail."""
        geo = geometry(site.param, site.group)
        if geo is None or site.continues:
            return True
        state = self._state(site.param, site.group)
        if not self._refresh_due(site, state):
            return True
        # A norm makes no temporaries of the gradient's size.
        if known(torch.linalg.vector_norm(gradient, math.inf).isfinite(), True):
            self._refresh(site, state, geo, matrix(gradient))
            return True
        # At first there is no basis yet, and none can be had from this gradient.
        return int(state["step"]) > 0

    def _reduce(self, site: Site, gradient: Tensor) -> Tensor | None:
        geo = geometry(site.param, site.group)
        if geo is None:
            return gradient
        if not self._prepare(site, gradient):
            return None
        state = self._state(site.param, site.group)
        grad, completed = matrix(gradient), int(state["step"])
        reduced = down(grad, load_bases(site, state, geo, completed), geo)
        if site.group["projector"] not in BLIND:
            silence_rounding_(reduced, geo)
        if self._uses_up_reduced(site.group):
            return reduced
        return reduced.to(accumulator_dtype(reduced.dtype))

    def _basis_specs(
        self, geo: Geometry, group: Group, dtype: torch.dtype
    ) -> Mapping[str, TensorSpec]:
        """The state that the refresh of a parameter's bases writes."""
        return basis_specs(geo, group, dtype)

    def _refresh_due(self, site: Site, state: dict[str, Tensor]) -> bool:
        """Whether the next step makes the bases anew."""
        return refresh_due(site, int(state["step"]), site.group["update_proj_gap"])

    def _refresh(
        self, site: Site, state: dict[str, Tensor], geo: Geometry, gradient: Tensor
    ) -> None:
        """Make the bases anew from the gradient (m, n)."""
        refresh(site, state, gradient, geo)

    def bases(self, param: Tensor) -> dict[str, Tensor]:
        """The subspace of the parameter's last step, columns orthonormal (random: N(0, 1/r)).

        Returns:
            `"basis"`, (n, r) or (m, r), and for two-sided projections `"basis_left"`, (m, r) too,
            each of all matrices of a stack along a first axis; nothing for a parameter that is not
            projected or has not been stepped.
        """
        for site in self._sites():
            geo = geometry(param, site.group)
            if site.param is param and geo is not None and self.state.get(param):
                if matrices_of(param, site.group) > 1:
                    with self._apart([site], every=True) as parts:
                        each = [self._bases(part, geo) for part in parts]
                    return {name: torch.stack([own[name] for own in each]) for name in each[0]}
                return self._bases(site, geo)
        return {}

    def _bases(self, site: Site, geo: Geometry) -> dict[str, Tensor]:
        """The bases of the last step of a matrix that has state."""
        state = self.state[site.param]
        return load_bases(site, state, geo, max(0, int(state["step"]) - 1))

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        param, group = site.param, site.group
        geo = geometry(param, group)
        # Of what is projected, the reduction has made the state.
        state = self._state(param, group) if geo is None else self.state[param]
        state["step"] += 1
        step = int(state["step"])
        key = site.key
        if geo is None:
            self._apply_whole(site, reduced, state, step, key)
            return
        grad = None if gradient is None else matrix(gradient)
        terms = self._terms(site, reduced, grad, state, geo, step, key)
        up = terms.product is not None or terms.sign_step
        bases = load_bases(site, state, geo, step - 1) if up else {}
        self._write(site, terms, reduced, grad, bases, geo, step)

    def _terms(
        self,
        site: Site,
        reduced: Tensor,
        grad: Tensor | None,
        state: dict[str, Tensor],
        geo: Geometry,
        step: int,
        key: NoiseKey,
        sharded: Tensor | None = None,
    ) -> Terms:
        """The rule's direction of R, and the residual's terms; `sharded` as in `Parts`."""
        group, residual = site.group, self._residual(site.group)
        norms = None
        if residual.needs_norms:
            rule = self._rule(group)
            assert rule.norms is not None
            squares = rule.norms(reduced, state)
            direction = rule.direction(reduced, state, group, step, key, squares)
            norms = squares.to(reduced.dtype).sqrt_()
        else:
            direction = self._direction(site, reduced, state, step, key)
        parts = Parts(direction, reduced, grad, norms, state, group, geo, sharded)
        return residual.terms(parts)

    def _direction(
        self, site: Site, reduced: Tensor, state: dict[str, Tensor], step: int, key: NoiseKey
    ) -> Tensor:
        """The rule's direction of R, (channels, r), or of a whole gradient."""
        group = site.group
        rule = self._rule(group)
        if self._uses_up_reduced(group):
            # Nothing else asks for R: fresh memory would cost as much as the rule does.
            return rule.direction(reduced, state, group, step, key, out=reduced)
        return rule.direction(reduced, state, group, step, key)

    def _uses_up_reduced(self, group: Group) -> bool:
        """Whether the direction may go where R is, which then may have the gradient's dtype."""
        return self._rule(group).overwrites and not self._residual(group).needs_reduced

    def _step_shard(self, site: Site, gradient: Tensor) -> None:
        param, group = site.param, site.group
        geo = geometry(param, group)
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
        reduced = down(grad, bases, geo).to(accumulator_dtype(grad.dtype))
        if geo.side != "right":
            sum_(reduced, param)
        if group["projector"] not in BLIND:
            silence_rounding_(reduced, geo, greatest=functools.partial(greatest_, param=param))
        state["step"] += 1
        part = dataclasses.replace(site, param=local(param), offset=offset(param))
        first = first_row(param) * geo.rank if geo.side == "right" else 0
        key = NoiseKey(site.seed, site.stream, first)
        needed = grad if self._residual(group).needs_gradient else None
        terms = self._terms(part, reduced, needed, state, geo, completed + 1, key, param)
        self._write(part, terms, reduced, needed, bases, geo, completed + 1)

    def _write(
        self,
        site: Site,
        terms: Terms,
        reduced: Tensor,
        grad: Tensor | None,
        bases: dict[str, Tensor],
        geo: Geometry,
        step: int,
    ) -> None:
        """theta <- decay theta - lr (terms), in one pass; or the decay last."""
        param, group = site.param, site.group
        descent = descent_rate(group)
        left, right = (None, None)
        if terms.product is not None:
            left, right = factors(terms.product, bases, geo)
        scale = terms.channel_scale
        if scale is not None:
            scale = (scale * descent).view((1, -1) if geo.side == "left" else (-1, 1))
        sign_of = None
        if terms.sign_step:
            whole = {name: basis.to(reduced.dtype) for name, basis in bases.items()}
            sign_of = factors(reduced, whole, geo)
        decay, after = self._decay(group)
        theta = matrix(param.detach())
        add_product_(
            theta,
            left,
            right,
            alpha=descent * terms.rate,
            decay=1.0 if after else decay,
            gradient=grad if scale is not None or terms.sign_step else None,
            channel_scale=scale,
            sign_of=sign_of,
            sign_step=terms.sign_step * (1.0 if group["maximize"] else -1.0),
            key=site.key,
            rounding_draw=site.rounding_draw(step),
        )
        if after and decay != 1.0:
            theta.mul_(decay)
        if not param.is_contiguous():
            param.copy_(theta.reshape(param.shape))

    def _kind(self, site: Site) -> Hashable:
        """Of parameters that the rule writes itself: their step, and how their state is stored."""
        param, group = site.param, site.group
        if geometry(param, group) is not None or self._rule(group).write is None:
            return None
        return batch_kind(site, *self._state(param, group).values())

    def _update_together(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        states = [self._state(site.param, site.group) for site in sites]
        self._write_whole(sites, gradients, int(states[0]["step"]) + 1)
        for state in states:
            state["step"] += 1

    def _write_whole(self, sites: Sequence[Site], gradients: Sequence[Tensor], step: int) -> None:
        """theta <- decay theta + rate (the rule's direction), of parameters of one kind."""
        group = sites[0].group
        write = self._rule(group).write
        assert write is not None
        decay, after = self._decay(group)
        states = [self.state[site.param] for site in sites]
        write(
            *(batch_of(sites), gradients, states, group, step),
            rate=descent_rate(group),
            decay=1.0 if after else decay,
            rounding_draw=sites[0].rounding_draw(step),
        )
        if after and decay != 1.0:
            for site in sites:
                site.param.mul_(decay)

    def _decay(self, group: Group) -> tuple[float, bool]:
        """What the weights are multiplied by, and whether the step comes before that."""
        decay = 1.0 - float(group["lr"]) * group["weight_decay"]
        return decay, group.get("decay", "before") == "after"

    def _apply_whole(
        self, site: Site, gradient: Tensor, state: dict[str, Tensor], step: int, key: NoiseKey
    ) -> None:
        """The rule on the parameter itself."""
        param, group = site.param, site.group
        if self._rule(group).write is not None:
            self._write_whole([site], [gradient], step)
            return
        decay, after = self._decay(group)
        direction = self._direction(site, gradient, state, step, key)
        theta = param.detach().reshape(1, -1)
        add_product_(
            theta,
            None,
            None,
            decay=1.0 if after else decay,
            gradient=direction.reshape(1, -1),
            channel_scale=direction.new_full((1, 1), descent_rate(group)),
            key=site.key,
            rounding_draw=site.rounding_draw(step),
        )
        if not param.is_contiguous():
            param.copy_(theta.reshape(param.shape))
        if after and decay != 1.0:
            param.mul_(decay)

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        geo = geometry(param, group)
        if geo is None:
            return super()._follows_rows(name, spec, param, group)
        return geo.side == "right" and name not in geo.bases and spec.shape == geo.reduced_shape

    def _can_shard(self, param: Tensor, group: Group) -> bool:
        """Where the rule is one of single elements, and so is the state of what is sharded: no
        codes in blocks. In a subspace too, if the class knows how."""
        if not self._rule(group).elementwise or matrices_of(param, group) > 1:
            return False
        geo = geometry(param, group)
        if geo is not None:
            return self.shards and (
                geo.side != "right" or group["state_dtype"] in ("float32", "bfloat16")
            )
        specs = self.declared_state(param, group)
        return all(
            name == "step" or spec.shape == tuple(param.shape) for name, spec in specs.items()
        )

    def _needs_gradient(self, site: Site) -> bool:
        geo = geometry(site.param, site.group)
        return geo is not None and self._residual(site.group).needs_gradient
