"""The most valuable tensors under a budget for the backward pass, and the cost of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a tensor in the backward pass, in floating-point operations.

    Attributes:
        reach: propagating the gradient here from the previous tensor of the backward pass.
        own: computing the tensor's own gradient.
    """

    reach: int
    own: int


def choose(costs: Sequence[tuple[int, int]], worth: Sequence[float], budget: int) -> list[int]:
    """Find the set of greatest total worth whose backward pass costs at most `budget`, exactly.

    Training a set costs the `reach` of all tensors up to its last one, plus the `own` of each of
    its tensors. Let k be the last tensor of the set. Let K_{k-1}[b] be the greatest worth of
    tensors before k whose own costs sum to at most b. Then

        best = max_k I_k + K_{k-1}[B - sum_{j<=k} reach_j - own_k]

    in O(N B); K is a 0/1 knapsack.

    Args:
        costs: integers, (reach, own) of each tensor, in the order of the backward pass.
        worth: the worth of each tensor; those with worth <= 0 are never chosen.
        budget: B.

    Returns:
        The numbers of the chosen tensors, ascending; empty if nothing of worth fits.
    """
    best, last, room = 0.0, -1, 0
    table = np.zeros((len(costs) + 1, budget + 1))
    reached = 0
    for k, (reach, own) in enumerate(costs):
        reached += reach
        before, now = table[k], table[k + 1]
        now[:] = before
        if worth[k] <= 0.0:
            continue
        left = budget - reached - own
        if left >= 0 and worth[k] + before[left] > best:
            best, last, room = worth[k] + before[left], k, left
        if own <= budget:
            np.maximum(now[own:], before[: budget + 1 - own] + worth[k], out=now[own:])
    chosen = [last] if last >= 0 else []
    for k in range(last - 1, -1, -1):
        # If K_k is greater than K_{k-1} here, tensor k was chosen.
        if table[k + 1][room] > table[k][room]:
            chosen.append(k)
            room -= costs[k][1]
    return sorted(chosen)


def in_units(costs: Sequence[Cost], units: int) -> list[tuple[int, int]]:
    """Express costs in units of 1/`units` of their sum. Cumulative costs are rounded up, so that
    the cost of a set is never underestimated."""
    total = sum(cost.reach + cost.own for cost in costs)
    reached, before, made = 0, 0, []
    for cost in costs:
        reached += cost.reach
        now = -(-reached * units // total)
        made.append((now - before, -(-cost.own * units // total)))
        before = now
    return made


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations of a backward pass that count, each with its graph node."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # This imports triton, whose interpreter cannot be chosen afterwards.
        from torch.utils.flop_counter import flop_registry

        self._counts: dict[Any, Any] = flop_registry
        #: (floating-point operations, address of the result's storage, graph node).
        self.events: list[tuple[int, int, Any]] = []
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = self._counts.get(func._overloadpacket)
        if count is not None:
            flops = int(count(*args, **(kwargs or {}), out_val=out))
            first = out[0] if isinstance(out, tuple) else out
            # Keep the storage alive, so that its address is not reused for another tensor.
            self._alive.append(first.detach())
            storage = first.untyped_storage().data_ptr()
            self.events.append((flops, storage, torch._C._current_autograd_node()))
        return out


def backward_costs(loss: Tensor, params: Sequence[nn.Parameter]) -> tuple[list[int], list[Cost]]:
    """Run the loss's backward pass, and count the cost of training each parameter.

    An operation whose result is a parameter's gradient counts as that parameter's own. Other
    operations of the same graph node propagate the gradient, so they count for the next parameter.

    Returns:
        The numbers of the parameters in the order in which the backward pass reached them, and
        their costs.
    """
    trace, order = _Trace(), []
    marks: dict[int, tuple[int, int]] = {}

    def reached(number: int, grad: Tensor) -> None:
        # No counted operation makes a sparse gradient.
        dense = grad.layout == torch.strided
        marks[number] = (len(trace.events), grad.untyped_storage().data_ptr() if dense else -1)
        order.append(number)

    hooks = [
        param.register_hook(lambda grad, number=number: reached(number, grad))  # type: ignore[no-untyped-call]
        for number, param in enumerate(params)
    ]
    try:
        with trace:
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    owner: dict[int, int] = {}
    for number in order:
        end, storage = marks[number]
        for event in range(end - 1, -1, -1):
            if trace.events[event][1] == storage and event not in owner:
                owner[event] = number
                break
    nodes = {trace.events[event][2]: number for event, number in owner.items()}
    own = dict.fromkeys(order, 0)
    reach = dict.fromkeys(order, 0)
    rank = {number: place for place, number in enumerate(order)}
    ends = [marks[number][0] for number in order]
    for event, (flops, _, node) in enumerate(trace.events):
        if event in owner:
            own[owner[event]] += flops
            continue
        place = int(np.searchsorted(ends, event, side="right"))
        if node is not None and node in nodes:
            place = max(place, rank[nodes[node]] + 1)
        if place < len(order):
            reach[order[place]] += flops
    return order, [Cost(reach[number], own[number]) for number in order]
