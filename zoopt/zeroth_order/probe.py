"""Probes: evaluate the closure around theta, and keep draws and projected gradients.

A direction z(draw) is worth the number

    two-sided   delta = [L(theta + zo_eps z) - L(theta - zo_eps z)] / 2
    one-sided   delta =  L(theta + zo_eps z) - L(theta)

and delta / zo_eps is its projected gradient, an estimate of <grad L, z>.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from zoopt.zeroth_order.closure import Closure, PinnedRNG
from zoopt.zeroth_order.perturbation import Perturbation, Slot

Estimator = Literal["two-sided", "one-sided"]


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step measured.

    Attributes:
        step: number of the step, from 1.
        draws: the directions.
        projected_grads: per direction, the projected gradient in the first param group's zo_eps,
            summed over micro-batches, clipped if the optimizer clips; NaN if it was skipped.
        losses: per micro-batch and direction, the two losses (at theta + zo_eps z first).
        skipped: how many evaluated pairs were left out because a loss was not finite.
    """

    step: int
    draws: tuple[int, ...]
    projected_grads: tuple[float, ...]
    losses: tuple[tuple[float, float], ...]
    skipped: int


@dataclasses.dataclass
class PendingProbe:
    """The directions of a step that has not been taken yet, and their sums over micro-batches."""

    slots: Sequence[Slot]
    draws: tuple[int, ...]
    deltas: list[float] = dataclasses.field(default_factory=list)
    finite: list[bool] = dataclasses.field(default_factory=list)
    losses: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    skipped: int = 0

    def __post_init__(self) -> None:
        self.deltas = [0.0] * len(self.draws)
        self.finite = [False] * len(self.draws)

    @property
    def kept(self) -> list[int]:
        """Positions of the directions that have been measured."""
        return [j for j, finite in enumerate(self.finite) if finite]

    def add(self, pairs: Sequence[tuple[float, float]], estimator: Estimator) -> None:
        """Add the losses of one micro-batch, a pair a direction."""
        half = 0.5 if estimator == "two-sided" else 1.0
        for j, (first, second) in enumerate(pairs):
            if math.isfinite(first) and math.isfinite(second):
                self.deltas[j] += half * (first - second)
                self.finite[j] = True
            else:
                self.skipped += 1
        self.losses += pairs


def evaluate(
    closure: Closure,
    perturbation: Perturbation,
    draws: Sequence[int],
    estimator: Estimator,
) -> list[tuple[float, float]]:
    """The pair of losses of each direction, all under the same torch RNG state.

    If the closure raises, parameters perturbed in place are back at theta, up to rounding, when
    its exception arrives.
    """
    slots = perturbation.slots
    rng = PinnedRNG(slot.param.device for slot in slots)

    def loss(draw: int, scale: float) -> float:
        with perturbation.at(draw, scale):
            return rng.evaluate(closure)

    try:
        if estimator == "one-sided":
            base = loss(draws[0], 0.0)
            return [(loss(draw, 1.0), base) for draw in draws]
        return [(loss(draw, 1.0), loss(draw, -1.0)) for draw in draws]
    except BaseException:
        perturbation.restore()
        raise
