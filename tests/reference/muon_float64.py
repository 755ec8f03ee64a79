"""ZO-Muon in float64 (Lang et al., 2026), importing no zoopt.

A matrix is probed along P u_i, P (m x r) Haar of the basis draw, u_i (r x n) of each draw, and
theta -= lr P msign(mean_i g_i u_i). Other parameters take a step of length lr along the estimate.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.factored_float64 import Factored64, haar
from tests.reference.mezo_float64 import Array, Loss, Params


def msign(a: Array) -> Array:
    """U V^T of the singular value decomposition U S V^T; 0 for the zero matrix."""
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return u @ vt if s[0] > 0 else np.zeros_like(a)


@dataclasses.dataclass(kw_only=True)
class ZOMuon64(Factored64):
    basis_update_gap: int = 100
    num_probes: int = 4
    one_sided: bool = True

    def __post_init__(self) -> None:
        if self.mask is not None:
            raise ValueError("a step in the subspace of P has no mask")

    def u(self, name: str, w: Array, draw: int) -> Array:
        _, n, r = self.shape(w)
        return self.gaussian(name, draw, 0, r, n)

    def basis(self, name: str, w: Array) -> Array:
        m, n, r = self.shape(w)
        return haar(self.gaussian(name, self.basis_draw, r * n, m, r))

    def matrix_direction(self, name: str, w: Array, draw: int) -> Array:
        return self.basis(name, w) @ self.u(name, w, draw)

    def step(self, loss: Loss, theta: Params) -> Params:
        first = self.draw
        zs = self.directions(theta)
        grads = self.projected_grads(loss, theta, zs)
        update = self.estimate(grads, zs)
        for name, w in theta.items():
            if w.ndim >= 2:
                us = [self.u(name, w, draw) for draw in range(first, self.draw)]
                step = self.basis(name, w) @ msign(self.mean(grads, us))
                update[name] = step.reshape(w.shape)
            elif np.linalg.norm(update[name]) > 0:
                update[name] = update[name] / np.linalg.norm(update[name])
        return self.updated(theta, update)
