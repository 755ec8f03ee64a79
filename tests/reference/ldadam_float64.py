"""LDAdam (Robert et al., 2024, algorithm 1) in float64 numpy, importing no zoopt."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.galore_float64 import Adam64, Array, Bases, audible, down, up


def follow(a: Array, average: Array, basis: Array, rho: float) -> Array:
    """The next basis (n, r) for A (m, n), mhat (m, r): one power step, orthonormalised."""
    b = rho * average @ basis.T + (1 - rho) * a
    q, r = np.linalg.qr(b.T @ (b @ basis))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def rotate(m: Array, v: Array, change: Array, c1: float, c2: float) -> tuple[Array, Array]:
    """m and v (channels, r) through C (r, r), both with their bias in them."""
    mhat, vhat = m / c1, v / c2
    moved = mhat @ change
    return c1 * moved, c2 * np.abs((vhat - mhat**2) @ change**2 + moved**2)


@dataclasses.dataclass
class Matrix64:
    """The state of one matrix."""

    betas: tuple[float, float]
    eps: float
    step: int = 0
    m: Array | float = 0.0
    v: Array | float = 0.0
    error: Array | float = 0.0
    bases: dict[str, Array] | None = None

    def __call__(self, gradient: Array, bases: dict[str, Array], feedback: bool) -> Array:
        """The direction (m, n) in the subspace of these bases."""
        (b1, b2), a = self.betas, gradient + self.error
        reduced = audible(down(a, bases), a, roundings=2 / (1 - b1))
        lost = a - up(reduced, bases)
        if self.bases is not None:
            change = self.bases["basis"].T @ bases["basis"]
            before = up(self.m, self.bases)
            self.m, self.v = rotate(self.m, self.v, change, 1 - b1**self.step, 1 - b2**self.step)
            self.m = audible(self.m, a, roundings=2 / (1 - b1))
            lost = lost + b1 / (1 - b1) * (before - up(self.m, bases))
        self.error = lost if feedback else 0.0
        self.bases = bases
        self.step += 1
        self.m = b1 * self.m + (1 - b1) * reduced
        self.v = b2 * self.v + (1 - b2) * reduced**2
        c1, c2 = 1 - b1**self.step, 1 - b2**self.step
        return up(self.m / c1 / (np.sqrt(self.v / c2) + self.eps), bases)


@dataclasses.dataclass
class LDAdam64:
    lr: float
    betas: tuple[float, float] = (0.908, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    error_feedback: bool = True
    maximize: bool = False
    matrices: dict[str, Matrix64] = dataclasses.field(default_factory=dict, init=False)
    vectors: dict[str, Adam64] = dataclasses.field(default_factory=dict, init=False)

    def step(self, theta: dict[str, Array], grads: dict[str, Array], bases: Bases) -> None:
        """One step, on theta's arrays themselves."""
        for name, gradient in grads.items():
            g = -gradient if self.maximize else gradient
            if name in bases:
                matrix = self.matrices.setdefault(name, Matrix64(self.betas, self.eps))
                direction = matrix(g, bases[name], self.error_feedback)
            else:
                direction = self.vectors.setdefault(name, Adam64(self.betas, self.eps))(g)
            theta[name] *= 1 - self.lr * self.weight_decay
            theta[name] -= self.lr * direction
