"""LOZO and LOZO-M in float64 (Chen et al., 2024), importing no zoopt.

A matrix is probed along U V^T, U (m x r) of each draw, V (n x r) of the basis draw; its estimate is
g U V^T / r. Its momentum is N (m x r), an average of g U, which N V_old^T V_new / n carries over to
the next V.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.factored_float64 import Factored64
from tests.reference.mezo_float64 import Array, Loss, Params


@dataclasses.dataclass(kw_only=True)
class LOZO64(Factored64):
    momentum: float = 0.0
    buffer: Params = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.momentum and self.mask is not None:
            raise ValueError("a momentum in factors has no mask")

    def u(self, name: str, w: Array, draw: int) -> Array:
        m, _, r = self.shape(w)
        return self.gaussian(name, draw, 0, m, r)

    def v(self, name: str, w: Array, draw: int) -> Array:
        m, n, r = self.shape(w)
        return self.gaussian(name, draw, m * r, n, r)

    def matrix_direction(self, name: str, w: Array, draw: int) -> Array:
        return self.u(name, w, draw) @ self.v(name, w, self.basis_draw).T

    def step(self, loss: Loss, theta: Params) -> Params:
        first = self.draw
        zs = self.directions(theta)
        grads = self.projected_grads(loss, theta, zs)
        if not self.momentum:
            update = self.estimate(grads, zs)
            for name, w in theta.items():
                update[name] = update[name] / (self.shape(w)[2] if w.ndim >= 2 else 1)
            return self.updated(theta, update)
        update = {}
        for name, w in theta.items():
            mine = [z[name] for z in zs]
            if w.ndim >= 2:
                mine = [self.u(name, w, draw) for draw in range(first, self.draw)]
            old = self.buffer.get(name, np.zeros_like(mine[0]))
            new = self.momentum * old + (1 - self.momentum) * self.mean(grads, mine)
            update[name] = self.buffer[name] = new
            if w.ndim >= 2:
                _, n, r = self.shape(w)
                basis = self.v(name, w, self.basis_draw)
                update[name] = (new @ basis.T / r).reshape(w.shape)
                if self.steps % self.basis_update_gap == 0:
                    self.buffer[name] = new @ (basis.T @ self.v(name, w, self.draw)) / n
        return self.updated(theta, update)
