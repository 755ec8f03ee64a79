"""Splits a model: backprop for the last layer, and forward passes only for all others.

Two optimizers share the model's named parameters, which are divided by name. `zoopt.Hybrid`
combines them into one optimizer. Autograd stores nothing for the layers before the head, so a step
takes little more memory than one of MeZO. The data are the two spirals of `01_mlp.py`. For
comparison, the same network is trained by MeZO, by backprop on the head only, and by backprop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import zoopt


def spirals(points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (points, 2) on two spiral arms, and the arm that each belongs to."""
    arm = torch.arange(points) % 2
    radius = torch.rand(points, generator=generator) + 0.2
    angle = 3.0 * radius + torch.pi * arm
    noise = 0.03 * torch.randn(points, 2, generator=generator)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1) + noise, arm


class Network(nn.Module):
    """Five hidden layers and a head."""

    def __init__(self, width: int = 32, depth: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(width if i else 2, width), nn.Tanh()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 2)

    def forward(self, points: Tensor) -> Tensor:
        """Logits (points, 2)."""
        logits: Tensor = self.head(self.body(points))
        return logits


def by_mezo(model: Network) -> torch.optim.Optimizer:
    """All layers by forward passes."""
    return zoopt.MeZO(model.named_parameters(), lr=1e-2, seed=0)


def by_hybrid(model: Network) -> torch.optim.Optimizer:
    """The head by backprop, the other layers by forward passes."""
    named = list(model.named_parameters())
    early = [(name, param) for name, param in named if not name.startswith("head.")]
    late = [(name, param) for name, param in named if name.startswith("head.")]
    return zoopt.Hybrid(zoopt.MeZO(early, lr=1e-2, seed=0), torch.optim.AdamW(late, lr=1e-2))


def by_head(model: Network) -> torch.optim.Optimizer:
    """The head by backprop; the other layers are frozen."""
    model.body.requires_grad_(False)
    return torch.optim.AdamW(model.head.named_parameters(), lr=1e-2)


def by_backprop(model: Network) -> torch.optim.Optimizer:
    """All layers by backprop."""
    return torch.optim.AdamW(model.named_parameters(), lr=1e-2)


class LiveBytes(TorchDispatchMode):
    """Tracks the results of operators; `peak` is the greatest number of their bytes alive at once.

    Args:
        known: existing tensors, which do not count.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count the new storages among its results."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage() not in self.seen:
                storage = value.untyped_storage()
                self.seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, size: int) -> None:
        """Subtract a freed storage."""
        self.live -= size


def train(
    optimizer_of: Callable[[Network], torch.optim.Optimizer], steps: int
) -> tuple[float, int]:
    """Train for `steps` steps; return the loss, and the peak of bytes beside the weights."""
    torch.manual_seed(0)
    inputs, targets = spirals(256, torch.Generator().manual_seed(1))
    model = Network()
    optimizer = optimizer_of(model)

    def closure() -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    def step() -> None:
        if isinstance(optimizer, zoopt.MeZO | zoopt.Hybrid):
            optimizer.step(closure)
        else:
            closure().backward()
            optimizer.step()
            optimizer.zero_grad()

    with LiveBytes(inputs, targets, *model.parameters()) as meter:
        for _ in range(2):  # The first step creates the optimizer's state, the second has it.
            step()
    for _ in range(steps - 2):
        step()
    with torch.no_grad():
        return closure().item(), meter.peak


def main(steps: int = 500) -> dict[str, float]:
    """Train in all four ways; return the losses, and the peaks of bytes beside the weights."""
    figures: dict[str, float] = {}
    for way in (by_mezo, by_hybrid, by_head, by_backprop):
        name = way.__name__.removeprefix("by_")
        figures[f"loss_{name}"], figures[f"bytes_{name}"] = train(way, steps)
    return figures


if __name__ == "__main__":
    figures = main()
    for name in ("mezo", "hybrid", "head", "backprop"):
        print(
            f"{name:8} loss {figures[f'loss_{name}']:.4f}, "
            f"{figures[f'bytes_{name}'] / 1024:4.0f} KiB beside the weights"
        )
