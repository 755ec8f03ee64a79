"""The memory of one method, and how far batches and sequences can grow in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from zoopt.memory.meter import Category


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The memory of one method.

    Attributes:
        name, kind: the method's.
        peak: bytes at the step's highest point.
        categories: these bytes by category.
        phases: the peak of each phase of the step.
        state: bytes of optimizer state between steps.
        per_example: bytes that one more example adds to the peak of a phase.
        per_token: what tokens in every example add to it: the coefficients of their number and of
            its square.
    """

    name: str
    kind: str
    peak: int
    categories: dict[Category, int]
    phases: dict[str, int]
    state: int
    per_example: dict[str, int]
    per_token: dict[str, tuple[float, float]]

    def fits(self, budget: int) -> bool:
        """Whether the peak is within the budget, in bytes."""
        return self.peak <= budget

    def largest_batch(self, budget: int, batch: int) -> int:
        """The largest batch that fits a budget in bytes, or 0; peaks grow in proportion."""
        growth = {phase: (float(slope), 0.0) for phase, slope in self.per_example.items()}
        return self._largest(growth, budget, batch)

    def largest_seq(self, budget: int, seq: int) -> int:
        """The longest sequence that fits a budget in bytes, or 0."""
        return self._largest(self.per_token, budget, seq)

    def _largest(self, growth: dict[str, tuple[float, float]], budget: int, size: int) -> int:
        """The largest size at which no phase exceeds the budget."""

        def fits(other: int) -> bool:
            for phase, peak in self.phases.items():
                linear, square = growth.get(phase, (0.0, 0.0))
                grown = linear * (other - size) + square * (other * other - size * size)
                if peak + grown > budget:
                    return False
            return True

        low, high = 0, 1 << 30
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low


def parabola(sizes: Sequence[int], values: Sequence[int]) -> tuple[float, float]:
    """The coefficients of s and of s^2 through three points; (0, 0) if two of them coincide."""
    (a, b, c), (x, y, z) = sizes, values
    if len({a, b, c}) < 3:
        return 0.0, 0.0
    first, second = (x - y) / (a - b), (y - z) / (b - c)
    square = max(0.0, (first - second) / (a - c))
    return first - square * (a + b), square
