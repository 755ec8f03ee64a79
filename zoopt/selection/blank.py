"""State for parameters that have taken no step, as torch.distributed.checkpoint requires it."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zoopt.groups import all_params
from zoopt.optimizer import DeclaredStateOptimizer


def add_blank_state(
    optimizer: Optimizer, params: Sequence[Tensor], state_dict: dict[str, Any]
) -> list[int]:
    """Add entries to a state dict for those of the parameters that have no state.

    Their values mean nothing: a load must drop them. The optimizer is left as it is.

    Returns:
        Which parameters these are, by number.
    """
    held = all_params(optimizer.param_groups)
    places = {param: place for place, param in enumerate(held)}
    made = make_blank_state(optimizer, params)
    found = {places[param]: dict(entries) for param, entries in made.items()}
    for param in made:
        optimizer.state.pop(param, None)
    if state_dict["state"] or any(found.values()):
        state_dict["state"].update(found)
    return [number for number, param in enumerate(params) if param in made]


def make_blank_state(optimizer: Optimizer, params: Sequence[Tensor]) -> dict[Tensor, Any]:
    """Make state for those of the parameters that have none. Its values mean nothing.

    Returns:
        That state, of each of them.
    """
    blank = [param for param in params if not optimizer.state.get(param)]
    try:
        _make(optimizer, blank)
    except BaseException:
        for param in blank:
            optimizer.state.pop(param, None)
        raise
    return {param: optimizer.state.get(param, {}) for param in blank}


def _make(optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    """Make state of the parameters, by the declaration or else by a step that changes nothing."""
    if isinstance(optimizer, DeclaredStateOptimizer):
        for group in optimizer.param_groups:
            for param in group["params"]:
                if any(param is one for one in params):
                    optimizer.allocate_state(param, group)
        return
    groups = optimizer.param_groups
    before = [dict(group) for group in groups]
    held = [(p, p.grad, p.requires_grad) for group in groups for p in group["params"]]
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    try:
        for param, *_ in held:
            param.grad = None
        for param in params:
            param.requires_grad_(True).grad = torch.zeros_like(param)
        for group in groups:
            if "lr" in group:
                group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], Tensor) else 0.0
        optimizer._optimizer_step_pre_hooks = collections.OrderedDict()
        optimizer._optimizer_step_post_hooks = collections.OrderedDict()
        type(optimizer).step(optimizer, None)
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks
        for param, grad, required in held:
            param.requires_grad_(required)
            param.grad = grad
        for group, saved in zip(groups, before, strict=True):
            group.clear()
            group.update(saved)
