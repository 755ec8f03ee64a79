"""A model that can be planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model that can be built.

    Attributes:
        name: what the user called it.
        build: (checkpointing) -> the model, on torch's default device and in its default dtype.
        inputs: (batch, sequence length) -> the model's inputs.
        longest: the longest sequence for which it has positions; None if there is no limit.
        sequential: whether its inputs grow with the sequence length.
    """

    name: str
    build: Callable[[bool], nn.Module]
    inputs: Callable[[int, int], Mapping[str, Any]]
    longest: int | None = None
    sequential: bool = True
