"""Updates during the backward pass: only one gradient at a time, and bit for bit the same weights.

`zoopt.fuse_backward` is one line between the optimizer and the loop, and the loop does not change.
The example trains a network with and without it, and counts the gradients in memory.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoopt


class GradientBytes:
    """The greatest number of bytes of gradients that exist at once."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.peak = 0
        for param in self.params:
            param.register_hook(self.arrives)

    def arrives(self, gradient: Tensor) -> None:
        """Count a new gradient together with those that still exist."""
        there = sum(p.grad.nbytes for p in self.params if p.grad is not None)
        self.peak = max(self.peak, there + gradient.nbytes)


def main(steps: int = 200) -> dict[str, float]:
    """Train twice for `steps` steps; return losses, bytes and the largest difference."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 16)
    targets = torch.sin(2.0 * inputs[:, :1]) * inputs[:, 1:2]
    layers = [16, 128, 128, 128, 128, 1]
    modules: list[nn.Module] = []
    for m, n in zip(layers[1:], layers, strict=False):
        modules += [nn.Linear(n, m), nn.GELU()]
    start = nn.Sequential(*modules[:-1])

    models, losses, peaks = [], [], []
    for fused in (False, True):
        model = copy.deepcopy(start)
        gradients = GradientBytes(model)
        optimizer = zoopt.GaLoreAdamW(
            model.named_parameters(), lr=3e-3, rank=32, scale=1.0, update_proj_gap=50, seed=0
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        if fused:
            zoopt.fuse_backward(model, optimizer)  # the one line
        for _ in range(steps):
            loss = F.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        models.append(model)
        losses.append(F.mse_loss(model(inputs), targets).item())
        peaks.append(gradients.peak)

    pairs = zip(*(model.parameters() for model in models), strict=True)
    return {
        "loss_before": F.mse_loss(start(inputs), targets).item(),
        "loss_unfused": losses[0],
        "loss": losses[1],
        "gradient_bytes_unfused": peaks[0],
        "gradient_bytes": peaks[1],
        "largest_gradient_bytes": max(p.nbytes for p in start.parameters()),
        "difference": max((p - q).abs().max().item() for p, q in pairs),
    }


if __name__ == "__main__":
    figures = main()
    print(f"loss {figures['loss_before']:.3f} -> {figures['loss']:.3f}")
    print(
        f"gradients alive at once: {figures['gradient_bytes_unfused'] / 1024:.0f} KiB, fused "
        f"{figures['gradient_bytes'] / 1024:.0f} KiB"
    )
    print(f"largest difference between the two runs' weights: {figures['difference']}")
