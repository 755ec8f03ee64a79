"""GradNormLoRP (Huang et al., 2024) in float64 numpy: the weight, its gradients, the update."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.galore_float64 import Adam64, audible

Array = np.ndarray


def weight(w0: Array, i: Array, j: Array, m: Array) -> Array:
    """W = M (W0 + I J) / ||W0 + I J||_c, with the norm of each column."""
    v = w0 + i @ j
    return m * v / np.sqrt((v**2).sum(axis=0))


def gradients(w0: Array, i: Array, j: Array, m: Array, g: Array) -> tuple[Array, Array, Array]:
    """dL/dI, dL/dJ and dL/dM from G = dL/dW, a column at a time.

    For W_j = M_j V_j / |V_j|: dL/dM_j = G_j . V_j / |V_j|, and (Salimans & Kingma, 2016, eq. 3)
    dL/dV_j = (M_j / |V_j|) (G_j - (dL/dM_j) V_j / |V_j|).
    """
    v = w0 + i @ j
    dm, dv = np.zeros_like(m), np.zeros_like(v)
    for column in range(v.shape[1]):
        norm = np.sqrt((v[:, column] ** 2).sum())
        unit = v[:, column] / norm
        dm[column] = (g[:, column] * unit).sum()
        dv[:, column] = m[column] / norm * (g[:, column] - dm[column] * unit)
    return dv @ j.T, i.T @ dv, dm


@dataclasses.dataclass
class GradNormLoRP64:
    """theta <- theta - lr U Adam(U^T D V) V^T; Adam itself for what has no bases."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    rules: dict[str, Adam64] = dataclasses.field(default_factory=dict, init=False)

    def step(
        self,
        theta: dict[str, Array],
        grads: dict[str, Array],
        bases: dict[str, tuple[Array, Array]],
    ) -> None:
        """One step, on theta's arrays themselves.

        bases: name -> U (m, r) and V (n, r).
        """
        for name, d in grads.items():
            rule = self.rules.setdefault(name, Adam64(self.betas, self.eps))
            if name in bases:
                u, v = bases[name]
                theta[name] -= self.lr * u @ rule(audible(u.T @ d @ v, d, entries=True)) @ v.T
            else:
                theta[name] -= self.lr * rule(d)
