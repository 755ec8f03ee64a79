"""The optimizers under contract: one row a class and variant. Contract tests run over all rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import zoopt
from tests.reference.mezo_float64 import MeZO64


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of an optimizer.

    Attributes:
        cls, options: how it is built.
        oracle: options -> its float64 transcription, with `step(loss, theta)`.
        state_bytes: numel, itemsize -> bytes of state of one parameter.
        invalid: options, and the error with its message.
    """

    name: str
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    oracle: Callable[..., Any]
    state_bytes: Callable[[int, int], int]

    def build(self, model: nn.Module, **options: Any) -> Any:
        return self.cls(model.named_parameters(), **{**self.options, **options})  # type: ignore[call-arg]

    def __str__(self) -> str:
        return self.name


def mezo_oracle(z: Callable[[str, int], np.ndarray], options: dict[str, Any]) -> MeZO64:
    known = {field.name for field in dataclasses.fields(MeZO64)}
    chosen = {name: value for name, value in options.items() if name in known}
    return MeZO64(z=z, one_sided=options.get("estimator") == "one-sided", **chosen)


def mezo(name: str, **options: Any) -> Row:
    buffer = bool(options.get("momentum")) and options.get("momentum_window") is None
    base = {"lr": 1e-3, "zo_eps": 1e-3, "seed": 7}
    return Row(
        f"MeZO {name}".strip(),
        zoopt.MeZO,
        {**base, **options},
        mezo_oracle,
        lambda numel, itemsize: (8 if itemsize == 8 else 4) * numel if buffer else 0,
    )


ROWS = [
    mezo("plain"),
    mezo("probes", num_probes=3),
    mezo("one-sided", estimator="one-sided", num_probes=2),
    mezo("rademacher", distribution="rademacher"),
    mezo("decay", weight_decay=0.1),
    mezo("momentum", momentum=0.9, lr=2e-4),
    mezo("momentum probes decay", momentum=0.9, lr=2e-4, num_probes=2, weight_decay=0.1),
    mezo("window", momentum=0.9, momentum_window=5, lr=2e-4),
    mezo("window one-sided", momentum=0.5, momentum_window=3, estimator="one-sided"),
    mezo("clipped", max_projected_grad=0.5, lr=1e-2),
    mezo("ascent", maximize=True),
]
PERTURBATIONS = ["inplace", "virtual"]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 2))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return model.to(dtype)


def regression(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 6, generator=generator)
    return x.to(dtype), torch.stack((x.sum(1).tanh(), x[:, 0] * x[:, 1]), 1).to(dtype)


def closure_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    x, y = regression(dtype)
    return lambda: (model(x) - y).double().pow(2).mean()
