"""What a projected optimizer keeps of each matrix: declared state, and bases made when due."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.projected.basis import (
    basis_specs,
    load_all_bases,
    load_bases,
    refresh,
    refresh_due,
)
from zoopt.first_order.projected.geometry import Geometry, in_stack, matrix
from zoopt.first_order.projected.residuals import Residual
from zoopt.first_order.projected.rules import ADAM, Rule
from zoopt.first_order.projected.stacks import StackedMatrices, alone
from zoopt.first_order.projected.subspace import factor_dtype
from zoopt.first_order.site import Site
from zoopt.kernels.dispatch import known
from zoopt.kernels.journal import kept, once
from zoopt.lasting import prepared
from zoopt.optimizer import STEP, Group, TensorSpec


class ProjectedState(StackedMatrices):
    """State of a rule inside a subspace: the rule's, the residual's, and the bases.

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
        count = self._matrices_of(param, group)
        if count == 1:
            return self._declared(param, group)
        one = self._declared(in_stack(param.detach(), count)[0], alone(group))
        return {
            name: dataclasses.replace(spec, shape=(count, *spec.shape))
            for name, spec in one.items()
        }

    def _declared(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """The state of one matrix, or of a parameter that is not projected."""
        geo = self._geometry(param, group)
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

    def _due(self, sites: Sequence[Site]) -> Sequence[int]:
        if self._geometry(sites[0].param, sites[0].group) is None:  # of all that are alike
            return ()
        due = [self._refresh_due(site, self.state[site.param]) for site in sites]
        return [number for number, own in enumerate(due) if own]

    def _prepare(self, site: Site, gradient: Tensor) -> bool:
        """Make the bases anew if it is time: linear algebra, which can fail."""
        geo = self._geometry(site.param, site.group)
        if geo is None or site.continues:
            return True
        state = self._state(site.param, site.group)
        # A refresh can widen the gap. A step that is run again must not ask anew.
        if not kept(self._refresh_due, site, state):
            return True
        # A norm makes no temporaries of the gradient's size.
        if known(torch.linalg.vector_norm(gradient, math.inf).isfinite(), True):
            self._refresh(site, state, geo, matrix(gradient))
            return True
        return not self._waits(int(state["step"]))

    def _waits(self, completed: int) -> bool:
        """Whether a parameter is not stepped if new bases are due, after so many steps, and cannot
        be had from this gradient: at first there are none."""
        return completed == 0

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
            geo = self._geometry(param, site.group)
            if site.param is param and geo is not None and self.state.get(param):
                if self._matrices_of(param, site.group) > 1:
                    with self._apart([site], every=True) as parts:
                        each = [self._bases(part, geo) for part in parts]
                    return {name: torch.stack([own[name] for own in each]) for name in each[0]}
                return self._bases(site, geo)
        return {}

    def _bases(self, site: Site, geo: Geometry) -> dict[str, Tensor]:
        """The bases of the last step of a matrix that has state."""
        state = self.state[site.param]
        return load_bases(site, state, geo, max(0, int(state["step"]) - 1))

    def _keeps_gradient(self, site: Site) -> bool:
        return self._geometry(site.param, site.group) is None

    def _needs_gradient(self, site: Site) -> bool:
        geo = self._geometry(site.param, site.group)
        return geo is not None and self._residual(site.group).needs_gradient


def count(states: Sequence[dict[str, Tensor]]) -> None:
    """Count the step of these states, which their parameters have taken."""
    steps = prepared(states, "steps", lambda: [state["step"] for state in states])
    once(torch._foreach_add_, steps, 1)
