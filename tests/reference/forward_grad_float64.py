"""Forward gradient descent in float64 (Baydin et al., 2022), importing no zoopt.

The directional derivative is exact, jvp(theta, tangent) from the caller: no loss is differenced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tests.reference.mezo_float64 import Array, Loss, Params
from tests.reference.spsa_float64 import Iid64


@dataclasses.dataclass(kw_only=True)
class ForwardGrad64(Iid64):
    """theta -= lr mean_j jvp_j z_j; `step` takes a loss as the other oracles do, and ignores it."""

    jvp: Callable[[Params, Params], float]
    zo_eps: float = dataclasses.field(default=0.0, init=False)
    one_sided: bool = dataclasses.field(default=False, init=False)

    def slopes(self, _loss: Loss, theta: Params, zs: Sequence[Params]) -> Array:
        return np.array([self.jvp(theta, z) for z in zs])
