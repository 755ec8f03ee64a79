"""Settings of the surrounding program that must not affect updates.

An update computes in its operands' dtypes and on their devices. Autocast, a default device, a
default dtype, inference mode and torch.compile belong to the program: the closure runs under them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


class OwnArithmetic(contextlib.ContextDecorator):
    """A context, or a decorator, in which torch computes as it does in a fresh process.

    Autocast, inference mode and gradients are off, and tensors are made on the CPU and in float32
    by default. If that is so already, entering costs half a microsecond.
    """

    _stack: contextlib.ExitStack | None = None

    def _recreate_cm(self) -> OwnArithmetic:
        return OwnArithmetic()  # a decorated function may call itself

    def __enter__(self) -> None:
        autocast = torch._C._is_any_autocast_enabled()
        device = torch._C._len_torch_function_stack() > 0
        inference = torch.is_inference_mode_enabled()
        gradients = torch.is_grad_enabled()
        dtype = torch.get_default_dtype()
        if not (autocast or device or inference or gradients or dtype != torch.float32):
            return
        with contextlib.ExitStack() as stack:
            if autocast:
                stack.enter_context(torch._C._DisableAutocast())
            if device:
                stack.enter_context(torch.device("cpu"))
            if inference:
                # Tensors made in inference mode, such as state, could not be written outside of it.
                stack.enter_context(torch.inference_mode(False))
            if gradients or inference:  # leaving inference mode turns gradients on
                stack.enter_context(torch.no_grad())
            if dtype != torch.float32:
                stack.callback(torch.set_default_dtype, dtype)
                torch.set_default_dtype(torch.float32)
            self._stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        if self._stack is not None:
            self._stack.close()


def opaque(method: Callable[P, R]) -> Callable[P, R]:
    """A function that torch.compile does not trace: a compiled caller calls it as it is."""

    # torch wraps its own optimizers in this way. It imports the compiler at the first call, as
    # making an optimizer has done already. A cache of our own would be traced itself.
    return _disable_dynamo(method)
