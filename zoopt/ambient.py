"""Updates compute in their own precision, in the open: what the caller's modes do not reach."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

_P = ParamSpec("_P")
_T = TypeVar("_T")


def opaque(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, run as it is where a compiled function calls it: there are no graphs of our
    kernels. What it calls that has been compiled by itself stays compiled."""
    # torch's own optimizers use the same: it imports the compiler when it is first called only.
    return _disable_dynamo(function)


@contextlib.contextmanager
def own_arithmetic(device_type: str = "cpu") -> Iterator[None]:
    """Shield an update from autocast, inference mode, and the default device and dtype.

    Gradients are off. What is in order costs no context.

    Args:
        device_type: where the parameters lie.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            # Tensors that are made in it, state say, could not be written outside.
            stack.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for kind in {"cpu", device_type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.enter_context(_default_dtype(torch.float32))
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
