"""FRUGAL (Zmushko et al., 2024, algorithm 1) in float64 numpy, importing no zoopt.

With its rules: Adam, Lion (Chen et al., 2023) and momentum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tests.reference.galore_float64 import Adam64, Array, Bases, down, up


@dataclasses.dataclass
class Lion64:
    betas: tuple[float, float]
    m: Array | float = 0.0

    def __call__(self, gradient: Array) -> Array:
        b1, b2 = self.betas
        direction = np.sign(b1 * self.m + (1 - b1) * gradient)
        self.m = b2 * self.m + (1 - b2) * gradient
        return direction


@dataclasses.dataclass
class Momentum64:
    momentum: float
    buffer: Array | float = 0.0

    def __call__(self, gradient: Array) -> Array:
        self.buffer = self.momentum * self.buffer + gradient
        return self.buffer


@dataclasses.dataclass
class Frugal64:
    lr: float
    rule: str = "adam"
    betas: tuple[float, float] | None = None
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    sign_lr_scale: float = 1.0
    maximize: bool = False
    update_proj_gap: int = 200
    stagger: bool = True
    steps: int = 0
    rules: dict[str, Callable[[Array], Array]] = dataclasses.field(default_factory=dict, init=False)

    def fresh(self) -> Callable[[Array], Array]:
        if self.rule == "adam":
            return Adam64(self.betas or (0.9, 0.999), self.eps)
        if self.rule == "lion":
            return Lion64(self.betas or (0.9, 0.99))
        return Momentum64(self.momentum)

    def changes(self, position: int, count: int) -> bool:
        """Whether this step has a new subspace; parameters take turns."""
        phase = position * self.update_proj_gap // count if self.stagger else 0
        return self.steps == 0 or (self.steps + phase) % self.update_proj_gap == 0

    def step(self, theta: dict[str, Array], grads: dict[str, Array], bases: Bases) -> None:
        """One step, on theta's arrays themselves."""
        for position, (name, gradient) in enumerate(grads.items()):
            g = -gradient if self.maximize else gradient
            if self.steps == 0 or (name in bases and self.changes(position, len(grads))):
                self.rules[name] = self.fresh()
            rule = self.rules[name]
            if name in bases:
                reduced = down(g, bases[name])
                rest = np.sign(g - up(reduced, bases[name]))
                direction = up(rule(reduced), bases[name]) + self.sign_lr_scale * rest
            else:
                direction = rule(g)
            theta[name] *= 1 - self.lr * self.weight_decay
            theta[name] -= self.lr * direction
        self.steps += 1
