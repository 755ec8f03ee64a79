"""ZO-SGD-Cons in float64 (Zhang et al., 2024, after Bergou et al., 2020), importing no zoopt.

With u = lr ghat, the best of theta, theta - u and theta + u, or of theta, theta - u and the points
already probed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.mezo_float64 import Loss, Params
from tests.reference.spsa_float64 import Iid64, shifted


@dataclasses.dataclass(kw_only=True)
class ZOConservativeSGD64(Iid64):
    """candidates: "three" or "reused", whose probes are one-sided. Ties go to the earlier one."""

    candidates: str = "three"

    def __post_init__(self) -> None:
        if self.candidates not in ("three", "reused"):
            raise ValueError(self.candidates)
        if self.candidates == "reused":
            self.one_sided = True

    def step(self, loss: Loss, theta: Params) -> Params:
        zs = self.directions(theta)
        ghat = self.estimate(self.projected_grads(loss, theta, zs), zs)
        points = [theta, shifted(theta, -self.lr, ghat)]
        if self.candidates == "three":
            points.append(shifted(theta, self.lr, ghat))
        else:
            points.extend(shifted(theta, self.zo_eps, z) for z in zs)
        losses = [loss(point) for point in points]
        kept = points[int(np.argmax(losses) if self.maximize else np.argmin(losses))]
        decay = 1 - self.lr * self.weight_decay
        return {name: decay * w for name, w in kept.items()}
