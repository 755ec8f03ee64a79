"""Training on accuracy itself, an objective that has no derivative.

Accuracy is a step function: its gradient is zero wherever it exists, so backpropagation cannot
train on it. Comparing it at two points still shows a direction of improvement, if the points are
far enough apart that some predictions flip. This is the purpose of the larger `zo_eps`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import zoopt


def blobs(points: int, classes: int, features: int) -> tuple[Tensor, Tensor]:
    """Points (points, features) around one centre for each class, and their classes."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(points) % classes
    centres = 2.0 * torch.randn(classes, features, generator=generator)
    return centres[targets] + torch.randn(points, features, generator=generator), targets


def main(steps: int = 300) -> dict[str, float]:
    """Train for `steps` steps; return the accuracy before and after, in training and held out."""
    torch.manual_seed(0)
    inputs, targets = blobs(points=1000, classes=4, features=8)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    train, held_out = slice(0, 500), slice(500, 1000)

    def accuracy(part: slice) -> float:
        with torch.no_grad():
            predictions = model(inputs[part]).argmax(dim=1)
        return (predictions == targets[part]).float().mean().item()

    optimizer = zoopt.MeZO(
        model.named_parameters(), lr=0.1, zo_eps=0.2, num_probes=4, maximize=True
    )
    before = {"train_before": accuracy(train), "held_out_before": accuracy(held_out)}
    for _ in range(steps):
        optimizer.step(lambda: accuracy(train))
    return {**before, "train": accuracy(train), "held_out": accuracy(held_out)}


if __name__ == "__main__":
    figures = main()
    print(f"accuracy in training {figures['train_before']:.1%} -> {figures['train']:.1%}")
    print(f"accuracy held out    {figures['held_out_before']:.1%} -> {figures['held_out']:.1%}")
