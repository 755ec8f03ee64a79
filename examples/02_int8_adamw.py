"""The other one-word change: torch's AdamW becomes zoopt's, with its moments in 8 bits.

The loop keeps its backward pass. Moments are stored as 8-bit codes with a scale for each 256 of
them. They are rounded stochastically, so that averages which change by less than one level per step
still change. The losses of the two runs stay close. In a large model the state takes a quarter of
the memory. Here it takes a third, because the moments of small tensors stay in float32.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import zoopt


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of the optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def main(steps: int = 300) -> dict[str, float]:
    """Train twice from one start; return the losses and the bytes of state."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 16)
    targets = torch.sin(2.0 * inputs[:, :1]) * inputs[:, 1:2]
    start = nn.Sequential(
        nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1)
    )
    figures = {"loss_before": F.mse_loss(start(inputs), targets).item()}
    for name in ("torch", "int8"):
        model = copy.deepcopy(start)
        if name == "torch":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        else:
            optimizer = zoopt.AdamW(model.parameters(), lr=1e-3, state_dtype="int8", seed=0)
        for _ in range(steps):
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        figures[f"loss_{name}"] = F.mse_loss(model(inputs), targets).item()
        figures[f"state_{name}"] = state_bytes(optimizer)
    return figures


if __name__ == "__main__":
    figures = main()
    for name in ("torch", "int8"):
        print(
            f"{name:5s}  loss {figures['loss_before']:.3f} -> {figures[f'loss_{name}']:.4f}, "
            f"state {figures[f'state_{name}'] / 1024:.0f} KiB"
        )
