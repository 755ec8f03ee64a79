"""What tests compare: the bits of two models, the bytes of an optimizer's state."""

from __future__ import annotations

from typing import Any

import torch


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(p.view(torch.uint8), q.view(torch.uint8))
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def equal(first: Any, second: Any) -> bool:
    """Whether two state dicts agree to the bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)
