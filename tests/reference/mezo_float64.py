"""MeZO in float64, from the paper (Malladi et al., 2023, algorithms 1 and 2), importing no zoopt.

The directions come from the caller: z(name, draw) -> float64 array of the parameter's shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Params = dict[str, Array]
Loss = Callable[[Params], float]
Directions = Callable[[str, int], Array]


@dataclasses.dataclass
class MeZO64:
    """n-SPSA with SGD, momentum (torch's convention) and decoupled weight decay."""

    z: Directions
    lr: float
    zo_eps: float
    momentum: float = 0.0
    momentum_window: int | None = None
    weight_decay: float = 0.0
    num_probes: int = 1
    one_sided: bool = False
    max_projected_grad: float | None = None
    maximize: bool = False
    draw: int = 0
    history: list[Params] = dataclasses.field(default_factory=list)

    def perturbed(self, theta: Params, scale: float, draw: int) -> Params:
        return {name: w + scale * self.zo_eps * self.z(name, draw) for name, w in theta.items()}

    def projected_grad(self, loss: Loss, theta: Params, draw: int) -> float:
        plus = loss(self.perturbed(theta, 1.0, draw))
        if self.one_sided:
            g = (plus - loss(theta)) / self.zo_eps
        else:
            g = (plus - loss(self.perturbed(theta, -1.0, draw))) / (2 * self.zo_eps)
        if self.max_projected_grad is not None:
            g = float(np.clip(g, -self.max_projected_grad, self.max_projected_grad))
        return g

    def step(self, loss: Loss, theta: Params) -> Params:
        draws = range(self.draw, self.draw + self.num_probes)
        grads = [self.projected_grad(loss, theta, draw) for draw in draws]
        self.draw += self.num_probes
        sign = -1.0 if self.maximize else 1.0
        estimate = {
            name: sign
            * sum(g * self.z(name, d) for g, d in zip(grads, draws, strict=True))
            / self.num_probes
            for name in theta
        }
        self.history.append(estimate)
        h = len(self.history) if self.momentum_window is None else self.momentum_window
        recent = self.history[-h:][::-1]
        buffer = {
            name: sum(self.momentum**i * past[name] for i, past in enumerate(recent))
            for name in theta
        }
        decay = 1 - self.lr * self.weight_decay
        return {name: decay * w - self.lr * buffer[name] for name, w in theta.items()}
