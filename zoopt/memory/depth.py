"""The repeated layers of a model, and models with fewer of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

#: Patterns of layers (such as full attention in every sixth) have at most this many layers.
_LONGEST_PATTERN = 8
#: Attributes in which equal layers differ.
_NUMBERS = ("idx", "index", "layer_id", "layer_number")


@dataclasses.dataclass(frozen=True)
class Stack:
    """A run of equal layers, or of equal patterns of layers.

    Attributes:
        name: of the module that holds them, an nn.ModuleList or nn.Sequential.
        start: the position of the first.
        period: after how many layers the pattern repeats.
        units: how many times the pattern occurs.
    """

    name: str
    start: int
    period: int
    units: int


def stacks_of(model: nn.Module, least: int) -> list[list[Stack]]:
    """The model's stacks of at least `least` units, those of equally many units together.

    Lists of equal length may belong together, for example layers and their norms.
    """
    families: dict[int, list[Stack]] = {}
    for stack in _find(model, "", least):
        families.setdefault(stack.units, []).append(stack)
    return list(families.values())


def _find(module: nn.Module, name: str, least: int) -> Iterator[Stack]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        stack = _repetition(list(module), name, least)
        if stack is not None:
            yield stack
            return
    for child_name, child in module.named_children():
        yield from _find(child, f"{name}.{child_name}" if name else child_name, least)


def _repetition(layers: Sequence[nn.Module], name: str, least: int) -> Stack | None:
    """The stack with most of the layers, with the shortest pattern that repeats in it."""
    numbers: dict[Any, int] = {}
    kinds = [numbers.setdefault(_signature(layer), len(numbers)) for layer in layers]
    best: Stack | None = None
    for period in range(1, _LONGEST_PATTERN + 1):
        start = 0
        while start + period * least <= len(kinds):
            end = start + period
            while end < len(kinds) and kinds[end] == kinds[end - period]:
                end += 1
            units = (end - start) // period
            if units >= least and (best is None or units * period > best.units * best.period):
                best = Stack(name, start, period, units)
            start = end - period + 1
    return best


def _signature(layer: nn.Module) -> Any:
    """What equal layers have in common: kinds of modules, shapes, dtypes and settings."""
    modules = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, repr(value))
            for key, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str | tuple | type(None))
            and not key.endswith(_NUMBERS)
        )
        tensors = tuple(
            (key, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        )
        modules.append((name, type(module), settings, tensors))
    return tuple(modules)


def shortened(model: nn.Module, stacks: Sequence[tuple[Stack, int]]) -> nn.Module:
    """A copy of the model in which each stack has that many units; the model stays as it is."""
    removed: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
    try:
        for stack, units in stacks:
            holder = model.get_submodule(stack.name)
            layers = list(holder._modules.values())
            removed.append((holder, holder._modules))
            dropped = stack.period * (stack.units - units)
            end = stack.start + stack.period * stack.units
            kept = [*layers[: end - dropped], *layers[end:]]
            holder._modules = {str(i): layer for i, layer in enumerate(kept)}
        return copy.deepcopy(model)
    finally:
        for holder, modules in removed:
            holder._modules = modules
