"""Recognises calls from torch.distributed.checkpoint; some of its steps are not real ones."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping
from types import CodeType, FrameType
from typing import Any

import torch

_MODULE = "torch.distributed.checkpoint.state_dict"
_REMEDY = (
    "call optimizer.zero_grad() and optimizer.state.clear() before, and requires_grad_() on "
    "parameters that are frozen"
)
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
    return _caller("_init_optim_state") is not None


def called_by_load() -> bool:
    """Whether torch.distributed.checkpoint, further up the stack, is loading an optimizer's state.

    From a flattened checkpoint it reads only entries whose names the optimizer's state has.
    """
    return _caller("_load_optim_state_dict") is not None


def called_by_get() -> bool:
    """Whether torch.distributed.checkpoint, further up the stack, is reading an optimizer's state.

    It does this to save the state, or to find the tensors into which it loads a checkpoint.
    """
    return _caller("_get_optim_state_dict") is not None


def check_nothing_left_out(
    state_dict: Any, but: Collection[Any] = (), remedy: str = _REMEDY
) -> None:
    """Raise if torch.distributed.checkpoint is loading a checkpoint without a part of its state.

    It leaves out the state of parameters that do not require a gradient, and from a flattened
    checkpoint also what the optimizer has no entry for, and says nothing.

    Args:
        state_dict: what it has made of the checkpoint.
        but: names of parameters whose state is not wanted.
        remedy: the end of the message.
    """
    frame = _caller("_load_optim_state_dict")
    whole = None if frame is None else frame.f_locals.get("state_dict")
    if not isinstance(whole, Mapping) or not isinstance(state_dict, Mapping):
        return
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        return
    names = [name for group in groups for name in group.get("params", ()) if type(name) is str]
    missing = [name for name in names if name not in but and _is_blank(state.get(name))]
    lost = [name for name in missing if _has_state(whole, name)]
    if lost:
        others = f" and of {len(lost) - 1} others" if lost[1:] else ""
        raise RuntimeError(
            f"all state of a checkpoint must be loaded, but torch.distributed.checkpoint has left "
            f"out that of {lost[0]!r}{others}, because the parameter does not require a gradient, "
            f"or the optimizer has other state already; {remedy}"
        )


def _is_blank(entries: Any) -> bool:
    """Whether a parameter's state is absent: torch writes {} for entries that it did not find."""
    if not isinstance(entries, Mapping):
        return entries is None
    return not any(not isinstance(value, Mapping) or value for value in entries.values())


def _has_state(checkpoint: Mapping[str, Any], name: str) -> bool:
    if "state" in checkpoint:
        state = checkpoint["state"]
        return isinstance(state, Mapping) and not _is_blank(state.get(name))
    return any(key.startswith(f"state.{name}.") for key in checkpoint)


def _caller(function: str) -> FrameType | None:
    """The call of a function of torch.distributed.checkpoint further up the stack, if any."""
    # Do not import the module: that is slow, and a caller from it has already imported it.
    module = sys.modules.get(_MODULE)
    found = getattr(module, function, None)
    # Unwrap the function: other functions share the code of its decorators.
    code: CodeType | None = getattr(inspect.unwrap(found) if found else None, "__code__", None)
    if code is None:
        return None
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None or frame.f_code is code:
            return frame
        frame = frame.f_back
    return None
