"""Sparse directions: methods whose directions have independent elements, all of them or some."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zoopt.checks import check_choice, check_number
from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.noise.key import NoiseKey
from zoopt.optimizer import Group, TensorSpec
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.direction import (
    Coefficients,
    Direction,
    Elementwise,
    Noise,
    chunks,
    withdrawn,
)
from zoopt.zeroth_order.engine.mask import (
    Indexed,
    SmallMagnitudes,
    aligned_indices,
    check_aligned,
    magnitude_threshold,
)
from zoopt.zeroth_order.engine.perturbation import Site
from zoopt.zeroth_order.engine.probe import PendingProbe
from zoopt.zeroth_order.engine.progress import Progress


class SparseZerothOrder(ZerothOrderOptimizer):
    """Directions whose elements are independent, on all elements of a parameter or on some.

    Group keys: `mask` (None, "random", "magnitude", or indices in the order of the parameters)
    and `density`.
    """

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
            return None if indices is None else Indexed(key, indices.to(param.device).long())
        if group["mask"] == "magnitude":
            threshold = self._state(param, group)["threshold"]
            mask = None if virtual else (param.detach().abs() <= threshold).flatten()
            return SmallMagnitudes(key, threshold, mask)
        return Noise(key)

    def _update_elements(
        self,
        site: Site,
        pending: PendingProbe,
        offset: Coefficients,
        progress: Progress,
        rule: Callable[[Tensor, slice], Tensor],
    ) -> None:
        """theta <- decay (theta - offset) + rule(estimate), chunk by chunk, rounded once.

        Args:
            rule: the gradient estimate of a chunk (flat, in the accumulator's dtype) and the
                chunk's place among the moving elements -> the update. New values of state go to
                `progress.hold`.
        """
        group, direction = site.group, site.direction
        assert isinstance(direction, Elementwise)
        decay, weights = self._decay(group, pending), self._weights(group, pending)
        back = withdrawn(offset, decay)
        with direction.elements(site.param, progress) as elements:
            for chunk in chunks(elements, progress):
                theta = elements[chunk]
                direction.write_(
                    theta,
                    back,
                    rule(direction.combine(theta, weights, chunk.start), chunk),
                    chunk.start,
                    decay=decay,
                    rounding=site.rounding,
                    rounding_draw=pending.draws[-1],
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
