"""GaLore's AdamW (Zhao et al., 2024, algorithm 2) and AdamW itself, in float64 numpy."""

from __future__ import annotations

import dataclasses

import numpy as np

Array = np.ndarray
#: name -> {"basis": (n, r) or (m, r), "basis_left": (m, r)}; empty for AdamW.
Bases = dict[str, dict[str, Array]]


def audible(
    reduced: Array, gradient: Array, entries: bool = False, roundings: float = 2.0
) -> Array:
    """R but for its columns (or entries) that are rounding: below 2 eps sqrt(max(m, n)) max |R|."""
    size = np.abs(reduced) if entries else np.abs(reduced).max(0)
    floor = roundings * np.finfo(np.float64).eps * np.sqrt(max(gradient.shape))
    return np.where(size < floor * np.abs(reduced).max(), 0.0, reduced)


def down(gradient: Array, bases: dict[str, Array]) -> Array:
    """G (m, n) in its subspace, with the channels first: G Q, (P^T G)^T, or P^T G Q."""
    basis = bases["basis"]
    if "basis_left" in bases:
        return audible(bases["basis_left"].T @ gradient @ basis, gradient, entries=True)
    if bases["side"] == "left":
        return audible((basis.T @ gradient).T, gradient)
    return audible(gradient @ basis, gradient)


def up(reduced: Array, bases: dict[str, Array]) -> Array:
    """Back to (m, n)."""
    basis = bases["basis"]
    if "basis_left" in bases:
        return bases["basis_left"] @ reduced @ basis.T
    if bases["side"] == "left":
        return basis @ reduced.T
    return reduced @ basis.T


@dataclasses.dataclass
class Adam64:
    """Adam's moments of one tensor."""

    betas: tuple[float, float]
    eps: float
    eps_correction: bool = True
    step: int = 0
    m: Array | float = 0.0
    v: Array | float = 0.0

    def __call__(self, gradient: Array) -> Array:
        """mhat / (sqrt(vhat) + eps)."""
        (b1, b2), self.step = self.betas, self.step + 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        c1, c2 = 1 - b1**self.step, 1 - b2**self.step
        if self.eps_correction:
            return self.m / c1 / (np.sqrt(self.v / c2) + self.eps)
        return np.sqrt(c2) / c1 * self.m / (np.sqrt(self.v) + self.eps)


@dataclasses.dataclass
class GaLore64:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    scale: float = 1.0
    decay: str = "before"
    eps_correction: bool = True
    maximize: bool = False
    rules: dict[str, Adam64] = dataclasses.field(default_factory=dict, init=False)

    def step(self, theta: dict[str, Array], grads: dict[str, Array], bases: Bases) -> None:
        """One step, on theta's arrays themselves."""
        for name, gradient in grads.items():
            rule = self.rules.setdefault(name, Adam64(self.betas, self.eps, self.eps_correction))
            g = -gradient if self.maximize else gradient
            own = bases.get(name)
            direction = self.scale * up(rule(down(g, own)), own) if own else rule(g)
            w = theta[name]
            if self.decay == "before":
                w *= 1 - self.lr * self.weight_decay
            w -= self.lr * direction
            if self.decay == "after":
                w *= 1 - self.lr * self.weight_decay
