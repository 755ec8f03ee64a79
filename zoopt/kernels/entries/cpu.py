"""Operations on some entries of a tensor on the CPU: numba does Adam, and torch the rest."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoopt.kernels.adam.cpu import _bytes
from zoopt.kernels.entries import cpu_kernels
from zoopt.kernels.entries.operands import OLDEST, Entries, Rates
from zoopt.kernels.entries.reference import cover_entries, sum_entries
from zoopt.kernels.noise.cpu import _KINDS, _counter, _floats, _parallel, _rounding
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.operands import address
from zoopt.kernels.runtime.intrinsics import f32

__all__ = ["adam_entries", "cover_entries", "sum_entries"]


@functools.lru_cache(maxsize=16)
def corrections(beta: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As `operands.corrections`, and none of torch's memory."""
    age = np.arange(OLDEST + 1, dtype=np.float64)
    return (1.0 - beta**age).astype(np.float32)


def adam_entries(
    theta: Tensor,
    gradient: Tensor,
    entries: Entries,
    betas: tuple[float, float],
    rates: Rates,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.adam_entries."""
    index, base, age = entries.positions, entries.base, entries.age
    tables = [corrections(beta) for beta in betas]
    _parallel(
        cpu_kernels.adam_entries,
        entries.exp_avg.numel(),
        cpu_kernels.TILE,
        _bytes(theta),
        _KINDS[theta.dtype],
        _bytes(gradient),
        _KINDS[gradient.dtype],
        None if index is None else (address(index, torch.int32), index.numel(), np.int32(0)),
        None if base is None else _bytes(base),
        _floats(entries.exp_avg),
        _floats(entries.exp_avg_sq),
        (address(age, torch.int16), age.numel(), np.int16(0)),
        *((own.ctypes.data, own.size, f32(0)) for own in tables),
        tuple(map(f32, rates.adam)),
        f32(rates.decay),
        _counter(key),
        _rounding(rounding_draw),
    )
