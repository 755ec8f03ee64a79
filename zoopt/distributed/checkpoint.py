"""Recognises calls by torch.distributed.checkpoint, some of which are not real steps."""

from __future__ import annotations

import inspect
import sys
from types import CodeType

import torch

_MODULE = "torch.distributed.checkpoint.state_dict"
#: How many callers may lie in between: decorators, hooks, schedulers and wrappers.
_DEPTH = 40


def asks_for_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the running step is only made to create state, to save or load a checkpoint.

    torch.distributed.checkpoint makes an optimizer's state by a step at rate 0 with gradients of 0.
    A training loop can make such a step too, and then it counts. The caller decides which it is.
    """
    return not optimizer.state and called_by_checkpoint()


def called_by_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint, further up the stack, is making an optimizer's
    state."""
    return _called_by("_init_optim_state")


def called_by_load() -> bool:
    """Whether torch.distributed.checkpoint, further up the stack, is loading an optimizer's state.

    From a flattened checkpoint it reads only entries that the optimizer's state has names for.
    """
    return _called_by("_load_optim_state_dict")


def called_by_get() -> bool:
    """Whether torch.distributed.checkpoint, further up the stack, asks for an optimizer's state.

    It does so to save the state, or to know where to put what it reads from files.
    """
    return _called_by("_get_optim_state_dict")


def _called_by(function: str) -> bool:
    # Importing it is slow, and any caller of it has imported it already.
    module = sys.modules.get(_MODULE)
    found = getattr(module, function, None)
    # The function inside its decorators, whose code other functions share.
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
