"""Gradient accumulation: a batch that does not fit in memory is probed in micro-batches.

`probe` evaluates a micro-batch without changing the parameters. Until `step`, all micro-batches are
probed along the same direction and their losses add up. The step is therefore that of the whole
batch, up to the rounding of the sum. As with backward passes, each loss is multiplied by its share
of the batch.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoopt

BATCH_SIZE = 64


def mean_square(model: nn.Module, inputs: Tensor, targets: Tensor, share: float = 1.0) -> Tensor:
    """The loss of a micro-batch that is the given share of its batch."""
    return share * F.mse_loss(model(inputs), targets)


def main(steps: int = 300, micro_batches: int = 4) -> dict[str, float]:
    """Train twice, by whole batches and by micro-batches; return the losses and the difference.

    `difference` is the largest difference between the two runs' weights. `distance` is the largest
    change of a weight from its start.
    """
    torch.manual_seed(0)
    inputs = torch.randn(1024, 8)
    targets = torch.sin(inputs[:, :1] + inputs[:, 1:2])
    start = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    whole, accumulated = copy.deepcopy(start), copy.deepcopy(start)
    whole_optimizer = zoopt.MeZO(whole.named_parameters(), lr=5e-3, seed=0)
    optimizer = zoopt.MeZO(accumulated.named_parameters(), lr=5e-3, seed=0)

    for _ in range(steps):
        rows = torch.randperm(len(inputs))[:BATCH_SIZE]
        whole_optimizer.step(functools.partial(mean_square, whole, inputs[rows], targets[rows]))
        for part in rows.chunk(micro_batches):
            share = len(part) / BATCH_SIZE
            optimizer.probe(
                functools.partial(mean_square, accumulated, inputs[part], targets[part], share)
            )
        optimizer.step()

    def largest(first: nn.Module, second: nn.Module) -> float:
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        return max((p - q).abs().max().item() for p, q in pairs)

    with torch.no_grad():
        return {
            "loss_before": mean_square(start, inputs, targets).item(),
            "loss": mean_square(accumulated, inputs, targets).item(),
            "loss_whole": mean_square(whole, inputs, targets).item(),
            "difference": largest(whole, accumulated),
            "distance": largest(start, accumulated),
        }


if __name__ == "__main__":
    figures = main()
    print(f"loss by whole batches {figures['loss_before']:.4f} -> {figures['loss_whole']:.4f}")
    print(f"loss by micro-batches {figures['loss_before']:.4f} -> {figures['loss']:.4f}")
    print(
        f"weights differ by {figures['difference']:.1e} at most, having moved by up to "
        f"{figures['distance']:.1e}"
    )
