"""Probes: evaluate the closure around theta, and keep draws and projected gradients.

A direction z(draw) is worth the number

    two-sided     delta = [L(theta + zo_eps z) - L(theta - zo_eps z)] / 2
    one-sided     delta =  L(theta + zo_eps z) - L(theta)
    three-point   as two-sided, with L(theta) for the curvature L+ + L- - 2 L0

and delta / zo_eps is its projected gradient, an estimate of <grad L, z>.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from torch import Tensor

from zoopt.warn import warn
from zoopt.zeroth_order.engine.closure import (
    CALLS_BACKWARD,
    Closure,
    Loss,
    PinnedRNG,
    RecordedLosses,
    loss_values,
)
from zoopt.zeroth_order.engine.perturbation import Perturbation
from zoopt.zeroth_order.engine.sites import Displacement, Sites, along

Estimator = Literal["two-sided", "one-sided"]

_Pending = TypeVar("_Pending", bound="PendingProbe")

#: Losses that differ by less, relative to their size, differ by rounding.
_SAME = 1e-4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the evaluations along one direction gave."""

    losses: tuple[float, ...]
    delta: float
    curvature: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether the direction can be used."""
        return all(map(math.isfinite, (*self.losses, self.delta, self.curvature)))


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step measured.

    Attributes:
        step: number of the step, from 1.
        draws: the directions.
        projected_grads: per direction, the projected gradient in the first param group's zo_eps,
            summed over micro-batches, clipped if the optimizer clips; NaN if it was skipped.
        losses: per micro-batch and direction, the losses (at theta + zo_eps z first).
        skipped: how many evaluated directions were left out because a loss was not finite.
    """

    step: int
    draws: tuple[int, ...]
    projected_grads: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    skipped: int


@dataclasses.dataclass
class PendingProbe:
    """The directions of a step that has not been taken yet, and their sums over micro-batches."""

    sites: Sites
    draws: tuple[int, ...]
    block: int | None = None
    deltas: list[float] = dataclasses.field(default_factory=list)
    curvatures: list[float] = dataclasses.field(default_factory=list)
    finite: list[bool] = dataclasses.field(default_factory=list)
    losses: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    skipped: int = 0

    def __post_init__(self) -> None:
        self.deltas = [0.0] * len(self.draws)
        self.curvatures = [0.0] * len(self.draws)
        self.finite = [False] * len(self.draws)

    def copy(self: _Pending) -> _Pending:
        """A copy to which losses can be added."""
        copied = copy.copy(self)
        for name in ("deltas", "curvatures", "finite", "losses"):
            setattr(copied, name, list(getattr(self, name)))
        return copied

    @property
    def kept(self) -> list[int]:
        """Positions of the directions that have been measured."""
        return [j for j, finite in enumerate(self.finite) if finite]

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Add one micro-batch, a outcome a direction."""
        for j, outcome in enumerate(outcomes):
            if outcome.finite:
                self.deltas[j] += outcome.delta
                self.curvatures[j] += outcome.curvature
                self.finite[j] = True
            else:
                self.skipped += 1
            self.losses.append(outcome.losses)


class Evaluation:
    """The user's closure at points around theta, each time under the same random state.

    If the closure raises, parameters perturbed in place are back at theta, up to rounding, when
    its exception arrives.

    Args:
        closure, perturbation: what is evaluated, and how parameters move.
        params: all of the optimizer's; the closure may leave no gradients at them.
        verify: evaluate the first point twice, and warn if the losses are not the same.
    """

    def __init__(
        self,
        closure: Closure,
        perturbation: Perturbation,
        params: Iterable[Tensor],
        *,
        verify: bool,
    ) -> None:
        self.closure = closure
        self.perturbation = perturbation
        perturbation.evaluated = not isinstance(closure, RecordedLosses)
        self.verify = verify
        self.rng = PinnedRNG(perturbation.sites.devices, draws=perturbation.evaluated)
        self._without_grad = [param for param in params if param.grad is None]
        self._checked = False

    def losses_at(self, displacements: Sequence[Displacement]) -> list[float]:
        """The losses at theta plus each displacement, in order."""
        return self.read([self.queue(displacement) for displacement in displacements])

    def read(self, losses: Sequence[Loss]) -> list[float]:
        """Losses as floats; a device that some are still on is waited for once."""
        return loss_values(losses)

    def queue(self, displacement: Displacement) -> Loss:
        """The loss at theta plus the displacement, which may still be on its device."""
        try:
            with self.perturbation.at(displacement):
                loss = self.rng.evaluate(self.closure)
                if self.verify:
                    again = self.rng.evaluate(self.closure)
                    self._compare(*loss_values([loss, again]))
            # Outside, where no operator is intercepted: that would take a microsecond a parameter.
            self._refuse_gradients()
            return loss
        except BaseException:
            self.perturbation.restore()
            raise

    def _refuse_gradients(self) -> None:
        """Raise if the closure has left gradients behind, once they have been removed."""
        if self._checked:
            return
        self._checked = True
        fresh = [param for param in self._without_grad if param.grad is not None]
        for param in fresh:
            param.grad = None
        if fresh:
            raise RuntimeError(CALLS_BACKWARD)

    def _compare(self, loss: float, again: float) -> None:
        """Warn unless two evaluations at one point agree, up to the order of a device's sums."""
        self.verify = False
        if not agree(loss, again):
            warn(
                f"the closure must compute the same function each time, got {loss!r} and then "
                f"{again!r} at the same parameters: the estimate will be mostly noise; draw the "
                f"batch outside the closure, and make its random choices with torch's generator"
            )

    def losses_along(self, *places: tuple[int, float]) -> list[float]:
        """The losses at theta + scale zo_eps z(draw) for each (draw, scale), in order."""
        return self.losses_at([along(draw, scale) for draw, scale in places])

    def each(
        self, count: int, width: int, evaluate: Callable[[int], Sequence[Loss]]
    ) -> list[list[float]]:
        """What `evaluate` returns for each number below `count`, `width` numbers, as floats."""
        values = self.read([value for number in range(count) for value in evaluate(number)])
        return [values[i : i + width] for i in range(0, len(values), width)]


def agree(loss: float, other: float) -> bool:
    """Whether two losses differ by rounding at most."""
    return not abs(loss - other) > _SAME * max(abs(loss), abs(other))


def two_sided(evaluation: Evaluation, draws: Sequence[int]) -> list[Outcome]:
    """Two evaluations a direction."""
    losses = evaluation.losses_along(*((draw, scale) for draw in draws for scale in (1.0, -1.0)))
    pairs = zip(losses[::2], losses[1::2], strict=True)
    return [Outcome((plus, minus), 0.5 * (plus - minus)) for plus, minus in pairs]


def one_sided(evaluation: Evaluation, draws: Sequence[int]) -> list[Outcome]:
    """One evaluation a direction, and one at theta for all."""
    base, *losses = evaluation.losses_along((draws[0], 0.0), *((draw, 1.0) for draw in draws))
    return [Outcome((plus, base), plus - base) for plus in losses]


def three_point(evaluation: Evaluation, draws: Sequence[int]) -> list[Outcome]:
    """Two evaluations a direction, and one at theta for all."""
    around = ((draw, scale) for draw in draws for scale in (1.0, -1.0))
    base, *losses = evaluation.losses_along((draws[0], 0.0), *around)
    return [
        Outcome((plus, minus, base), 0.5 * (plus - minus), plus + minus - 2.0 * base)
        for plus, minus in zip(losses[::2], losses[1::2], strict=True)
    ]


def mean_loss(losses: Sequence[Sequence[float]]) -> float:
    """The mean over directions of the mean of each one's losses."""
    return sum(sum(each) / len(each) for each in losses) / len(losses)
