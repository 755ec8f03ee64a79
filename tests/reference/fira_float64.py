"""Fira (Chen et al., 2024) in float64 numpy: the residual formed, its norm taken from it."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.apollo_float64 import Apollo64, norm_limited
from tests.reference.galore_float64 import Array, down, up


@dataclasses.dataclass
class Fira64(Apollo64):
    scale: float = 0.25

    def update(self, name: str, g: Array, own: dict[str, Array]) -> Array:
        """alpha P N + phi (G - P P^T G), the second term limited: (m, n)."""
        reduced = down(g, own)  # (channels, r)
        direction = self.rules[name](reduced)
        phi = np.linalg.norm(direction, axis=1) / np.linalg.norm(reduced, axis=1)
        outside = g - up(reduced, own)
        scaled = outside * phi if own["side"] == "left" else phi[:, None] * outside
        scaled = norm_limited(scaled, self.norms.get(name), self.norm_growth_limit)
        self.norms[name] = float(np.linalg.norm(scaled))
        return self.scale * up(direction, own) + scaled
