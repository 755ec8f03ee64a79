"""GaLore (Zhao et al., 2024) with Adafactor (Shazeer & Stern, 2018, algorithms 4 and 5), in float64
numpy, importing no zoopt.

What is below eps1 is handled as by torch.optim.Adafactor.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.galore_float64 import Array, Bases, down, up


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


@dataclasses.dataclass
class Factored64:
    """The moments of one tensor: a matrix's, or a vector's, which are not factored."""

    beta2_decay: float
    eps: float
    d: float
    beta1: float | None
    step: int = 0
    row: Array | float = 0.0
    column: Array | float = 0.0
    m: Array | float = 0.0

    def __call__(self, gradient: Array) -> Array:
        self.step += 1
        beta2 = 1 - self.step**self.beta2_decay
        if gradient.ndim > 1:
            self.row = beta2 * self.row + (1 - beta2) * (gradient**2).mean(1)
            self.column = beta2 * self.column + (1 - beta2) * (gradient**2).mean(0)
            v = np.outer(self.row, self.column) / max(self.row.mean(), self.eps)
        else:
            v = self.row = beta2 * self.row + (1 - beta2) * gradient**2
        update = gradient / np.sqrt(np.maximum(v, self.eps**2))
        update = update / max(1.0, rms(update) / self.d)
        if self.beta1 is None:
            return update
        self.m = self.beta1 * self.m + (1 - self.beta1) * update
        return self.m


@dataclasses.dataclass
class GaLoreAdafactor64:
    lr: float
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: float = 0.0
    beta1: float | None = None
    relative_step: bool = False
    scale: float = 0.25
    maximize: bool = False
    rules: dict[str, Factored64] = dataclasses.field(default_factory=dict, init=False)

    def step(self, theta: dict[str, Array], grads: dict[str, Array], bases: Bases) -> None:
        """One step, on theta's arrays themselves."""
        eps1 = float(np.finfo(np.float64).eps) if self.eps[0] is None else self.eps[0]
        for name, gradient in grads.items():
            g = -gradient if self.maximize else gradient
            fresh = Factored64(self.beta2_decay, eps1, self.d, self.beta1)
            rule, own = self.rules.setdefault(name, fresh), bases.get(name)
            direction = self.scale * up(rule(down(g, own)), own) if own else rule(g)
            alpha = self.lr
            if self.relative_step:
                alpha = max(self.eps[1], rms(theta[name])) * min(self.lr, rule.step**-0.5)
            theta[name] *= 1 - self.lr * self.weight_decay
            theta[name] -= alpha * direction
