"""GaLore as it is commonly published, to compare with and to measure against.

Zhao et al. 2024, algorithm 2, as its authors released it: every T steps an SVD of the gradient,
Adam's step in the subspace with eps added to the uncorrected root, and the decay of the weights
after the step. Tensors come and go as in a straightforward program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


class PublishedGaLore:
    """Algorithm 2 on every matrix, Adam on the rest.

    Args:
        params: the parameters to train.
        lr, betas, eps, weight_decay: AdamW's.
        rank, update_proj_gap, scale: r, T and alpha in the paper.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
    ) -> None:
        self.params = list(params)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.rank, self.gap, self.scale = rank, update_proj_gap, scale
        self.basis: dict[int, torch.Tensor] = {}
        self.moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """One step on every parameter that has a gradient."""
        for i, param in enumerate(self.params):
            if param.grad is not None:
                self._step(i, param, param.grad)
        self.steps += 1

    def _step(self, i: int, param: torch.Tensor, gradient: torch.Tensor) -> None:
        right = gradient.shape[0] >= gradient.shape[-1]
        if gradient.dim() == 2:
            if self.steps % self.gap == 0:
                u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
                self.basis[i] = vh[: self.rank].T if right else u[:, : self.rank]
            basis = self.basis[i]
            reduced = gradient @ basis if right else basis.T @ gradient
        else:
            reduced = gradient
        m, v = self.moments.get(i, (torch.zeros_like(reduced), torch.zeros_like(reduced)))
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * reduced
        v = b2 * v + (1 - b2) * reduced**2
        self.moments[i] = (m, v)
        update = m / (v.sqrt() + self.eps)
        if gradient.dim() == 2:
            update = self.scale * (update @ basis.T if right else basis @ update)
        t = self.steps + 1
        param -= self.lr * math.sqrt(1 - b2**t) / (1 - b1**t) * update
        param -= self.lr * self.weight_decay * param
