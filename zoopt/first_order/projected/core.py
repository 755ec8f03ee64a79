"""The projected core: gradient -> projector down -> rule -> residual and up -> one write."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoopt.distributed.sharding import anywhere, greatest_, local, local_like, offset, sum_
from zoopt.dtypes import NARROW, accumulator_dtype
from zoopt.first_order.base import Site, batch_kind, batch_of, descent_rate
from zoopt.first_order.projected.basis import (
    basis_specs,
    load_all_bases,
    load_bases,
    refresh,
    refresh_due,
)
from zoopt.first_order.projected.geometry import Geometry, geometry, in_stack, matrices_of, matrix
from zoopt.first_order.projected.residuals import Parts, Residual, Terms
from zoopt.first_order.projected.rules import ADAM, Rule
from zoopt.first_order.projected.sharded import first_row, refresh_together, rows_of
from zoopt.first_order.projected.stacks import StackedMatrices, alone
from zoopt.first_order.projected.subspace import (
    BLIND,
    down,
    factor_dtype,
    factors,
    silence_rounding_,
)
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import known, launches
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op import add_product_
from zoopt.optimizer import STEP, Group, TensorSpec

Item = TypeVar("Item")
#: The matrices that are stepped together have about so many elements of R: 32 MiB in float32.
WINDOW = 1 << 23


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
        if geometry(site.param, site.group) is None:
            return gradient
        if not self._prepare(site, gradient):
            return None
        return self._project([site], [gradient])[0]

    def _project(
        self,
        sites: Sequence[Site],
        gradients: Sequence[Tensor],
        bases: Sequence[dict[str, Tensor]] | None = None,
    ) -> Tensor:
        """R of k matrices of one geometry: (k, channels, r). `bases`: if they are at hand."""
        site = sites[0]
        geo = geometry(site.param, site.group)
        assert geo is not None
        if bases is None:
            bases = self._rounded_bases(sites, gradients, geo)
        reduced = down([matrix(gradient) for gradient in gradients], bases, geo)
        if site.group["projector"] not in BLIND:
            silence_rounding_(reduced, geo)
        if self._uses_up_reduced(site.group):
            return reduced
        return reduced.to(accumulator_dtype(reduced.dtype))

    def _rounded_bases(
        self, sites: Sequence[Site], gradients: Sequence[Tensor], geo: Geometry
    ) -> list[dict[str, Tensor]]:
        """The bases of the next step, random ones in the dtype of the way down."""
        # Made when the step was prepared.
        states = [self.state[site.param] for site in sites]
        dtype = factor_dtype(gradients[0], geo)
        return load_all_bases(sites, states, geo, int(states[0]["step"]), dtype)

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
        if geometry(param, group) is not None:
            gradients = None if gradient is None else [gradient]
            self._apply_matrices([site], reduced.unsqueeze(0), gradients)
            return
        state = self._state(param, group)
        state["step"] += 1
        self._apply_whole(site, reduced, state, int(state["step"]))

    def _apply_matrices(
        self,
        sites: Sequence[Site],
        reduced: Tensor,
        gradients: Sequence[Tensor] | None,
        bases: Sequence[dict[str, Tensor]] | None = None,
    ) -> None:
        """Update k matrices of one geometry and their state from R, (k, channels, r); `bases` as
        for `_project`."""
        geo = geometry(sites[0].param, sites[0].group)
        assert geo is not None
        # Made by the reductions.
        states = [self.state[site.param] for site in sites]
        for state in states:
            state["step"] += 1
        step = int(states[0]["step"])
        grads = None if gradients is None else [matrix(gradient) for gradient in gradients]
        keys = [site.key for site in sites]
        terms = self._terms(sites, reduced, grads, states, geo, step, keys)
        if terms.product is None and not terms.sign_steps:
            bases = [{}] * len(sites)
        elif bases is None:
            bases = load_all_bases(sites, states, geo, step - 1)
        self._write(sites, terms, reduced, grads, bases, geo, step)

    def _terms(
        self,
        sites: Sequence[Site],
        reduced: Tensor,
        grads: Sequence[Tensor] | None,
        states: Sequence[dict[str, Tensor]],
        geo: Geometry,
        step: int,
        keys: Sequence[NoiseKey],
        sharded: Tensor | None = None,
    ) -> Terms:
        """The rule's direction of R, and the residual's terms; `sharded` as in `Parts`."""
        group = sites[0].group
        residual, rule, norms = self._residual(group), self._rule(group), None
        if residual.needs_norms:
            assert rule.norms is not None
            norms = rule.norms(reduced, states)
        direction = self._direction(sites, reduced, states, step, keys, norms)
        if norms is not None:
            wide = accumulator_dtype(reduced.dtype)
            norms = norms.to(wide).sqrt_().view(2, *reduced.shape[:2])
        return residual.terms(Parts(direction, reduced, grads, norms, states, group, geo, sharded))

    def _direction(
        self,
        sites: Sequence[Site],
        reduced: Tensor,
        states: Sequence[dict[str, Tensor]],
        step: int,
        keys: Sequence[NoiseKey],
        norms: Tensor | None = None,
    ) -> Tensor:
        """The rule's direction of R, (k, channels, r), or of whole gradients; `norms` is passed to
        the rule."""
        group = sites[0].group
        rule = self._rule(group)
        options: dict[str, Any] = {} if norms is None else {"norms": norms}
        if self._uses_up_reduced(group):
            # R is not used afterwards, and fresh memory would cost as much as the rule does.
            options["out"] = reduced
        return rule.direction(reduced, states, group, step, keys, **options)

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
        reduced = down([grad], [bases], geo)[0].to(accumulator_dtype(grad.dtype))
        if geo.side != "right":
            sum_(reduced, param)
        if group["projector"] not in BLIND:
            silence_rounding_(reduced, geo, greatest=functools.partial(greatest_, param=param))
        state["step"] += 1
        part = dataclasses.replace(site, param=local(param), offset=offset(param))
        first = first_row(param) * geo.rank if geo.side == "right" else 0
        key = NoiseKey(site.seed, site.stream, first)
        needed = [grad] if self._residual(group).needs_gradient else None
        stack = reduced.unsqueeze(0)
        terms = self._terms([part], stack, needed, [state], geo, completed + 1, [key], param)
        self._write([part], terms, stack, needed, [bases], geo, completed + 1)

    def _write(
        self,
        sites: Sequence[Site],
        terms: Terms,
        reduced: Tensor,
        grads: Sequence[Tensor] | None,
        bases: Sequence[dict[str, Tensor]],
        geo: Geometry,
        step: int,
    ) -> None:
        """theta <- decay theta - lr (terms), in one pass; or the decay last."""
        group = sites[0].group
        descent, ascends = descent_rate(group), 1.0 if group["maximize"] else -1.0
        lefts = rights = scales = signs_of = None
        if terms.product is not None:
            product, param = terms.product, sites[0].param
            if dispatch.on_gpu(param) and param.dtype in NARROW:
                # The kernels would round them so, matrix by matrix.
                product = product.to(param.dtype)
            ways = zip(product, bases, strict=True)
            lefts, rights = zip(*(factors(own, basis, geo) for own, basis in ways), strict=True)
        if terms.channel_scale is not None:
            column = (1, -1) if geo.side == "left" else (-1, 1)
            scales = [own.view(column) for own in terms.channel_scale * descent]
        if any(terms.sign_steps):
            inside = zip(reduced, bases, strict=True)
            signs_of = [
                factors(own, {name: kept.to(own.dtype) for name, kept in basis.items()}, geo)
                for own, basis in inside
            ]
        decay, after = self._decay(group)
        thetas = [matrix(site.param.detach()) for site in sites]
        for sign_step, members in _alike(terms.sign_steps, len(sites)):
            signs = signs_of if sign_step else None
            add_product_(
                Batch([thetas[i] for i in members], [sites[i].key for i in members]),
                _chosen(lefts, members),
                _chosen(rights, members),
                alpha=descent * terms.rate,
                decay=1.0 if after else decay,
                gradient=_chosen(grads, members) if scales or signs else None,
                channel_scale=_chosen(scales, members),
                sign_of=_chosen(signs, members),
                sign_step=sign_step * ascends,
                rounding_draw=sites[0].rounding_draw(step),
            )
        if after and decay != 1.0:
            torch._foreach_mul_(thetas, decay)
        for site, theta in zip(sites, thetas, strict=True):
            if not site.param.is_contiguous():
                site.param.copy_(theta.reshape(site.param.shape))

    def _kind(self, site: Site) -> Hashable:
        """For parameters that the rule writes itself, their step and how their state is stored. For
        projected ones on a GPU, their step and geometry; on the CPU these are updated one by one,
        each while its R is in the cache."""
        param, group = site.param, site.group
        geo = geometry(param, group)
        if not (launches(param) if geo is not None else self._rule(group).write):
            return None
        state = self._state(param, group)
        if geo is None:
            return batch_kind(site, *state.values())
        kind = batch_kind(site, state["step"])
        return None if kind is None else (kind, geo)

    def _update_together(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        geo = geometry(sites[0].param, sites[0].group)
        if geo is not None:
            for part in _windows(len(sites), math.prod(geo.reduced_shape)):
                self._update_matrices(sites[part], gradients[part])
            return
        states = [self._state(site.param, site.group) for site in sites]
        self._write_whole(sites, gradients, int(states[0]["step"]) + 1)
        for state in states:
            state["step"] += 1

    def _update_matrices(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        """Update matrices of one geometry from their gradients."""
        geo = geometry(sites[0].param, sites[0].group)
        assert geo is not None
        bases = self._rounded_bases(sites, gradients, geo)
        dtype = factor_dtype(gradients[0], geo)
        if geo.side != "both" and bases[0]["basis"].dtype != dtype:
            # Rounded once for both ways.
            first = bases[0]["basis"]
            narrow = first.new_empty((len(bases), *first.shape), dtype=dtype)
            for basis, target in zip(bases, narrow, strict=True):
                target.copy_(basis["basis"])
            bases = [{"basis": basis} for basis in narrow]
        reduced = self._project(sites, gradients, bases)
        needed = gradients if self._residual(sites[0].group).needs_gradient else None
        self._apply_matrices(sites, reduced, needed, bases)

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
        self, site: Site, gradient: Tensor, state: dict[str, Tensor], step: int
    ) -> None:
        """The rule on the parameter itself."""
        param, group = site.param, site.group
        if self._rule(group).write is not None:
            self._write_whole([site], [gradient], step)
            return
        decay, after = self._decay(group)
        [direction] = self._direction([site], gradient.unsqueeze(0), [state], step, [site.key])
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


def _windows(count: int, numel: int) -> Iterator[slice]:
    """Slices of `count` matrices whose R, of `numel` elements each, have about WINDOW together."""
    most = max(1, WINDOW // max(numel, 1))
    for start in range(0, count, most):
        yield slice(start, start + most)


def _alike(numbers: Sequence[float], count: int) -> Iterable[tuple[float, list[int]]]:
    """Each different one of `count` numbers, and its positions; 0 if there are none."""
    if not numbers:
        return [(0.0, list(range(count)))]
    places: dict[float, list[int]] = {}
    for i, number in enumerate(numbers):
        places.setdefault(number, []).append(i)
    return places.items()


def _chosen(operands: Sequence[Item] | None, members: Sequence[int]) -> Sequence[Item] | None:
    if operands is None:
        return None
    return operands if len(members) == len(operands) else [operands[i] for i in members]
