"""What the float64 oracles share: SPSA (Spall, 1992; Malladi et al., 2023), importing no zoopt.

g_j = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps), or (L(theta + eps z_j) - L(theta)) / eps,
and the estimate mean_j g_j z_j, its sign flipped to maximize. A step's draws are draw, ..., draw +
num_probes - 1. The random numbers come from the caller: z(name, draw) -> array of the parameter's
shape, or normals(name, draw, start, count), a slice of the sequence of (name, draw).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tests.reference.mezo_float64 import Array, Directions, Loss, Params

Normals = Callable[[str, int, int, int], Array]
Masks = Callable[[str, int], Array]


def shifted(theta: Params, scale: float, z: Params) -> Params:
    return {name: w + scale * z[name] for name, w in theta.items()}


@dataclasses.dataclass(kw_only=True)
class SPSA64:
    """n-SPSA with SGD; subclasses say what the directions are, and what is made of the estimate."""

    lr: float
    zo_eps: float
    weight_decay: float = 0.0
    num_probes: int = 1
    one_sided: bool = False
    max_projected_grad: float | None = None
    maximize: bool = False
    mask: Masks | None = None
    draw: int = 0

    def direction(self, name: str, w: Array, draw: int) -> Array:
        raise NotImplementedError

    def directions(self, theta: Params) -> list[Params]:
        """mask * z of this step's draws, which are then spent."""
        draws = range(self.draw, self.draw + self.num_probes)
        self.draw += self.num_probes
        zs = [{name: self.direction(name, w, d) for name, w in theta.items()} for d in draws]
        if self.mask is not None:
            for d, z in zip(draws, zs, strict=True):
                z.update({name: self.mask(name, d) * z[name] for name in z})
        return zs

    def losses(self, loss: Loss, theta: Params, zs: Sequence[Params], side: float = 1.0) -> Array:
        return np.array([loss(shifted(theta, side * self.zo_eps, z)) for z in zs])

    def slopes(self, loss: Loss, theta: Params, zs: Sequence[Params]) -> Array:
        plus = self.losses(loss, theta, zs)
        if self.one_sided:
            return (plus - loss(theta)) / self.zo_eps
        return (plus - self.losses(loss, theta, zs, -1.0)) / (2 * self.zo_eps)

    def projected_grads(self, loss: Loss, theta: Params, zs: Sequence[Params]) -> Array:
        grads = self.slopes(loss, theta, zs)
        bound = self.max_projected_grad
        return grads if bound is None else np.clip(grads, -bound, bound)

    def mean(self, coefficients: Array, arrays: Sequence[Array]) -> Array:
        """mean_j c_j a_j, with the sign that makes subtracting it a step the right way."""
        sign = -1.0 if self.maximize else 1.0
        return sign * sum(c * a for c, a in zip(coefficients, arrays, strict=True)) / len(arrays)

    def estimate(self, grads: Array, zs: Sequence[Params]) -> Params:
        return {name: self.mean(grads, [z[name] for z in zs]) for name in zs[0]}

    def updated(self, theta: Params, update: Params) -> Params:
        decay = 1 - self.lr * self.weight_decay
        return {name: decay * w - self.lr * update[name] for name, w in theta.items()}

    def step(self, loss: Loss, theta: Params) -> Params:
        zs = self.directions(theta)
        return self.updated(theta, self.estimate(self.projected_grads(loss, theta, zs), zs))


@dataclasses.dataclass(kw_only=True)
class Iid64(SPSA64):
    """Every parameter's direction is the caller's z."""

    z: Directions

    def direction(self, name: str, w: Array, draw: int) -> Array:
        return self.z(name, draw).reshape(w.shape)
