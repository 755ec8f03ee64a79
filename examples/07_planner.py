"""Will it fit? Plan the memory of your own model before anything is allocated.

The planner runs a step of each optimizer on tensors that have shapes but no values. The plan shows
the parts of the peak, which methods fit in a budget, and the largest batch. For transformers models
a command does the same: `zoopt plan path/to/config.json --gpu 24GB`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoopt.memory
from zoopt.memory.models import ModelSpec

VOCABULARY, WIDTH, LAYERS = 8192, 256, 4
METHODS = ("inference", "MeZO", "SM3, fused backward", "zoopt.AdamW, int8 state", "AdamW")


class Network(nn.Module):
    """A small language model without attention; its call returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """The cross-entropy of each token as its own label, (batch, sequence) -> ()."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens.flatten())


def build(checkpointing: bool) -> nn.Module:
    """The model, for the planner."""
    return Network()


def inputs(batch: int, seq: int) -> Mapping[str, Any]:
    """The arguments of the model."""
    return {"tokens": torch.zeros(batch, seq, dtype=torch.long)}


def main(budget: int = 40_000_000) -> dict[str, dict[str, float]]:
    """Plan a step of 8 x 64 tokens; return peak, state, and the batch that fits, by method."""
    spec = ModelSpec("my network", build, inputs)
    plan = zoopt.memory.plan(spec, optimizers=METHODS, batch=8, seq=64, dtype="bfloat16")
    return {
        estimate.name: {
            "peak": estimate.peak,
            "state": estimate.state,
            "fits": float(estimate.fits(budget)),
            "largest_batch": estimate.largest_batch(budget, plan.batch),
        }
        for estimate in plan.estimates
    }


if __name__ == "__main__":
    for name, figures in main().items():
        print(
            f"{name:25s} peak {figures['peak'] / 1e6:5.1f} MB, state {figures['state'] / 1e6:5.2f} "
            f"MB, largest batch in 40 MB: {figures['largest_batch']:.0f}"
        )
