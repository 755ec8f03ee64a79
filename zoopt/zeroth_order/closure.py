"""Evaluations of the user's closure: what it may return, and the randomness it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]


def check_closure(closure: Any, caller: str) -> None:
    """Raise unless `closure` can be called."""
    if not callable(closure):
        raise TypeError(
            f"{caller} needs a closure that evaluates the loss and returns it, got "
            f"{type(closure).__name__}; pass a function without arguments"
        )


def loss_value(result: Any) -> float:
    """What the closure returned, as a float.

    Raises:
        TypeError: it is no number, or has no value.
        ValueError: it is a tensor of more or less than one element, or complex.
    """
    if isinstance(result, Tensor):
        if result.numel() != 1 or result.is_complex():
            raise ValueError(
                f"the closure must return one real number, got a {result.dtype} tensor of shape "
                f"{tuple(result.shape)}; reduce it first, with .mean() say"
            )
        return float(result.item())
    if isinstance(result, Real):
        return float(result)
    remedy = "end it with `return loss`" if result is None else "return the loss itself"
    raise TypeError(
        f"the closure must return a float, an int or a tensor of one element, got "
        f"{type(result).__name__}; {remedy}"
    )


class PinnedRNG:
    """All evaluations of one probe see the torch RNG state that the first one saw.

    Afterwards the state is the one that a single evaluation would have left behind. Covers the
    CPU's generator and that of each CUDA device in `devices`.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._before = self._get()
        self._after: list[Tensor] | None = None

    def _get(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self._cuda)]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for index, state in zip(self._cuda, states[1:], strict=True):
            torch.cuda.set_rng_state(state, index)

    def evaluate(self, closure: Closure) -> float:
        """The closure's loss, under the pinned state and without autograd."""
        if self._after is not None:
            self._set(self._before)
        with torch.no_grad():
            result = closure()
        states = self._get()
        if self._after is None:
            self._after = states
        else:
            self._set(self._after)
        return loss_value(result)
