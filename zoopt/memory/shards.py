"""What one process has of a model that FSDP2 divides among several."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from zoopt.memory.depth import stacks_of
from zoopt.memory.methods import Method
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer


def plannable(method: Method) -> bool:
    """Whether the method's memory on shards can be planned."""
    return method.kind == "zeroth-order" and not method.graph and method.adapter is None


def in_shards(method: Method) -> Method:
    """The method, with an optimizer that treats its parameters as shards.

    Raises:
        ValueError: its memory on shards cannot be planned.
    """
    if not plannable(method):
        raise ValueError(
            f"processes must be 1 for {method.name}, got more: shards are planned for zeroth-order "
            f"methods that train the whole model"
        )

    def build(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = method.build(model)
        assert isinstance(optimizer, ZerothOrderOptimizer)
        optimizer.as_shards = True
        return optimizer

    return dataclasses.replace(method, build=build)


def divide(model: nn.Module, processes: int) -> None:
    """Replace each parameter by the first process's rows, which are never fewer than another's;
    tied parameters stay tied.

    Raises:
        ValueError: a parameter is a single number, which FSDP2 refuses.
    """
    made: dict[Tensor, nn.Parameter] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if not param.dim():
            raise ValueError(f"processes must be 1 for a model with a scalar parameter, {name!r}")
        if param not in made:
            rows = -(-len(param) // processes)
            part = torch.empty((rows, *param.shape[1:]), dtype=param.dtype, device=param.device)
            made[param] = nn.Parameter(part, param.requires_grad)
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner).register_parameter(own, made[param])


def gathered_bytes(model: nn.Module, processes: int) -> int:
    """The most that FSDP2 gathers at one time in a forward pass.

    Each repeated layer is gathered by itself, and all other parameters before the first of them.
    What is gathered arrives in a buffer, which is kept until the next buffer has arrived.
    """
    layers = [
        layer
        for family in stacks_of(model, 2)
        for stack in family
        for layer in list(model.get_submodule(stack.name).children())[
            stack.start : stack.start + stack.period * stack.units
        ]
    ]
    counted: set[Tensor] = set()

    def padded(module: nn.Module) -> int:
        own = [param for param in dict.fromkeys(module.parameters()) if param not in counted]
        counted.update(own)
        rows = ((-(-len(p) // processes) * processes, math.prod(p.shape[1:]), p) for p in own)
        return sum(count * columns * param.itemsize for count, columns, param in rows)

    largest = max((padded(layer) for layer in layers), default=0)
    rest = padded(model)
    return rest + max(rest + largest, 2 * largest)
