"""Losses that a caller's functions return, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def checked_loss(name: str, loss: Any) -> Tensor:
    """The loss that a function has returned.

    Args:
        name: of the argument with the function.

    Raises:
        ValueError: it is no number with a graph.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    what = type(loss).__name__
    if isinstance(loss, Tensor):
        what = "one without" if loss.numel() == 1 else f"a tensor of shape {tuple(loss.shape)}"
    raise ValueError(
        f"{name} must return a loss with a graph to the model's parameters, got {what}; return "
        f"model(**batch).loss, and not its value"
    )


def gradients(loss: Callable[[], Tensor], weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a loss, without touching `.grad`; None for weights on which it does not
    depend.

    Raises:
        ValueError: `loss` returns no number with a graph.
    """
    with torch.enable_grad():
        value = checked_loss("losses", loss())
        return torch.autograd.grad(value, list(weights), allow_unused=True)
