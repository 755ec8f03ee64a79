"""An evolution strategy on integer codes, the rounding error carried, in float64 numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Array = np.ndarray


@dataclasses.dataclass
class QES64:
    """`past` holds the last `window` steps' changes before they are rounded."""

    lr: float
    sigma: float
    levels: int
    window: int
    past: list[Array] = dataclasses.field(default_factory=list)

    def step(self, loss: Callable[[Array], float], codes: Array, zs: list[Array]) -> Array:
        """The codes after a step along the directions zs."""
        change = np.zeros_like(codes)
        for z in zs:
            g = (loss(codes + self.sigma * z) - loss(codes - self.sigma * z)) / (2 * self.sigma)
            change -= self.lr * g * z / len(zs)
        self.past = [*self.past, change][-self.window :]
        error = np.zeros_like(codes)
        for u in self.past:
            whole = np.round(u + error)
            error = u + error - whole
        return np.clip(codes + whole, 0, self.levels - 1)
