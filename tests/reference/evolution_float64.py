"""Evolution strategies in float64 (Salimans et al., 2017; Qiu et al., 2025), importing no zoopt.

theta <- (1 - lr wd) theta + lr / N sum_i rhat_i z_i, rhat the shaped fitnesses at theta + sigma z;
with a rank (EGGROLL, Sarkar et al., 2025) a matrix (m, n) = (shape[0], the rest) has
z = A B^T / sqrt(r), A (m x r) then B (n x r) from its draw, r = min(rank, m, n).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.mezo_float64 import Array, Loss, Params
from tests.reference.spsa_float64 import Masks, Normals, shifted


def shaped(f: Array, shaping: str) -> Array:
    """The weights of fitnesses f: "zscore", "rank" in [-0.5, 0.5], or "pair-sign"."""
    if shaping == "pair-sign":
        return np.sign(f[0::2] - f[1::2]).repeat(2) * np.tile([1.0, -1.0], len(f) // 2)
    if f.max() == f.min():
        return np.zeros_like(f)
    if shaping == "zscore":
        return (f - f.mean()) / f.std(ddof=0)
    if shaping == "rank":
        below = (f[:, None] > f).sum(1) + ((f[:, None] == f).sum(1) - 1) / 2
        return below / (len(f) - 1) - 0.5
    raise ValueError(shaping)


@dataclasses.dataclass(kw_only=True)
class EvolutionStrategy64:
    """The callable's value is the fitness; with maximize false it is a loss, fitness its negative.

    Antithetic: members 2k and 2k + 1 are +z_k and -z_k, z_k of draw d0 + k.
    """

    normals: Normals
    lr: float
    sigma: float
    population_size: int
    shaping: str = "zscore"
    antithetic: bool = True
    rank: int | None = None
    weight_decay: float = 0.0
    maximize: bool = True
    mask: Masks | None = None
    draw: int = 0

    def __post_init__(self) -> None:
        if self.antithetic and self.population_size % 2:
            raise ValueError("an antithetic population is even")
        if self.shaping == "pair-sign" and not self.antithetic:
            raise ValueError("pair-sign needs antithetic pairs")

    def direction(self, name: str, w: Array, draw: int) -> Array:
        if self.rank is None or w.ndim < 2:
            z = self.normals(name, draw, 0, w.size).reshape(w.shape)
        else:
            m, n = w.shape[0], w.size // w.shape[0]
            r = min(self.rank, m, n)
            a = self.normals(name, draw, 0, m * r).reshape(m, r)
            b = self.normals(name, draw, m * r, n * r).reshape(n, r)
            z = (a @ b.T / np.sqrt(r)).reshape(w.shape)
        return z if self.mask is None else self.mask(name, draw) * z

    def population(self, theta: Params) -> list[Params]:
        count = self.population_size // 2 if self.antithetic else self.population_size
        draws = range(self.draw, self.draw + count)
        self.draw += count
        zs = [{name: self.direction(name, w, d) for name, w in theta.items()} for d in draws]
        signs = (1.0, -1.0) if self.antithetic else (1.0,)
        return [{name: sign * d for name, d in z.items()} for z in zs for sign in signs]

    def step(self, loss: Loss, theta: Params) -> Params:
        zs = self.population(theta)
        f = np.array([loss(shifted(theta, self.sigma, z)) for z in zs])
        weights = shaped(f if self.maximize else -f, self.shaping)
        decay, rate = 1 - self.lr * self.weight_decay, self.lr / self.population_size
        return {
            name: decay * w + rate * sum(c * z[name] for c, z in zip(weights, zs, strict=True))
            for name, w in theta.items()
        }
