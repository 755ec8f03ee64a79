"""SM3-I and SM3-II (Anil et al., 2019, algorithms 1 and 2), in float64 numpy.

The cover is theta's slices: for each axis, a set for each index along it. Written set by set, as
published. The paper's momentum is an average of the steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray


def slices(shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """The sets of the cover, as indices into theta; one set an element for at most one axis."""
    if not shape:
        return [()]
    return [(*[slice(None)] * axis, i) for axis, size in enumerate(shape) for i in range(size)]


@dataclasses.dataclass
class Cover:
    """mu(r) for each set r of the cover."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.sets = slices(self.shape)
        self.mu = np.zeros(len(self.sets))

    def least(self) -> Array:
        """min over the sets r that hold i of mu(r), at each i."""
        bound = np.full(self.shape, np.inf)
        for r, where in enumerate(self.sets):
            bound[where] = np.minimum(bound[where], self.mu[r])
        return bound

    def step_one(self, g: Array) -> Array:
        """SM3-I: mu(r) += max over r of g^2; returns nu."""
        for r, where in enumerate(self.sets):
            self.mu[r] += np.max(g[where] ** 2)
        return self.least()

    def step_two(self, g: Array, beta: float = 0.0) -> Array:
        """SM3-II: nu from the old mu, then mu(r) = max over r of nu; returns nu."""
        nu = self.least() + g**2 if beta == 0.0 else beta * self.least() + (1 - beta) * g**2
        for r, where in enumerate(self.sets):
            self.mu[r] = np.max(nu[where])
        return nu


@dataclasses.dataclass
class SM364:
    lr: float
    momentum: float = 0.0
    beta: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    maximize: bool = False
    covers: dict[str, Cover] = dataclasses.field(default_factory=dict, init=False)
    averages: dict[str, Array] = dataclasses.field(default_factory=dict, init=False)

    def step(self, theta: dict[str, Array], grads: dict[str, Array], bases: Any = None) -> None:
        """One step, on theta's arrays themselves."""
        for name, gradient in grads.items():
            g = -gradient if self.maximize else gradient
            w = theta[name]
            nu = self.covers.setdefault(name, Cover(w.shape)).step_two(g, self.beta)
            root = np.sqrt(nu) + self.eps
            u = np.where(root == 0.0, 0.0, g / np.where(root == 0.0, 1.0, root))
            if self.momentum:
                before = self.averages.get(name, 0.0)
                u = self.momentum * before + (1 - self.momentum) * u
                self.averages[name] = u
            w *= 1 - self.lr * self.weight_decay
            w -= self.lr * u
