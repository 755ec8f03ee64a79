"""Zeroth-order Adam in float64: Adam (Kingma & Ba, 2015) on the estimate ghat, importing no zoopt.

Its moments are stored (dense), rebuilt from the last `window` estimates (Malladi et al., 2023,
appendix B.2; AdaMeZO, Cai et al., 2026), or one number for all parameters, the average of the
projected gradients' squares (scalar: MEAZO, Dbouk et al., 2026).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.mezo_float64 import Loss, Params
from tests.reference.spsa_float64 import Iid64


@dataclasses.dataclass(kw_only=True)
class ZOAdam64(Iid64):
    """state: "dense", "window" or "scalar"; window is h, which only the second one reads."""

    state: str = "dense"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    window: int = 10
    steps: int = 0
    m: Params = dataclasses.field(default_factory=dict)
    v: Params = dataclasses.field(default_factory=dict)
    scalar: float = 0.0
    history: list[Params] = dataclasses.field(default_factory=list)

    def dense(self, ghat: Params) -> Params:
        b1, b2 = self.betas
        for name, g in ghat.items():
            self.m[name] = b1 * self.m.get(name, 0.0) + (1 - b1) * g
            self.v[name] = b2 * self.v.get(name, 0.0) + (1 - b2) * g**2
        c1, c2 = 1 - b1**self.steps, 1 - b2**self.steps
        return {k: self.m[k] / c1 / (np.sqrt(self.v[k] / c2) + self.eps) for k in ghat}

    def windowed(self, ghat: Params) -> Params:
        b1, b2 = self.betas
        self.history = [ghat, *self.history][: self.window]
        h = len(self.history)
        update = {}
        for name in ghat:
            past = [old[name] for old in self.history]
            m = sum((1 - b1) * b1**i * g for i, g in enumerate(past)) / (1 - b1**h)
            v = sum((1 - b2) * b2**i * g**2 for i, g in enumerate(past)) / (1 - b2**h)
            update[name] = m / (np.sqrt(v) + self.eps)
        return update

    def step(self, loss: Loss, theta: Params) -> Params:
        zs = self.directions(theta)
        grads = self.projected_grads(loss, theta, zs)
        ghat = self.estimate(grads, zs)
        self.steps += 1
        if self.state == "dense":
            return self.updated(theta, self.dense(ghat))
        if self.state == "window":
            return self.updated(theta, self.windowed(ghat))
        if self.state == "scalar":
            b2 = self.betas[1]
            self.scalar = b2 * self.scalar + (1 - b2) * float(np.mean(grads**2))
            scale = np.sqrt(self.scalar / (1 - b2**self.steps)) + self.eps
            return self.updated(theta, {name: g / scale for name, g in ghat.items()})
        raise ValueError(self.state)
