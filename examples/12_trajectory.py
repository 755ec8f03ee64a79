"""A fine-tuning run as a file of a few kilobytes: replay it, revert it, merge it with another one.

A step of MeZO is recorded as two losses, so a run of 400 steps is a file of 7 KB, whatever the
model's size. With the base weights, the file rebuilds the trained weights bit for bit, without any
data.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import zoopt
from zoopt.trajectory import merge, revert


def task(frequency: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A function of two numbers to learn: a sine, on a separate part of the plane for each task."""
    generator = torch.Generator().manual_seed(int(10 * frequency))
    x = torch.rand(256, 2, generator=generator) + torch.tensor([frequency, -frequency])
    return x, torch.sin(frequency * x.sum(1, keepdim=True)) + 0.5 * x[:, :1]


def main(steps: int = 400) -> dict[str, float]:
    """Record a run on each of two tasks; return the losses and the size of a file."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))
    tasks = {"one": task(1.0), "two": task(2.0)}

    def loss(model: nn.Module, name: str) -> torch.Tensor:
        x, y = tasks[name]
        return (model(x) - y).square().mean()

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        figures = {f"base_{name}": loss(base, name).item() for name in tasks}
        trained = {}
        for seed, name in enumerate(tasks):
            model = trained[name] = copy.deepcopy(base)
            optimizer = zoopt.MeZO(
                model.named_parameters(), lr=3e-3, seed=seed, record=Path(folder, name)
            )
            for _ in range(steps):
                optimizer.step(lambda model=model, name=name: loss(model, name))
            optimizer.recorder.close()
            figures[f"trained_{name}"] = loss(model, name).item()

        replayed = copy.deepcopy(base)
        zoopt.replay(replayed, Path(folder, "one"))
        pairs = zip(replayed.parameters(), trained["one"].parameters(), strict=True)
        figures["same_bits"] = float(all(torch.equal(p, q) for p, q in pairs))
        figures["bytes"] = Path(folder, "one").stat().st_size

        revert(replayed, Path(folder, "one"), until=0)
        figures["reverted_one"] = loss(replayed, "one").item()

        merged = copy.deepcopy(base)
        merge(merged, [Path(folder, name) for name in tasks], [0.5, 0.5])
        figures |= {f"merged_{name}": loss(merged, name).item() for name in tasks}
    return figures


if __name__ == "__main__":
    figures = main()
    print(f"400 steps are {figures['bytes']:,.0f} bytes; replayed, same bits:", end=" ")
    print(bool(figures["same_bits"]))
    for name in ("one", "two"):
        values = [figures[f"{kind}_{name}"] for kind in ("base", "trained", "merged")]
        print("loss on task {}: base {:.3f}, trained {:.3f}, merged {:.3f}".format(name, *values))
