"""ConMeZO in float64 (Behric et al., 2025), importing no zoopt.

Probes in a cone about the momentum m: z = cos t sqrt(d) m / ||m|| + sin t u, u i.i.d., d the number
and ||.|| the norm of all parameters' elements; z = u while m is 0. theta -= lr ghat, then
m <- b m + (1 - b) ghat, b warmed up from beta_start to beta.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.mezo_float64 import Array, Loss, Params
from tests.reference.spsa_float64 import Iid64


@dataclasses.dataclass(kw_only=True)
class ConMeZO64(Iid64):
    """A mask is applied to the whole z."""

    cone_angle: float = 1.35
    beta: float = 0.95
    beta_start: float = 0.1
    warmup_steps: int = 0
    steps: int = 0
    m: Params = dataclasses.field(default_factory=dict)

    def direction(self, name: str, w: Array, draw: int) -> Array:
        u = super().direction(name, w, draw)
        norm = np.sqrt(sum((m**2).sum() for m in self.m.values()))
        if norm == 0:
            return u
        d = sum(m.size for m in self.m.values())
        axis = np.sqrt(d) * self.m[name] / norm
        return np.cos(self.cone_angle) * axis + np.sin(self.cone_angle) * u

    def step(self, loss: Loss, theta: Params) -> Params:
        zs = self.directions(theta)
        ghat = self.estimate(self.projected_grads(loss, theta, zs), zs)
        warm = min(1.0, self.steps / self.warmup_steps) if self.warmup_steps else 1.0
        b = self.beta_start + (self.beta - self.beta_start) * warm
        self.m = {name: b * self.m.get(name, 0.0) + (1 - b) * g for name, g in ghat.items()}
        self.steps += 1
        return self.updated(theta, ghat)
