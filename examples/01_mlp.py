"""A multilayer perceptron in a plain PyTorch loop: the five lines that change from AdamW to MeZO.

The network learns to tell the points of two interleaved spirals apart. There is no backward pass:
each step compares the loss at two points and moves along the line through them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoopt  # changed, 1 of 5


def spirals(points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (points, 2) on two spiral arms, and the arm that each belongs to."""
    arm = torch.arange(points) % 2
    radius = torch.rand(points, generator=generator) + 0.2
    angle = 3.0 * radius + torch.pi * arm
    noise = 0.03 * torch.randn(points, 2, generator=generator)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1) + noise, arm


def main(steps: int = 1000) -> dict[str, float]:
    """Train for `steps` steps; return loss and accuracy before and after."""
    torch.manual_seed(0)
    inputs, targets = spirals(256, torch.Generator().manual_seed(1))
    model = nn.Sequential(
        nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )

    def evaluate() -> tuple[float, float]:
        with torch.no_grad():
            logits = model(inputs)
        accuracy = (logits.argmax(dim=1) == targets).float().mean().item()
        return F.cross_entropy(logits, targets).item(), accuracy

    loss_before, accuracy_before = evaluate()
    # With AdamW: optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = zoopt.MeZO(model.named_parameters(), lr=1e-2)  # changed, 2 of 5
    for _ in range(steps):
        # With AdamW: optimizer.zero_grad()
        #             loss = F.cross_entropy(model(inputs), targets)
        #             loss.backward()
        #             optimizer.step()
        def closure() -> Tensor:  # changed, 3 of 5
            return F.cross_entropy(model(inputs), targets)  # changed, 4 of 5

        optimizer.step(closure)  # changed, 5 of 5

    loss, accuracy = evaluate()
    return {
        "loss_before": loss_before,
        "loss": loss,
        "accuracy_before": accuracy_before,
        "accuracy": accuracy,
    }


if __name__ == "__main__":
    figures = main()
    print(f"loss     {figures['loss_before']:.3f} -> {figures['loss']:.3f}")
    print(f"accuracy {figures['accuracy_before']:.1%} -> {figures['accuracy']:.1%}")
