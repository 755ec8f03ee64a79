"""MeZO as it is commonly published, to compare with and to measure against.

Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", Algorithm 1: the
direction z is regenerated from a seed given to PyTorch's global generator, so it need not be
stored, and each of the four passes over the parameters writes a new tensor. This is deliberately
naive: it shows the algorithm, and the cost of a straightforward program.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import torch


def add_direction(params: Iterable[torch.Tensor], step_seed: int, scale: float) -> None:
    """Add `scale` times the seed's direction to every parameter, out of place."""
    torch.manual_seed(step_seed)
    for param in params:
        z = torch.normal(
            mean=0.0, std=1.0, size=param.shape, dtype=param.dtype, device=param.device
        )
        param.data = param.data + scale * z


class PublishedMeZO:
    """Algorithm 1 with one direction a step, a constant learning rate and no weight decay.

    Args:
        params: the parameters to train; those that need no gradient are left alone.
        lr: the learning rate.
        zo_eps: the perturbation scale, epsilon in the paper.
        seed: seeds the generator that draws one seed a step.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        zo_eps: float = 1e-3,
        seed: int = 0,
    ) -> None:
        self.params = [param for param in params if param.requires_grad]
        self.lr = lr
        self.zo_eps = zo_eps
        self.losses: tuple[float, float] | None = None
        self.projected_grad: float | None = None
        self._step_seeds = random.Random(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor | float]) -> float:
        """Estimate the slope along one random direction and move against it.

        Returns the loss at theta + eps z, as the published code does.
        """
        step_seed = self._step_seeds.getrandbits(31)
        add_direction(self.params, step_seed, self.zo_eps)
        loss_plus = float(closure())
        add_direction(self.params, step_seed, -2.0 * self.zo_eps)
        loss_minus = float(closure())
        add_direction(self.params, step_seed, self.zo_eps)

        projected_grad = (loss_plus - loss_minus) / (2.0 * self.zo_eps)
        add_direction(self.params, step_seed, -self.lr * projected_grad)
        self.losses = (loss_plus, loss_minus)
        self.projected_grad = projected_grad
        return loss_plus
