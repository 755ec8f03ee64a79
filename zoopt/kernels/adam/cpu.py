"""Adam on the CPU: numba decodes, updates and encodes moments a tile at a time, in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoopt.kernels.adam import cpu_kernels as cpu_adam_kernels
from zoopt.kernels.adam.cpu_kernels import MODES, TILE
from zoopt.kernels.adam.cpu_moments import FORMATS
from zoopt.kernels.adam.moments import Moment
from zoopt.kernels.adam.reference import Average, Mode, Numbers
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.cpu import _KINDS, _counter, _floats, _parallel, _rounding
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.operands import address
from zoopt.kernels.runtime.intrinsics import f32
from zoopt.kernels.runtime.spread import Memory

#: Operands are read by their addresses alone, in whatever shape they are contiguous.
SHAPELESS = True
#: The dtypes of values and codes.
_DTYPES = (*_KINDS, torch.int8, torch.uint8)
_BYTE = np.uint8(0)
_NO_SCALE = (0, 0, np.float32(0))
_NO_NORMS = np.empty((2, 0), np.float32)


def _bytes(tensor: Tensor) -> Memory:
    """The memory of a contiguous tensor as bytes."""
    return address(tensor, *_DTYPES), tensor.nbytes, _BYTE


def _moments(*moments: Moment) -> list[Any]:
    """Codes and scales of moments of one format, and the format."""
    arrays: list[Any] = []
    for stored in moments:
        scale = _NO_SCALE if stored.scale is None else _floats(stored.scale)
        arrays += [_bytes(stored.codes), scale]
    return [*arrays, FORMATS[moments[0].format]]


def adam(
    gradient: Tensor,
    first: Moment,
    second: Moment,
    out: Tensor,
    numbers: Numbers,
    key: NoiseKey,
    moment_draw: int | None,
    norms: Tensor | None,
) -> None:
    """See reference_adam.adam."""
    numel = gradient.numel()
    rows = 0 if norms is None else norms.shape[1]
    totals = heads = _NO_NORMS
    if norms is not None:
        totals, heads = norms.numpy(), kept(np.zeros, (2, -(-numel // TILE)), np.float32)
    once(
        _parallel,
        cpu_adam_kernels.adam,
        numel,
        TILE,
        _bytes(gradient),
        _KINDS[gradient.dtype],
        _bytes(out),
        _KINDS[out.dtype],
        *_moments(first, second),
        tuple(map(f32, numbers)),
        _counter(key),
        _rounding(moment_draw),
        totals,
        heads,
        numel // rows if rows else 0,
    )
    if norms is not None:
        row = torch.arange(0, numel, TILE, device="cpu") // (numel // rows)
        once(norms.index_add_, 1, row, torch.from_numpy(heads))


def adamw(
    theta: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    decay: float,
    numbers: Numbers,
    key: NoiseKey,
    moment_draw: int | None,
    rounding_draw: int | None,
) -> None:
    """See reference_adam.adamw."""
    _parallel(
        cpu_adam_kernels.adamw,
        theta.numel(),
        TILE,
        _bytes(theta),
        _KINDS[theta.dtype],
        _bytes(gradient),
        _KINDS[gradient.dtype],
        *_moments(first, second),
        f32(decay),
        tuple(map(f32, numbers)),
        _counter(key),
        _rounding(moment_draw),
        _rounding(rounding_draw),
    )


def average(
    gradient: Tensor,
    stored: Moment,
    out: Tensor,
    numbers: Average,
    mode: Mode,
    moment_draw: int | None,
    key: NoiseKey,
) -> None:
    """See reference.average."""
    _parallel(
        cpu_adam_kernels.average,
        gradient.numel(),
        TILE,
        _bytes(gradient),
        _KINDS[gradient.dtype],
        _bytes(out),
        _KINDS[out.dtype],
        *_moments(stored),
        tuple(map(f32, numbers)),
        MODES[mode],
        stored.signed,
        _counter(key),
        _rounding(moment_draw),
    )
