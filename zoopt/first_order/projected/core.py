"""The projected core: gradient -> projector down -> rule -> residual and up -> one write."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoopt.dtypes import NARROW, accumulator_dtype
from zoopt.first_order.projected.basis import load_all_bases
from zoopt.first_order.projected.geometry import Geometry, matrix
from zoopt.first_order.projected.residuals import Step, Terms
from zoopt.first_order.projected.sharded import ShardedMatrices
from zoopt.first_order.projected.state import count
from zoopt.first_order.projected.subspace import (
    BLIND,
    down,
    factor_dtype,
    factors,
    silence_rounding_,
)
from zoopt.first_order.site import Site, batch_kind, batch_of, descent_rate
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import launches
from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op import add_product_
from zoopt.lasting import Lasting, prepared
from zoopt.optimizer import Group

Item = TypeVar("Item")
#: The matrices that are stepped together have about so many elements of R: 32 MiB in float32.
WINDOW = 1 << 23


class ProjectedOptimizer(ShardedMatrices):
    """A rule inside a subspace of each matrix's gradient; parameters of groups with `rank=None`,
    and those of fewer than two dimensions, get the rule itself.

    A step is the residual's algorithm, with the operations of this class.
    """

    kinds_last = True

    def _reduce(self, site: Site, gradient: Tensor) -> Tensor | None:
        if self._geometry(site.param, site.group) is None:
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
        geo = self._geometry(site.param, site.group)
        assert geo is not None
        if bases is None:
            bases = self._rounded_bases(sites, gradients, geo)
        reduced = down([matrix(gradient) for gradient in gradients], bases, geo)
        if site.group["projector"] not in BLIND:
            silence_rounding_(reduced, geo)
        if self._uses_up_reduced(site.group):
            return reduced
        return reduced.to(accumulator_dtype(reduced.dtype))

    def _update(self, site: Site, gradient: Tensor) -> None:
        if self._geometry(site.param, site.group) is None:
            super()._update(site, gradient)
        else:
            self._step_matrices([site], [gradient])

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        param, group = site.param, site.group
        if self._geometry(param, group) is not None:
            gradients = None if gradient is None else [gradient]
            self._step_matrices([site], gradients, reduced=reduced.unsqueeze(0))
            return
        self._update_whole([site], [reduced])

    def _step_matrices(
        self,
        sites: Sequence[Site],
        gradients: Sequence[Tensor] | None,
        bases: Sequence[dict[str, Tensor]] | None = None,
        reduced: Tensor | None = None,
    ) -> None:
        """Step k prepared matrices of one geometry, with `bases` as for `_project`: from their
        gradients, or from R, (k, channels, r), if that has been made."""
        geo = self._geometry(sites[0].param, sites[0].group)
        assert geo is not None

        def down() -> Tensor:
            if reduced is not None:
                return reduced
            assert gradients is not None
            return self._project(sites, gradients, bases)

        # Made when the step was prepared.
        states = [self.state[site.param] for site in sites]
        grads = None if gradients is None else [matrix(gradient) for gradient in gradients]
        keys = [site.key for site in sites]
        self._run(down, sites, states, keys, grads, bases, geo)

    def _run(
        self,
        down: Callable[[], Tensor],
        sites: Sequence[Site],
        states: Sequence[dict[str, Tensor]],
        keys: Sequence[NoiseKey],
        grads: Sequence[Tensor] | None,
        bases: Sequence[dict[str, Tensor]] | None,
        geo: Geometry,
        sharded: Tensor | None = None,
    ) -> None:
        """The residual's algorithm; `down` and `sharded` as in `Step`."""
        group, step = sites[0].group, int(states[0]["step"]) + 1

        def rule(reduced: Tensor, norms: Tensor | None = None) -> Tensor:
            return once(self._direction, sites, reduced, states, step, keys, norms)

        def rule_and_norms(reduced: Tensor) -> tuple[Tensor, Tensor]:
            make = self._rule(group).norms
            assert make is not None
            if sharded is not None and self._units(sharded, group):
                # Blocks of codes do not end where rows do.
                before = kept(torch.linalg.vector_norm, reduced, dim=2)
                direction = rule(reduced)
                return direction, torch.stack((torch.linalg.vector_norm(direction, dim=2), before))
            norms = kept(make, reduced, states)
            direction = rule(reduced, norms)
            wide = accumulator_dtype(reduced.dtype)
            return direction, norms.to(wide).sqrt().view(2, *reduced.shape[:2])

        def descend(terms: Terms) -> None:
            own = bases
            if terms.product is None and not terms.sign_steps:
                own = [{}] * len(sites)
            elif own is None:
                own = load_all_bases(sites, states, geo, step - 1)
            self._write(sites, terms, grads, own, geo, step)

        project = functools.partial(kept, down)
        self._residual(group).algorithm(
            Step(project, rule, rule_and_norms, descend, grads, states, group, geo, sharded)
        )
        count(states)

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
        site, group = sites[0], sites[0].group
        rule = self._rule(group)
        if site.sharded is not None and rule.elementwise:
            units = self._units(site.sharded, group)
            if units:
                return self._in_blocks(site, reduced, states[0], step, units)
        options = self._rule_options(site)
        if norms is not None:
            options["norms"] = norms
        if self._uses_up_reduced(group):
            # R is not used afterwards, and fresh memory would cost as much as the rule does.
            options["out"] = reduced
        return rule.direction(reduced, states, group, step, keys, **options)

    def _rule_options(self, site: Site) -> dict[str, Any]:
        """What else the rule's direction takes."""
        return {}

    def _uses_up_reduced(self, group: Group) -> bool:
        """Whether the direction may go where R is, which then may have the gradient's dtype."""
        return self._rule(group).overwrites and not self._residual(group).needs_reduced

    def _write(
        self,
        sites: Sequence[Site],
        terms: Terms,
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
            assert terms.reduced is not None
            inside = zip(terms.reduced, bases, strict=True)
            signs_of = [
                factors(own, {name: kept.to(own.dtype) for name, kept in basis.items()}, geo)
                for own, basis in inside
            ]
        decay, after = self._decay(group)
        thetas = kept(_matrices, sites)
        for sign_step, members in pieces(_alike(terms.sign_steps, len(sites))):
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
            once(torch._foreach_mul_, thetas, decay)
        for site, theta in zip(sites, thetas, strict=True):
            if not site.param.is_contiguous():
                once(site.param.copy_, theta.reshape(site.param.shape))

    def _kind(self, site: Site, gradient: Tensor) -> Hashable:
        """For parameters that the rule writes itself, their step and how their state is stored. For
        others on a GPU, their step and their geometry or shape; on the CPU these are updated one by
        one, each while its R is in the cache."""
        param, group = site.param, site.group
        geo = self._geometry(param, group)
        writes = geo is None and self._rule(group).write is not None
        if not (writes or launches(param)):
            return None
        state = self._state(param, group)
        if writes:
            return batch_kind(site, gradient, *state.values())
        kind = batch_kind(site, gradient, state["step"])
        return None if kind is None else (kind, geo or param.shape)

    def _update_together(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        geo = self._geometry(sites[0].param, sites[0].group)
        if geo is not None:
            for part in pieces(windows(len(sites), math.prod(geo.reduced_shape))):
                self._update_matrices(sites[part], gradients[part])
            return
        self._update_whole(sites, gradients)

    def _update_whole(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        """Update parameters of one kind that are not projected."""
        states = self._states_of(sites)
        step = int(states[0]["step"]) + 1
        if self._rule(sites[0].group).write is not None:
            self._write_whole(sites, gradients, step)
        else:
            for part in pieces(windows(len(sites), sites[0].param.numel())):
                self._write_directions(sites[part], gradients[part], step)
        count(states)

    def _reduce_together(
        self, sites: Sequence[Site], gradients: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        geo = self._geometry(sites[0].param, sites[0].group)
        if geo is None:
            return gradients
        reduced = self._project(sites, gradients, self._bases_down(sites, gradients, geo))
        return reduced.to(accumulator_dtype(reduced.dtype)).unbind()

    def _apply_together(
        self,
        sites: Sequence[Site],
        reduced: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
    ) -> None:
        geo = self._geometry(sites[0].param, sites[0].group)
        if geo is None:
            self._update_whole(sites, reduced)
            return
        for part in pieces(windows(len(sites), math.prod(geo.reduced_shape))):
            stack = kept(torch.stack, list(reduced[part]))
            own = None if gradients is None else gradients[part]
            self._step_matrices(sites[part], own, reduced=stack)

    def _update_matrices(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        """Update matrices of one geometry from their gradients."""
        geo = self._geometry(sites[0].param, sites[0].group)
        assert geo is not None
        self._step_matrices(sites, gradients, self._bases_down(sites, gradients, geo))

    def _bases_down(
        self, sites: Sequence[Site], gradients: Sequence[Tensor], geo: Geometry
    ) -> list[dict[str, Tensor]]:
        """The bases of the next step; where they would be rounded on the way down, in that
        dtype, so that they are rounded once for both ways."""
        bases = self._rounded_bases(sites, gradients, geo)
        dtype = factor_dtype(gradients[0], geo)
        if geo.side != "both" and bases[0]["basis"].dtype != dtype:
            first = bases[0]["basis"]
            narrow = first.new_empty((len(bases), *first.shape), dtype=dtype)
            torch._foreach_copy_(narrow.unbind(), [basis["basis"] for basis in bases])
            bases = [{"basis": basis} for basis in narrow]
        return bases

    def _write_whole(self, sites: Sequence[Site], gradients: Sequence[Tensor], step: int) -> None:
        """theta <- decay theta + rate (the rule's direction), of parameters of one kind."""
        group = sites[0].group
        write = self._rule(group).write
        assert write is not None
        decay, after = self._decay(group)
        states = self._states_of(sites)
        write(
            *(batch_of(sites), gradients, states, group, step),
            rate=descent_rate(group),
            decay=1.0 if after else decay,
            rounding_draw=sites[0].rounding_draw(step),
        )
        if after and decay != 1.0:
            for site in pieces(sites):
                site.param.mul_(decay)

    def _states_of(self, sites: Sequence[Site]) -> Sequence[dict[str, Tensor]]:
        """The parameters' states."""
        return prepared(
            sites,
            "states",
            lambda: Lasting([self._state(site.param, site.group) for site in sites]),
        )

    def _decay(self, group: Group) -> tuple[float, bool]:
        """What the weights are multiplied by, and whether the step comes before that."""
        decay = 1.0 - float(group["lr"]) * group["weight_decay"]
        return decay, group.get("decay", "before") == "after"

    def _write_directions(
        self, sites: Sequence[Site], gradients: Sequence[Tensor], step: int
    ) -> None:
        """The same in two passes, of parameters of one shape, by a rule that does not write."""
        group, numel = sites[0].group, sites[0].param.numel()
        states, keys = [self.state[site.param] for site in sites], [site.key for site in sites]
        stack = gradients[0].unsqueeze(0) if len(sites) == 1 else torch.stack(list(gradients))
        direction = once(self._direction, sites, stack, states, step, keys)
        decay, after = self._decay(group)
        thetas = kept(lambda: [site.param.detach().reshape(1, numel) for site in sites])
        rate = direction.new_full((1, 1), descent_rate(group))
        add_product_(
            Batch(thetas, keys),
            None,
            None,
            decay=1.0 if after else decay,
            gradient=direction.reshape(len(sites), 1, numel).unbind(),
            channel_scale=[rate] * len(sites),
            rounding_draw=sites[0].rounding_draw(step),
        )
        if after and decay != 1.0:
            once(torch._foreach_mul_, thetas, decay)
        for site, theta in zip(sites, thetas, strict=True):
            if not site.param.is_contiguous():
                once(site.param.copy_, theta.reshape(site.param.shape))


def _matrices(sites: Sequence[Site]) -> list[Tensor]:
    """The weights as matrices: themselves, or copies of what is laid out otherwise."""
    return [matrix(site.param.detach()) for site in sites]


def windows(count: int, numel: int) -> Iterator[slice]:
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
