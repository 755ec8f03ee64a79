"""The minimal work of a GaLore step, in torch's own operators, to compare ours with."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt import noise


class Floor:
    """The least work of a step of a matrix (m, n) at rank r: both products, and the moments.

    Args:
        theta: the matrix; it is changed a little in each call.
        rank: of the subspace.
        gradient: theta's; default, one of normals.
    """

    def __init__(self, theta: Tensor, rank: int, gradient: Tensor | None = None) -> None:
        m, n = theta.shape
        short, long = min(m, n), max(m, n)
        self.gradient = _normal((m, n), theta, 0) if gradient is None else gradient
        self.theta, self.right = theta, m >= n
        self.basis = _normal((short, rank), theta, 1)
        self.moments = [torch.ones(long, rank, device=theta.device) for _ in range(2)]

    @torch.no_grad()
    def __call__(self) -> None:
        """R = G Q, one pass over the moments, theta + R Q^T."""
        reduced = (self.gradient if self.right else self.gradient.t()) @ self.basis
        torch._foreach_mul_(self.moments, 0.999)
        up = (reduced, self.basis.t()) if self.right else (self.basis, reduced.t())
        self.theta.addmm_(*up, alpha=1e-3)


def _normal(shape: tuple[int, int], like: Tensor, stream: int) -> Tensor:
    """Normals of that shape, on the device and in the dtype of another tensor."""
    numel = shape[0] * shape[1]
    values = noise.normal(numel, seed=0, stream=stream, draw=0, device=like.device)
    return values.view(shape).to(like.dtype)
