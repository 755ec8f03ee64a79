"""MeZO on several processes, which exchange only their losses.

    torchrun --nproc-per-node 2 examples/11_distributed.py

Each process has its own share of every batch. Directions come from the seed, so processes exchange
only a few numbers per step, and neither gradients nor weights. All processes end with bit for bit
equal weights.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import zoopt

CLASSES, FEATURES, BATCH = 4, 16, 128


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre for each class."""
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, FEATURES, generator=generator)
    return centres[labels] + 0.7 * noise, labels


def main(steps: int = 400) -> dict[str, float]:
    """Train on this process's share of the data; return the figures."""
    launched = "RANK" in os.environ
    if launched:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    optimizer = zoopt.MeZO(
        model.named_parameters(),
        lr=2e-2,
        num_probes=4,
        seed=0,
        process_group=dist.group.WORLD if launched else None,
    )
    x, y = data(4096, seed=1)
    held_out = data(1024, seed=2)

    def accuracy() -> float:
        with torch.no_grad():
            return (model(held_out[0]).argmax(1) == held_out[1]).double().mean().item()

    before, losses = accuracy(), []
    for step in range(steps):
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        own = batch.tensor_split(world)[rank]

        def loss(own: torch.Tensor = own) -> torch.Tensor:
            return F.cross_entropy(model(x[own]), y[own])

        losses.append(optimizer.step(loss, weight=len(own)))
    figures = {
        "accuracy_before": before,
        "accuracy": accuracy(),
        "loss_before": sum(losses[:10]) / 10,
        "loss": sum(losses[-10:]) / 10,
        "ranks": world,
        "different_weights": 0,
    }
    if launched:
        weights = torch.cat([param.detach().flatten() for param in model.parameters()])
        others = [torch.empty_like(weights) for _ in range(world)]
        dist.all_gather(others, weights)
        figures["different_weights"] = sum(int((weights != w).sum()) for w in others)
        dist.destroy_process_group()
    return figures


if __name__ == "__main__":
    measured = main()
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{measured['ranks']} processes: accuracy {measured['accuracy_before']:.2f} -> "
            f"{measured['accuracy']:.2f}; weights that differ: {measured['different_weights']}"
        )
