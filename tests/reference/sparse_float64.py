"""Sparse MeZO in float64 (Liu et al., 2024): only small weights move, importing no zoopt."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from tests.reference.mezo_float64 import Array, Loss, Params
from tests.reference.spsa_float64 import Iid64


@dataclasses.dataclass(kw_only=True)
class SparseMeZO64(Iid64):
    """|theta| at or below the ceil(density numel)-th smallest magnitude of the initial theta."""

    density: float
    thresholds: dict[str, float] = dataclasses.field(default_factory=dict)

    def direction(self, name: str, w: Array, draw: int) -> Array:
        return super().direction(name, w, draw) * (np.abs(w) <= self.thresholds[name])

    def step(self, loss: Loss, theta: Params) -> Params:
        if not self.thresholds:
            for name, w in theta.items():
                smallest = np.sort(np.abs(w).ravel())
                self.thresholds[name] = smallest[math.ceil(self.density * w.size) - 1]
        return super().step(loss, theta)
