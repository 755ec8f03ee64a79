"""What the float64 oracles with low-rank directions share, importing no zoopt.

A parameter of two dimensions or more is the matrix (m, n) = (shape[0], the rest), and its rank is
r = min(rank, m, n). Part of its direction comes from each draw, part from the basis draw: the first
draw of the last step whose number, from 0, is a multiple of basis_update_gap. Other parameters: the
i.i.d. z = normals(name, draw, 0, numel).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.mezo_float64 import Array, Params
from tests.reference.spsa_float64 import SPSA64, Normals


def haar(gaussian: Array) -> Array:
    """Q of Q R with the diagonal of R positive: uniform over orthonormal columns (Mezzadri, 2007).

    Without the flip of columns, Q's law would depend on the factorization's signs.
    """
    q, r = np.linalg.qr(gaussian)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


@dataclasses.dataclass(kw_only=True)
class Factored64(SPSA64):
    normals: Normals
    rank: int
    basis_update_gap: int
    steps: int = 0
    basis_draw: int = 0

    def shape(self, w: Array) -> tuple[int, int, int]:
        m, n = w.shape[0], w.size // w.shape[0]
        return m, n, min(self.rank, m, n)

    def gaussian(self, name: str, draw: int, start: int, *shape: int) -> Array:
        return self.normals(name, draw, start, int(np.prod(shape))).reshape(shape)

    def matrix_direction(self, name: str, w: Array, draw: int) -> Array:
        raise NotImplementedError

    def direction(self, name: str, w: Array, draw: int) -> Array:
        if w.ndim < 2:
            return self.gaussian(name, draw, 0, *w.shape)
        return self.matrix_direction(name, w, draw).reshape(w.shape)

    def directions(self, theta: Params) -> list[Params]:
        if self.steps % self.basis_update_gap == 0:
            self.basis_draw = self.draw
        self.steps += 1
        return super().directions(theta)
