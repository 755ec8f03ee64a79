"""FZOO in float64 (Dang et al., 2025), importing no zoopt.

N one-sided probes along signs; theta -= lr sum_i (L_i - L_0) z_i / (N std_i(L_i)). The deviation is
the sample's (ddof 1) in the paper, the population's (ddof 0) in the released code.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.mezo_float64 import Loss, Params
from tests.reference.spsa_float64 import Iid64


@dataclasses.dataclass(kw_only=True)
class FZOO64(Iid64):
    """z is the caller's signs. Equal losses, whose deviation is 0, give no update."""

    num_probes: int = 8
    ddof: int = 1
    one_sided: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.num_probes < 2:
            raise ValueError("the deviation of a single loss is 0 or undefined")

    def step(self, loss: Loss, theta: Params) -> Params:
        zs = self.directions(theta)
        losses = self.losses(loss, theta, zs)
        if losses.max() == losses.min():
            return self.updated(theta, {name: np.zeros_like(w) for name, w in theta.items()})
        std = losses.std(ddof=self.ddof)
        ghat = self.estimate(self.projected_grads(loss, theta, zs), zs)
        return self.updated(theta, {name: self.zo_eps * g / std for name, g in ghat.items()})
