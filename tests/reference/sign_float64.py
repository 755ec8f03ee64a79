"""ZO-SGD-Sign in float64 (Liu et al., 2019; Zhang et al., 2024), importing no zoopt.

The step is the sign of the estimate, or, as in the latter's released code, the estimate made of the
projected gradients' signs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.mezo_float64 import Loss, Params
from tests.reference.spsa_float64 import Iid64


@dataclasses.dataclass(kw_only=True)
class ZOSignSGD64(Iid64):
    """sign: "elementwise", sign(ghat), or "projected", mean_j sign(g_j) z_j."""

    sign: str = "elementwise"

    def step(self, loss: Loss, theta: Params) -> Params:
        zs = self.directions(theta)
        grads = self.projected_grads(loss, theta, zs)
        if self.sign == "projected":
            return self.updated(theta, self.estimate(np.sign(grads), zs))
        if self.sign == "elementwise":
            ghat = self.estimate(grads, zs)
            return self.updated(theta, {name: np.sign(g) for name, g in ghat.items()})
        raise ValueError(self.sign)
