"""The best choice of tensors under a budget of the backward pass, and what each one costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a tensor costs in the backward pass, in floating-point operations.

    Attributes:
        reach: to bring the gradient from the tensor before it, in the order of the backward pass.
        own: to make the tensor's own gradient.
    """

    reach: int
    own: int


def choose(costs: Sequence[tuple[int, int]], worth: Sequence[float], budget: int) -> list[int]:
    """The tensors of most worth whose backward pass costs at most `budget`, exactly.

    Training a set costs the `reach` of all tensors up to its last one, and the `own` of each. With
    k the last of a set, and K_{k-1}[b] the most that tensors before it are worth whose own costs
    are at most b:

        best = max_k I_k + K_{k-1}[B - sum_{j<=k} reach_j - own_k]

    in O(N B), K being a 0/1 knapsack.

    Args:
        costs: whole numbers, (reach, own) of each tensor, in the order of the backward pass.
        worth: of each; those of no worth are left out.
        budget: B.

    Returns:
        The numbers of the chosen, ascending; none where nothing of worth fits.
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
        # Where K_k has more than K_{k-1}, tensor k is what it has more.
        if table[k + 1][room] > table[k][room]:
            chosen.append(k)
            room -= costs[k][1]
    return sorted(chosen)


def in_units(costs: Sequence[Cost], units: int) -> list[tuple[int, int]]:
    """Costs in `units` equal parts of their sum: running sums are rounded up, so that no set costs
    less than it does."""
    total = sum(cost.reach + cost.own for cost in costs)
    reached, before, made = 0, 0, []
    for cost in costs:
        reached += cost.reach
        now = -(-reached * units // total)
        made.append((now - before, -(-cost.own * units // total)))
        before = now
    return made


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of a backward pass that count, each with its node of the graph."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: Operations, result's storage, node.
        self.events: list[tuple[int, int, Any]] = []
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = int(count(*args, **(kwargs or {}), out_val=out))
            first = out[0] if isinstance(out, tuple) else out
            # A storage that is freed might be another's next: as long as this lives, it is not.
            self._alive.append(first.detach())
            storage = first.untyped_storage().data_ptr()
            self.events.append((flops, storage, torch._C._current_autograd_node()))
        return out


def backward_costs(loss: Tensor, params: Sequence[nn.Parameter]) -> tuple[list[int], list[Cost]]:
    """Run the loss's backward pass, and count what it costs to train each parameter.

    An operation whose result is a parameter's gradient is that one's own. The others of the same
    node of the graph pass the gradient on, hence count for what comes after it.

    Returns:
        The numbers of the parameters that were reached, in the order in which they were, and their
        costs.
    """
    trace, order = _Trace(), []
    marks: dict[int, tuple[int, int]] = {}

    def reached(number: int, grad: Tensor) -> None:
        marks[number] = (len(trace.events), grad.untyped_storage().data_ptr())
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
