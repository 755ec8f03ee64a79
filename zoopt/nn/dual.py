"""Our own operators in dual numbers, which `zoopt.ForwardGrad` evaluates models in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _NoContext:
    """A context of a forward pass that no backward pass follows."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep nothing."""


def apply(function: Any, *args: Any) -> Tensor:
    """function.apply(*args) of a torch.autograd.Function without `jvp`.

    In dual numbers the function's forward pass itself, made of torch's operators, which have
    forward derivatives; inside `apply` the tangents would be lost.
    """
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        made: Tensor = function.apply(*args)
    else:
        made = function.forward(_NoContext(), *args)
    return made
