"""What torch.distributed.checkpoint does to an optimizer, and steps that are none."""

from __future__ import annotations

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
    # Who calls it has imported this module, which takes its time.
    module = sys.modules.get(_MODULE)
    code: CodeType | None = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
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
