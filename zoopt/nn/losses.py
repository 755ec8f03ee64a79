"""Losses that a caller's functions return, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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


def functions(losses: Iterable[Callable[[], Tensor]]) -> Iterator[Callable[[], Tensor]]:
    """The functions, one by one.

    Raises:
        TypeError: it holds anything else, or is none that holds anything.
    """
    if callable(losses) or not isinstance(losses, Iterable):
        raise TypeError(_not_functions(type(losses).__name__))
    for loss in losses:
        if not callable(loss):
            raise TypeError(_not_functions(f"[{type(loss).__name__}]"))
        yield loss


def _not_functions(got: str) -> str:
    return (
        f"losses must be functions that return a loss, one for each batch, got {got}; pass "
        f"[lambda: model(**batch).loss]"
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
