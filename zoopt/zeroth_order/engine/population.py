"""Populations: their members' fitnesses, and the weights that these give in the update."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from zoopt.zeroth_order.engine.closure import check_value, narrow_eps, real
from zoopt.zeroth_order.engine.probe import Outcome, PendingProbe, StepRecord

Shaping = Literal["zscore", "rank", "pair-sign"]


@dataclasses.dataclass(frozen=True)
class GenerationRecord(StepRecord):
    """What one step of `EvolutionStrategy` measured.

    Attributes:
        step: number of the step, from 1.
        draws: the directions; an antithetic pair has one.
        projected_grads: per direction, its coefficient in (1/N) sum_i rhat_i z_i.
        losses: per micro-batch and member, the returned fitness.
        skipped: how many members were left out because their fitness was not finite.
        fitness: per member, the sum of its fitnesses over micro-batches.
        shaped: per member, rhat.
    """

    fitness: tuple[float, ...]
    shaped: tuple[float, ...]


@dataclasses.dataclass
class Population(PendingProbe):
    """A generation: draws and signs have an entry for each member, and deltas are fitnesses.

    Attributes:
        shaped: each member's rhat, once the step is taken.
        coefficients: draw -> its coefficient in (1/N) sum_i rhat_i z_i, likewise.
    """

    signs: tuple[float, ...] = ()
    shaped: tuple[float, ...] = ()
    coefficients: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Add one micro-batch; a member whose fitness was not finite in any of them is left out."""
        for i, outcome in enumerate(outcomes):
            self.deltas[i] += outcome.delta
            self.finite[i] = math.isfinite(self.deltas[i])
            self.losses.append(outcome.losses)
        self.skipped = self.finite.count(False)

    @property
    def size(self) -> int:
        """How many members there are."""
        return len(self.draws)

    def place(self, member: int) -> tuple[int, float]:
        """The member's draw, and the sign of its displacement along it."""
        return self.draws[member], self.signs[member]

    def chosen(self, members: Iterable[int] | None) -> list[int]:
        """The requested members' numbers; None is all of them.

        Raises:
            TypeError, ValueError: a number that no member has, or one that occurs twice.
        """
        if members is None:
            return list(range(self.size))
        try:
            chosen = [operator.index(i) for i in members]
        except TypeError:
            raise TypeError(
                f"members must be the numbers of members, range({self.size}) for all, got "
                f"{members!r}"
            ) from None
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(self.size)):
            raise ValueError(
                f"members must be distinct numbers in [0, {self.size}), the population, got "
                f"{chosen}"
            )
        return chosen

    def record(self, step: int) -> GenerationRecord:
        """The measurements of the generation."""
        return GenerationRecord(
            step=step,
            draws=tuple(self.coefficients),
            projected_grads=tuple(self.coefficients.values()),
            losses=tuple(self.losses),
            skipped=self.skipped,
            fitness=tuple(self.deltas),
            shaped=self.shaped,
        )


def shaped(fitness: Sequence[float], shaping: Shaping) -> tuple[float, ...]:
    """A weight for each member: they sum to 0, and negating all fitnesses negates them.

    Args:
        fitness: one number for each member. Members whose fitness is not finite weigh 0, and the
            others are shaped without them.
        shaping: `"zscore"`: less the mean, over the standard deviation (with N); `"rank"`: ranks,
            equal ones sharing theirs, spread over [-1/2, 1/2]; `"pair-sign"`: in each pair of
            members 2k and 2k + 1, 1 for the better one and -1 for the other, 0 for both if they
            are equal or one is not finite.
    """
    if shaping == "pair-sign":
        return _pair_signs(fitness)
    rule: Callable[[list[float]], list[float]] = _zscores if shaping == "zscore" else _ranks
    finite = [i for i, value in enumerate(fitness) if math.isfinite(value)]
    weights = [0.0] * len(fitness)
    values = [fitness[i] for i in finite]
    if values and min(values) < max(values):
        for i, weight in zip(finite, rule(values), strict=True):
            weights[i] = weight
    return tuple(weights)


def _zscores(fitness: list[float]) -> list[float]:
    # Divided by the largest, so that no square overflows.
    largest = max(map(abs, fitness))
    values = [value / largest for value in fitness]
    mean = math.fsum(values) / len(values)
    deviations = [value - mean for value in values]
    spread = math.sqrt(math.fsum(d * d for d in deviations) / len(values))
    return [d / spread if spread else 0.0 for d in deviations]


def _ranks(fitness: list[float]) -> list[float]:
    order = sorted(range(len(fitness)), key=lambda i: fitness[i])
    weights = [0.0] * len(fitness)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and fitness[order[end]] == fitness[order[start]]:
            end += 1
        for i in order[start:end]:
            # The mean of the ranks start ... end - 1, of 0 ... N - 1.
            weights[i] = 0.5 * (start + end - 1) / (len(order) - 1) - 0.5
        start = end
    return weights


def _pair_signs(fitness: Sequence[float]) -> tuple[float, ...]:
    weights: list[float] = []
    for plus, minus in zip(fitness[0::2], fitness[1::2], strict=True):
        both = math.isfinite(plus) and math.isfinite(minus)
        sign = float((plus > minus) - (plus < minus)) if both else 0.0
        weights += [sign, -sign]
    return tuple(weights)


def fitness_values(fitness: Mapping[int, Any] | Sequence[Any] | Tensor, size: int) -> list[float]:
    """The fitnesses in the order of the members.

    Raises:
        TypeError, ValueError: not exactly one number a member.
    """
    if isinstance(fitness, Tensor):
        check_value("fitness must be a tensor", fitness)
        fitness = fitness.tolist()
    if isinstance(fitness, str) or not isinstance(fitness, Mapping | Sequence):
        raise TypeError(
            f"fitness must be a mapping from members to fitnesses, or a sequence of fitnesses in "
            f"the order of the members, got {type(fitness).__name__}"
        )
    values = fitness if isinstance(fitness, Mapping) else dict(enumerate(fitness))
    missing = [i for i in range(size) if i not in values]
    unknown = [i for i in values if i not in range(size)]
    if missing or unknown:
        wrong = [f"none for {_some(missing)}"] if missing else []
        wrong += [f"some for {_some(unknown)}"] if unknown else []
        raise ValueError(
            f"fitness must have a value for each member, 0 to {size - 1}, and no others, got "
            f"{' and '.join(wrong)}; gather what all the calls of evaluate returned"
        )
    return [_number(values[i], i) for i in range(size)]


def fitness_eps(fitness: Any) -> float:
    """The relative spacing of fitnesses of which some have 16 bits; otherwise 0."""
    if isinstance(fitness, Tensor):
        return narrow_eps(fitness)
    values = fitness.values() if isinstance(fitness, Mapping) else fitness
    return max(map(narrow_eps, values), default=0.0)


def _number(value: Any, member: int) -> float:
    if isinstance(value, Tensor):
        check_value(f"fitness[{member}] must be one", value)
    scalar = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(scalar, Real):
        raise TypeError(f"fitness[{member}] must be one real number, got {value!r}")
    return real(scalar)


def _some(numbers: Sequence[Any]) -> str:
    return ", ".join(map(repr, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
