"""HiZOO in float64 (Zhao et al., 2024), importing no zoopt.

Probes and steps along d = z / sqrt(H); H <- (1 - a) H + a |L+ + L- - 2 L0| / (2 eps^2) H z^2, with
the H of the probes in the step and on the right.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.mezo_float64 import Array, Loss, Params
from tests.reference.spsa_float64 import Iid64


@dataclasses.dataclass(kw_only=True)
class HiZOO64(Iid64):
    """hessian_smooth is a. Under a mask, z is mask * z in both formulas."""

    hessian_smooth: float = 1e-8
    one_sided: bool = dataclasses.field(default=False, init=False)
    h: Params = dataclasses.field(default_factory=dict)

    def direction(self, name: str, w: Array, draw: int) -> Array:
        return super().direction(name, w, draw) / np.sqrt(self.h[name])

    def step(self, loss: Loss, theta: Params) -> Params:
        for name, w in theta.items():
            self.h.setdefault(name, np.ones_like(w))
        ds = self.directions(theta)
        ghat = self.estimate(self.projected_grads(loss, theta, ds), ds)
        sides = self.losses(loss, theta, ds) + self.losses(loss, theta, ds, -1.0)
        curvature = np.abs(sides - 2 * loss(theta)) / (2 * self.zo_eps**2)
        a = self.hessian_smooth
        for name, h in self.h.items():
            z = [np.sqrt(h) * d[name] for d in ds]
            seen = sum(c * h * z_j**2 for c, z_j in zip(curvature, z, strict=True)) / len(ds)
            self.h[name] = (1 - a) * h + a * seen
        return self.updated(theta, ghat)
