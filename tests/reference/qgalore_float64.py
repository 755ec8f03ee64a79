"""Q-GaLore (Zhang et al., 2024) in float64 numpy: int4 bases and the lazy refresh.

It makes its own bases, by numpy's SVD of the gradients it is given. Their columns' signs, which an
SVD leaves open and moments that outlive a basis depend on, are those of the bases it is given.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.reference.galore_float64 import Adam64, Array, Bases, down, up


def int4(basis: Array, group: int = 256) -> Array:
    """The basis as its codes have it: multiples -7 ... 7 of a step, one step for 256 elements."""
    flat = basis.reshape(-1).copy()
    for start in range(0, flat.size, group):
        part = flat[start : start + group]
        # The step is stored in float32.
        step = float(np.float32(np.abs(part).max() / 7))
        part[:] = np.clip(np.round(part / step), -7, 7) * step if step else 0.0
    return flat.reshape(basis.shape)


def agreement(previous: Array, basis: Array) -> float:
    """|cos| between subspaces: from the principal angles, beyond what random ones have."""
    n, r = basis.shape
    if n == r:
        return 1.0
    cosines = np.linalg.svd(previous.T @ basis, compute_uv=False)
    return float(np.sqrt(max(0.0, (np.mean(cosines**2) - r / n) / (1 - r / n))))


@dataclasses.dataclass
class LazyBasis64:
    """One parameter's basis, and when it is made anew."""

    rank: int
    gap: int
    phase: int
    cos_threshold: float | None
    queue_size: int
    quantised: bool
    steps: int = 0
    refreshes: int = 0
    agreements: list[bool] = dataclasses.field(default_factory=list)
    basis: Array | None = None

    def of(self, gradient: Array, signs: Array) -> dict[str, Array]:
        """The basis of this step, its columns' signs as in `signs` (n, r)."""
        m, n = gradient.shape
        rank = min(self.rank, m, n)
        if self.basis is None or (self.steps + self.phase) % self.gap == 0:
            u, _, vh = np.linalg.svd(gradient, full_matrices=False)
            new = vh[:rank].T if m >= n else u[:, :rank]
            new = new * np.sign((new * signs).sum(0))
            if self.basis is not None and self.cos_threshold is not None:
                self.agreements.append(agreement(self.basis, new) >= self.cos_threshold)
                last = self.agreements[-self.queue_size :]
                if len(last) == self.queue_size and all(last):
                    self.gap *= 2
            self.basis = int4(new) if self.quantised else new
            self.refreshes += 1
        self.steps += 1
        return {"basis": self.basis, "side": "right" if m >= n else "left"}


@dataclasses.dataclass
class QGaLore64:
    lr: float
    rank: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    update_proj_gap: int = 200
    scale: float = 0.25
    cos_threshold: float | None = 0.4
    queue_size: int = 5
    basis_dtype: str = "int4"
    stagger: bool = True
    rules: dict[str, Adam64] = dataclasses.field(default_factory=dict, init=False)
    bases: dict[str, LazyBasis64] = dataclasses.field(default_factory=dict, init=False)

    def step(self, theta: dict[str, Array], grads: dict[str, Array], bases: Bases) -> None:
        """One step, on theta's arrays themselves."""
        for position, (name, gradient) in enumerate(grads.items()):
            rule = self.rules.setdefault(name, Adam64(self.betas, self.eps))
            if gradient.ndim < 2:
                direction = rule(gradient)
            else:
                gap = self.update_proj_gap
                lazy = LazyBasis64(
                    self.rank,
                    gap,
                    position * gap // len(grads) if self.stagger else 0,
                    self.cos_threshold,
                    self.queue_size,
                    self.basis_dtype == "int4",
                )
                own = self.bases.setdefault(name, lazy).of(gradient, bases[name]["basis"])
                direction = self.scale * up(rule(down(gradient, own)), own)
            theta[name] *= 1 - self.lr * self.weight_decay
            theta[name] -= self.lr * direction
