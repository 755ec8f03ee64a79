"""What the methods that descend along the estimate itself share: sparse directions and momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zoopt.checks import check_choice, check_number, check_positive_int, shown
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

#: Past steps of a group, oldest first: the block that was due, and the (draw, weight) pairs.
Window = tuple[tuple[int | None, tuple[tuple[int, float], ...]], ...]


class SparseZerothOrder(ZerothOrderOptimizer):
    """Directions whose elements are independent, on all elements of a parameter or on some.

    Group keys: `mask` (None, "random", "magnitude", or indices in the order of the parameters)
    and `density`.
    """

    def _adopt(self, group: Group) -> None:
        """Indices by name go into the order of the parameters."""
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
                chunk's place among what moves -> what theta receives. State that it changes goes
                to `progress.hold`.
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
        """The parameter's explicit indices under a group, which may be a saved one."""
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


class MomentumSGD(SparseZerothOrder):
    """theta <- decay theta - lr buf, buf <- momentum buf + sum_j weight_j z_j.

    Group keys: `momentum` and `momentum_window` (None: buf is stored; h: rebuilt from the last h
    steps' directions).
    """

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """`momentum_buffer` if it is stored, in the accumulator's dtype; a mask's `threshold`."""
        declared = super().declared_state(param, group)
        moving = self._moving(param, group)
        if moving is not None and _stores_buffer(group):
            declared["momentum_buffer"] = moving
        return declared

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_past("window", group["window"])

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_number("momentum", group["momentum"], low=0.0, high=1.0, open_high=True)
        check_window("momentum_window", group)
        if group["momentum_window"] is not None and not group["momentum"]:
            raise ValueError(
                f"momentum_window must be None without momentum, got "
                f"{group['momentum_window']!r}; set momentum, 0.9 say"
            )

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group, direction = site.group, site.direction
        if not pending.kept:
            self._descend(site, pending, offset, {}, progress)
        elif _stores_buffer(group):
            assert isinstance(direction, Elementwise)
            decay = self._decay(group, pending)
            direction.momentum_(
                site.param,
                self._state(site.param, group)["momentum_buffer"],
                withdrawn(offset, decay),
                self._weights(group, pending),
                momentum=float(group["momentum"]),
                step_size=-float(group["lr"]),
                decay=decay,
                rounding=site.rounding,
                progress=progress,
            )
        else:
            present = self._weights(group, pending)
            steps = window_steps(group["window"], pending.block, present, _length(group))
            momentum = float(group["momentum"])
            weights: dict[int, float] = {}
            for age, step in enumerate(reversed(steps)):
                weights |= {draw: momentum**age * weight for draw, weight in step}
            self._descend(site, pending, offset, weights, progress)

    def _closing(self, group: Group, pending: PendingProbe) -> dict[str, Any]:
        if group["momentum_window"] is None:
            return {}
        weights = self._weights(group, pending)
        return {"window": extended(group["window"], pending.block, weights, _length(group))}


def check_window(name: str, group: Group) -> None:
    """Raise unless the window's length is None or a positive int that goes with the mask."""
    if group[name] is None:
        return
    check_positive_int(name, group[name])
    if group["mask"] == "magnitude":
        raise ValueError(
            f"{name} must be None with mask='magnitude', got {group[name]!r}: past directions "
            f"cannot be rebuilt when the mask follows the weights; use mask='random'"
        )


def check_past(name: str, value: Any) -> None:
    """Raise unless the value is past steps, as `Window` has them."""
    steps = value if isinstance(value, tuple | list) else [None]
    for step in steps:
        if not (
            isinstance(step, tuple | list)
            and len(step) == 2
            and (step[0] is None or type(step[0]) is int)
            and isinstance(step[1], tuple | list)
            and all(map(_is_past_direction, step[1]))
        ):
            raise ValueError(
                f"{name} must be past steps, (block, ((draw, weight), ...)) each, got "
                f"{shown(value)}; load a checkpoint that is not damaged"
            )


def _is_past_direction(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and list(map(type, value)) == [int, float]
        and 0 <= value[0] < 1 << 32
        and math.isfinite(value[1])
    )


def window_steps(
    window: Window, block: int | None, weights: Mapping[int, float], length: int
) -> list[tuple[tuple[int, float], ...]]:
    """The block's last `length` steps, the present one included, oldest first."""
    past = [pairs for visited, pairs in window if visited == block]
    return [*past, tuple(weights.items())][-length:]


def extended(
    window: Window, block: int | None, weights: Mapping[int, float], length: int
) -> Window:
    """The window with the present step in it, no more than `length` steps of its block."""
    steps = [*window, (block, tuple(weights.items()))]
    own = [i for i, (visited, _) in enumerate(steps) if visited == block]
    dropped = set(own[: max(0, len(own) - length)])
    return tuple(step for i, step in enumerate(steps) if i not in dropped)


def _length(group: Group) -> int:
    return group["momentum_window"] or 1


def _stores_buffer(group: Group) -> bool:
    return bool(group["momentum"]) and group["momentum_window"] is None
