"""SubZero in float64 (Yu et al., 2024), importing no zoopt.

A matrix is probed and updated along Z = sqrt(m n) / r U R V^T, R (r x r) of each draw, U and V of
the basis draw, orthonormal and Haar. The scale makes the estimate g Z unbiased over U, V and R.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.factored_float64 import Factored64, haar
from tests.reference.mezo_float64 import Array


@dataclasses.dataclass(kw_only=True)
class SubZero64(Factored64):
    def matrix_direction(self, name: str, w: Array, draw: int) -> Array:
        m, n, r = self.shape(w)
        core = self.gaussian(name, draw, 0, r, r)
        u = haar(self.gaussian(name, self.basis_draw, r * r, m, r))
        v = haar(self.gaussian(name, self.basis_draw, r * r + m * r, n, r))
        return np.sqrt(m * n) / r * u @ core @ v.T
