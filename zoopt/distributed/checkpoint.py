"""What torch.distributed.checkpoint does to an optimizer, and steps that are none."""

from __future__ import annotations

import inspect
import sys
from types import CodeType

import torch

_MODULE = "torch.distributed.checkpoint.state_dict"
#: Callers between a step and who asked for it: decorators, hooks, schedulers and wrappers.
_DEPTH = 40


def asks_for_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the running step only asks for state to save, or to load a checkpoint into.

    torch.distributed.checkpoint makes an optimizer's state by a step at rate 0 with gradients of 0.
    A training loop can come to such a step too, which counts. So the caller tells them apart.
    """
    return not optimizer.state and called_by_checkpoint()


def called_by_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint is making an optimizer's state, further up the stack."""
    return _called_by("_init_optim_state")


def called_by_load() -> bool:
    """Whether torch.distributed.checkpoint is loading an optimizer's state, further up the stack.

    Of a flattened checkpoint it reads what the optimizer's state has names for.
    """
    return _called_by("_load_optim_state_dict")


def called_by_get() -> bool:
    """Whether torch.distributed.checkpoint asks for an optimizer's state, further up the stack.

    To save it, or to have names and places for what is read from files.
    """
    return _called_by("_get_optim_state_dict")


def _called_by(function: str) -> bool:
    # Who calls it has imported this module, which takes its time.
    module = sys.modules.get(_MODULE)
    found = getattr(module, function, None)
    # Inside its decorators, whose code they share with other functions.
    code: CodeType | None = getattr(inspect.unwrap(found) if found else None, "__code__", None)
    if code is None:
        return False
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame.f_code is code:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
