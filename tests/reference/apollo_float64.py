"""APOLLO and APOLLO-Mini (Zhu et al., 2024, algorithm 1) in float64 numpy."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.galore_float64 import Adam64, Array, Bases, down


def norm_limited(update: Array, previous: float | None, gamma: float | None) -> Array:
    """The norm-growth limiter: ||update|| <= gamma previous."""
    norm = float(np.linalg.norm(update))
    if gamma is None or previous is None or norm <= gamma * previous:
        return update
    return update * (gamma * previous / norm)


@dataclasses.dataclass
class Apollo64:
    """`mini`: one factor for the tensor, not one for each channel."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    scale: float = 1.0
    norm_growth_limit: float | None = 1.01
    maximize: bool = False
    mini: bool = False
    rules: dict[str, Adam64] = dataclasses.field(default_factory=dict, init=False)
    norms: dict[str, float] = dataclasses.field(default_factory=dict, init=False)

    def update(self, name: str, g: Array, own: dict[str, Array]) -> Array:
        """alpha G S, limited: (m, n)."""
        reduced = down(g, own)  # (channels, r)
        direction = self.rules[name](reduced)
        if self.mini:
            scaled = g * (np.linalg.norm(direction) / np.linalg.norm(reduced))
        else:
            s = np.linalg.norm(direction, axis=1) / np.linalg.norm(reduced, axis=1)
            scaled = g * s if own["side"] == "left" else s[:, None] * g
        scaled = norm_limited(scaled, self.norms.get(name), self.norm_growth_limit)
        self.norms[name] = float(np.linalg.norm(scaled))
        return self.scale * scaled

    def step(self, theta: dict[str, Array], grads: dict[str, Array], bases: Bases) -> None:
        """One step, on theta's arrays themselves."""
        for name, gradient in grads.items():
            self.rules.setdefault(name, Adam64(self.betas, self.eps))
            g = -gradient if self.maximize else gradient
            own = bases.get(name)
            direction = self.update(name, g, own) if own else self.rules[name](g)
            theta[name] *= 1 - self.lr * self.weight_decay
            theta[name] -= self.lr * direction
