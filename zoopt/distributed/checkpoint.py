"""Recognises calls from torch.distributed.checkpoint; some of its steps are not real ones."""

from __future__ import annotations

import inspect
import sys
from types import CodeType

import torch

_MODULE = "torch.distributed.checkpoint.state_dict"
#: How many callers may lie in between: decorators, hooks, schedulers and wrappers.
_DEPTH = 40


def asks_for_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the current step only serves to create state for saving or loading a checkpoint.

    torch.distributed.checkpoint creates an optimizer's state with a step at learning rate 0 and
    zero gradients. A training loop can take the same step, and there it counts. The call stack
    tells the two apart.
    """
    return not optimizer.state and called_by_checkpoint()


def called_by_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint, further up the stack, is creating an optimizer's
    state."""
    return _called_by("_init_optim_state")


def called_by_load() -> bool:
    """Whether torch.distributed.checkpoint, further up the stack, is loading an optimizer's state.

    From a flattened checkpoint it reads only entries whose names the optimizer's state has.
    """
    return _called_by("_load_optim_state_dict")


def called_by_get() -> bool:
    """Whether torch.distributed.checkpoint, further up the stack, is reading an optimizer's state.

    It does this to save the state, or to find the tensors into which it loads a checkpoint.
    """
    return _called_by("_get_optim_state_dict")


def _called_by(function: str) -> bool:
    # Do not import the module: that is slow, and a caller from it has already imported it.
    module = sys.modules.get(_MODULE)
    found = getattr(module, function, None)
    # Unwrap the function: other functions share the code of its decorators.
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
