"""Sparse directions: methods whose directions have independent elements, all of them or some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.checks import check_choice, check_number
from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.descent.rule import Rule
from zoopt.kernels.noise.key import NoiseKey
from zoopt.optimizer import Group, TensorSpec
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.chunks import chunks
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.mask import (
    Indexed,
    SmallMagnitudes,
    aligned_indices,
    check_aligned,
    choose_small,
    magnitude_threshold,
)
from zoopt.zeroth_order.engine.noise import Elementwise, Noise
from zoopt.zeroth_order.engine.probe import PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Site
from zoopt.zeroth_order.engine.updates import withdrawn


class SparseZerothOrder(ZerothOrderOptimizer):
    """Directions whose elements are independent, on all elements of a parameter or on some.

    Group keys: `mask` (None, "random", "magnitude", or indices in the order of the parameters)
    and `density`.
    """

    #: Indices that are not int64 on their parameter's device, and copies that are.
    _copies: dict[int, tuple[Tensor, Tensor]] | None = None

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        # State of explicit indices is whole in every process, as their noise is.
        return not isinstance(group["mask"], list) and super()._follows_rows(
            name, spec, param, group
        )

    def _steps_runs(self, group: Group) -> bool:
        return group["mask"] in (None, "random")

    def _adopt(self, group: Group) -> None:
        """Replace indices by name by a list in the order of the parameters."""
        if isinstance(group["mask"], Mapping):
            names = group.get("param_names") or list(range(len(group["params"])))
            group["mask"] = aligned_indices(group["mask"], names, group["params"])

    def _initialise(self, param: Tensor, group: Group, number: int) -> None:
        if group["mask"] == "magnitude":
            threshold = magnitude_threshold(param, float(group["density"]))
            self.state[param]["threshold"].copy_(threshold)

    def _direction(
        self, param: Tensor, group: Group, number: int, *, virtual: bool
    ) -> Direction | None:
        key = NoiseKey(
            group["seed"],
            number,
            distribution=group["distribution"],
            density=float(group["density"]) if group["mask"] == "random" else 1.0,
        )
        if isinstance(group["mask"], list):
            indices = self._indices(param, group)
            return None if indices is None else Indexed(key, self._brought(indices, param))
        if group["mask"] == "magnitude":
            return SmallMagnitudes(key, self._state(param, group)["threshold"], None)
        return Noise(key)

    def _brought(self, indices: Tensor, param: Tensor) -> Tensor:
        """The indices as int64 on the parameter's device; copied there once."""
        if indices.dtype == torch.int64 and indices.device == param.device:
            return indices.contiguous()
        self._copies = self._copies or {}
        known, placed = self._copies.get(id(indices), (None, None))
        if known is not indices or placed is None or placed.device != param.device:
            placed = indices.to(param.device).long()
            # The indices themselves are kept, so that nothing else can have their id.
            self._copies[id(indices)] = indices, placed
        return placed

    def _prepare(self, sites: Sequence[Site]) -> None:
        if any(group["mask"] == "magnitude" for group in self.param_groups):
            moving = [
                (site.param, site.direction)
                for site in sites
                if isinstance(site.direction, SmallMagnitudes) and not site.virtual
            ]
            choose_small(moving)

    def _release(self, sites: Sequence[Site]) -> None:
        if any(group["mask"] == "magnitude" for group in self.param_groups):
            for site in sites:
                if isinstance(site.direction, SmallMagnitudes):
                    site.direction.mask = None

    def _update_elements(
        self,
        site: Site,
        pending: PendingProbe,
        offset: Coefficients,
        progress: Progress,
        rule: Callable[[Tensor, slice], Tensor],
        in_registers: Rule,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """theta <- decay (theta - offset) + rule(estimate), rounded once: chunk by chunk, or where
        operations are launches in one with other parameters.

        Args:
            rule: the gradient estimate of a chunk (flat, in the accumulator's dtype) and the
                chunk's place among what moves -> what theta receives. State that it changes goes
                to `progress.hold`.
            in_registers: the same rule, as kernels know it.
            state: what that changes, by its names for it.
        """
        group, direction = site.group, site.direction
        assert isinstance(direction, Elementwise)
        decay, weights = self._decay(group, pending), self._weights(group, pending)
        back = withdrawn(offset, decay)
        rounds: dict[str, Any] = {
            "decay": decay,
            "rounding": site.rounding,
            "rounding_draw": pending.draws[-1],
        }
        if direction.descends(
            site.param, back, weights, progress, rule=in_registers, state=state or {}, **rounds
        ):
            return
        with direction.elements(site.param, progress) as elements:
            for chunk in chunks(elements, progress):
                theta = elements[chunk]
                direction.write_(
                    theta,
                    back,
                    rule(direction.combine(theta, weights, chunk.start), chunk),
                    chunk.start,
                    **rounds,
                )

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """The masks' part: `threshold`, a float32, with `mask="magnitude"`."""
        return {"threshold": TensorSpec((), torch.float32)} if group["mask"] == "magnitude" else {}

    def _moving(self, param: Tensor, group: Group) -> TensorSpec | None:
        """Shape of what moves of a parameter, in the accumulator's dtype; None if nothing does."""
        shape = tuple(param.shape)
        if isinstance(group["mask"], list):
            indices = self._indices(param, group)
            if indices is None:
                return None
            shape = tuple(indices.shape)
        return TensorSpec(shape, accumulator_dtype(param.dtype))

    def _indices(self, param: Tensor, group: Group) -> Tensor | None:
        """The parameter's explicit indices in a group, which may be a saved one."""
        param = self._whole(param)
        for own in self.param_groups:
            for indices, candidate in zip(group["mask"], own["params"], strict=False):
                if candidate is param:
                    found: Tensor | None = indices
                    return found
        return None

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if isinstance(group["mask"], list):
            check_aligned(group["mask"], group["params"])

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        mask = group["mask"]
        if not (mask is None or isinstance(mask, list)):
            if not isinstance(mask, str):
                raise TypeError(
                    f"mask must be None, 'random', 'magnitude' or a dict of flat indices by "
                    f"parameter name, got {type(mask).__name__}"
                )
            check_choice("mask", mask, ("random", "magnitude"))
        check_number("density", group["density"], low=0.0, high=1.0, open_low=True)
        if mask == "random":
            NoiseKey(0, 0, density=float(group["density"]))
        elif mask != "magnitude" and group["density"] != 1.0:
            raise ValueError(
                f"density must be 1 unless mask is 'random' or 'magnitude', got "
                f"{group['density']!r} with mask={'indices' if mask is not None else None!r}"
            )
