"""Evaluations of the user's closure: what it may return, and the randomness it sees."""

from __future__ import annotations

import functools
import math
import random  # noqa: TID251 - the user's own state, which is put back where it was
import sys
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from zoopt.dtypes import NARROW
from zoopt.kernels import dispatch
from zoopt.kernels.dispatch import known

Closure = Callable[[], Any]

#: What torch says to a backward pass without a graph.
_NO_GRAPH = "does not require grad and does not have a grad_fn"
CALLS_BACKWARD = (
    "the closure of a zeroth-order optimizer evaluates the loss and returns it, got one that calls "
    "backward: leave the backward pass out; where gradients are wanted use an optimizer of "
    "torch's or zoopt.AdamW, or zoopt.Hybrid for both"
)


def check_closure(closure: Any, caller: str) -> None:
    """Raise unless `closure` can be called."""
    if not callable(closure):
        raise TypeError(
            f"{caller} needs a closure that evaluates the loss and returns it, got "
            f"{type(closure).__name__}; pass a function without arguments"
        )


#: A loss: a number, or one that is still on a device, float64, ().
Loss = float | Tensor


def loss_value(result: Any) -> float:
    """What the closure returned, as a float: `loss_values` of one `loss_of`."""
    return loss_values([loss_of(result)])[0]


def loss_values(losses: Sequence[Loss]) -> list[float]:
    """The losses as floats; the devices that some are on are waited for once."""
    late = [loss for loss in losses if isinstance(loss, Tensor)]
    values = iter(torch.stack([loss.to(late[0].device) for loss in late]).tolist() if late else ())
    return [next(values) if isinstance(loss, Tensor) else loss for loss in losses]


def loss_of(result: Any) -> Loss:
    """What the closure returned: a copy on its device, if to read it is to wait for a device.

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
        check_value("the closure must return a loss", result)
        if dispatch.waits(result):
            # A copy: a captured graph returns all its losses in one tensor's memory.
            return result.detach().to(torch.float64, copy=True).view(())
        return known(result, 1.0)
    if isinstance(result, Real):
        return real(result)
    remedy = "end it with `return loss`" if result is None else "return the loss itself"
    raise TypeError(
        f"the closure must return a float, an int or a tensor of one element, got "
        f"{type(result).__name__}; {remedy}"
    )


def check_value(wanted: str, result: Tensor) -> None:
    """Raise if a tensor has no value."""
    if result.is_meta and not dispatch.is_fake(result):
        raise TypeError(
            f"{wanted} with a value, got one on the meta device; load the model's weights, and "
            f"leave torch.device('meta') before"
        )


def real(number: Any) -> float:
    """A number in float64; one that is too large is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def narrow_eps(value: Any) -> float:
    """The relative spacing of numbers like this one, where it has 16 bits; otherwise 0."""
    if isinstance(value, np.float16):
        return float(np.finfo(np.float16).eps)
    narrow = isinstance(value, Tensor) and value.dtype in NARROW
    return torch.finfo(value.dtype).eps if narrow else 0.0


class RecordedLosses:
    """A closure that returns losses which were measured before, one after the other.

    Nothing is evaluated, so nothing has to be perturbed virtually.
    """

    def __init__(self, losses: Iterable[float]) -> None:
        self._losses = iter(losses)

    def __call__(self) -> float:
        """The next loss.

        Raises:
            EOFError: there is none.
        """
        for loss in self._losses:
            return loss
        raise EOFError("the record has no more losses, and the step asks for another one")

    @property
    def rest(self) -> int:
        """How many losses are left; they are gone then."""
        return sum(1 for _ in self._losses)


class PinnedRNG:
    """All evaluations of one probe see the random state that the first one saw.

    Afterwards the state is the one that a single evaluation would have left behind. Covers torch's
    generators, that of the CPU and that of each CUDA device in `devices`, and the global ones of
    Python's `random` and of numpy, from which data augmentation draws.

    Args:
        devices: where parameters are.
        draws: whether what is evaluated can draw random numbers; if not, nothing is pinned.
    """

    def __init__(self, devices: Iterable[torch.device], *, draws: bool = True) -> None:
        self._generators: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
            (torch.get_rng_state, torch.set_rng_state),
            (random.getstate, random.setstate),
        ]
        for index in sorted({device.index or 0 for device in devices if device.type == "cuda"}):
            get = functools.partial(torch.cuda.get_rng_state, index)
            put = functools.partial(torch.cuda.set_rng_state, device=index)
            self._generators.append((get, put))
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"]
            self._generators.append((numpy.random.get_state, numpy.random.set_state))
        if not draws:
            self._generators.clear()
        self._before = self._get()
        self._after: list[Any] | None = None
        #: The relative spacing of numbers like the losses, where one was of 16 bits; otherwise 0.
        self.eps = 0.0

    # An active mode, such as that of fake tensors, would turn the states into its own tensors.

    def _get(self) -> list[Any]:
        if not self._generators:
            return []
        with _disable_current_modes():
            return [get() for get, _ in self._generators]

    def _set(self, states: list[Any]) -> None:
        if not states:
            return
        with _disable_current_modes():
            for (_, put), state in zip(self._generators, states, strict=True):
                put(state)

    def evaluate(self, closure: Closure) -> Loss:
        """The closure's loss, under the pinned state and without autograd."""
        if self._after is not None:
            self._set(self._before)
        # Under autocast, the casts of weights that move in place would stay those of where the
        # weights stood, here and for whoever reads them next.
        torch.clear_autocast_cache()
        try:
            with torch.no_grad():
                result = closure()
        except RuntimeError as error:
            if _NO_GRAPH in str(error):
                raise RuntimeError(CALLS_BACKWARD) from error
            raise
        finally:
            torch.clear_autocast_cache()
        states = self._get()
        if self._after is None:
            self._after = states
        else:
            self._set(self._after)
        loss = loss_of(result)
        self.eps = max(self.eps, narrow_eps(result))
        return loss
