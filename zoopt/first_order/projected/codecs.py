"""The codec seam: which state tensors hold a moment, or a basis, and their way in and out."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zoopt.kernels.adam.moments import BLOCK, Format, Moment
from zoopt.optimizer import TensorSpec

#: Moments of fewer elements stay float32: codes would save too little to be worth the error.
MIN_QUANTISED = 4096


def format_of(shape: tuple[int, ...], state_dtype: Format) -> Format:
    """The format of a moment of this shape, if `state_dtype` is requested."""
    small = math.prod(shape) < MIN_QUANTISED
    return "float32" if state_dtype in BLOCK and small else state_dtype


@functools.cache
def moment_specs(
    name: str,
    shape: tuple[int, ...],
    state_dtype: Format,
    *,
    signed: bool,
    accumulator: torch.dtype = torch.float32,
) -> Mapping[str, TensorSpec]:
    """The state tensors that hold one moment: `name` and, for codes, `name`_scale."""
    fmt = format_of(shape, state_dtype)
    if fmt == "float32":
        return {name: TensorSpec(shape, accumulator)}
    if fmt == "bfloat16":
        return {name: TensorSpec(shape, torch.bfloat16)}
    numel = math.prod(shape)
    scale = TensorSpec((-(-numel // BLOCK[fmt]),), torch.float32)
    if fmt == "int8":
        codes = TensorSpec(shape, torch.int8 if signed else torch.uint8)
    else:
        codes = TensorSpec((-(-numel // 2),), torch.uint8)
    return {name: codes, f"{name}_scale": scale}


def coded_units(
    specs: Mapping[str, TensorSpec], shape: tuple[int, ...], state_dtype: Format
) -> dict[str, int]:
    """Of the state tensors that hold codes and scales of moments of this shape, how many elements
    an entry stands for; nothing where moments are not coded."""
    fmt, units = format_of(shape, state_dtype), dict[str, int]()
    for name in specs if fmt in BLOCK else ():
        if f"{name}_scale" in specs:
            units[name] = 1 if fmt == "int8" else 2
            units[f"{name}_scale"] = BLOCK[fmt]
    return units


def moment(state: dict[str, Tensor], name: str, numel: int, *, signed: bool) -> Moment:
    """The moment of that name in a parameter's state."""
    return Moment(state[name], state.get(f"{name}_scale"), numel, signed)
