"""The operations on the CPU: numba, one tile at a time in the first-level cache.

A tile of theta is decoded to float32, directions are added to it, and it is encoded back, so each
operation reads and writes memory once however many directions it adds.

Kernels release the GIL and run on torch.get_num_threads() threads, each on tiles of its own: the
result does not depend on their number.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoopt.kernels.batch import Batch
from zoopt.kernels.noise import cpu_kernels, cpu_writes
from zoopt.kernels.noise.cpu_tile import NORMALS_PER_WORD, SIGNS_PER_WORD, TILE
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.writes import Script
from zoopt.kernels.operands import address
from zoopt.kernels.runtime import threads as cpu_threads
from zoopt.kernels.runtime.convert import BFLOAT16, FLOAT16, FLOAT32
from zoopt.kernels.runtime.intrinsics import f32, u16, u32
from zoopt.kernels.runtime.spread import Memory

#: Operands are read by their addresses alone, in whatever shape they are contiguous.
SHAPELESS = True
#: Below this many elements a thread costs more than it saves.
MIN_PER_THREAD = 1 << 15

_WORD, _HALFWORD, _FLOAT = u32(0), u16(0), f32(0)
_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


def _parallel(kernel: Callable[..., None], count: int, unit: int, *args: Any) -> None:
    """Have a kernel do elements 0 ... count - 1, in spans that start at multiples of `unit`."""
    share = cpu_threads.share(count, unit, MIN_PER_THREAD)
    cpu_threads.run(kernel, args, count, share)


def _memory(tensor: Tensor) -> Memory:
    """The memory of a contiguous tensor as integers of its width, (numel,)."""
    width = _WORD if tensor.dtype == torch.float32 else _HALFWORD
    return address(tensor, *_KINDS), tensor.numel(), width


def _floats(tensor: Tensor) -> Memory:
    """The memory of a contiguous float32 tensor."""
    return address(tensor, torch.float32), tensor.numel(), _FLOAT


def _counter(key: NoiseKey) -> tuple[np.uint32, np.uint32, np.uint32, int]:
    """stream, k0, k1, offset: what names the random bits of every kernel."""
    return u32(key.stream), u32(key.seed & 0xFFFFFFFF), u32(key.seed >> 32), key.offset


def _noise(key: NoiseKey) -> tuple[int, np.uint32, np.uint32, np.uint32, int, np.uint16 | None]:
    """per_word, stream, k0, k1, offset, threshold: what names the directions of every kernel."""
    per_word = NORMALS_PER_WORD if key.distribution == "normal" else SIGNS_PER_WORD
    return per_word, *_counter(key), None if key.threshold is None else u16(key.threshold)


def _rounding(draw: int | None) -> int:
    return -1 if draw is None else draw


def weighted_sum(
    theta: Tensor,
    out: Tensor,
    addend: Tensor | None,
    coefficients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    rounding_draw: int | None,
    key: NoiseKey,
) -> None:
    """See reference.weighted_sum."""
    memory = _memory(theta)
    _parallel(
        cpu_kernels.weighted_sum,
        memory[1],
        TILE,
        memory,
        memory if out is theta else _memory(out),
        None if addend is None else _floats(addend),
        _KINDS[theta.dtype],
        np.array(coefficients, np.float32),
        np.array(draws, np.uint32),
        f32(decay),
        *_noise(key),
        _rounding(rounding_draw),
    )


def scaled_rows(
    theta: Tensor, out: Tensor, scales: Tensor, alpha: float, draw: int, key: NoiseKey
) -> None:
    """See reference.scaled_rows."""
    memory = _memory(theta)
    _parallel(
        cpu_kernels.scaled_rows,
        memory[1],
        TILE,
        memory,
        memory if out is theta else _memory(out),
        _floats(scales),
        _KINDS[theta.dtype],
        f32(alpha),
        u32(draw),
        *_noise(key),
    )


def add_stochastic(
    theta: Tensor, addend: Tensor, decay: float, key: NoiseKey, rounding_draw: int
) -> None:
    """theta <- decay theta + addend, both bfloat16 and contiguous, rounded by the draw's bits."""
    _parallel(
        cpu_kernels.add_stochastic,
        theta.numel(),
        TILE,
        _memory(theta),
        _memory(addend),
        f32(decay),
        *_counter(key),
        rounding_draw,
    )


def momentum_sum(
    theta: Tensor,
    buffer: Tensor,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    momentum: float,
    step_size: float,
    rounding_draw: int | None,
    key: NoiseKey,
) -> None:
    """See reference.momentum_sum."""
    _parallel(
        cpu_kernels.momentum_sum,
        theta.numel(),
        TILE,
        _memory(theta),
        _floats(buffer),
        _KINDS[theta.dtype],
        np.array(coefficients, np.float32),
        np.array(gradients, np.float32),
        np.array(draws, np.uint32),
        f32(decay),
        f32(momentum),
        f32(step_size),
        *_noise(key),
        _rounding(rounding_draw),
    )


def adam_window(
    theta: Tensor,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    closes: Sequence[bool],
    draws: Sequence[int],
    decay: float,
    step_size: float,
    eps: float,
    rounding_draw: int | None,
    key: NoiseKey,
) -> None:
    """See reference.adam_window."""
    _parallel(
        cpu_kernels.adam_window,
        theta.numel(),
        TILE,
        _memory(theta),
        _KINDS[theta.dtype],
        *(np.array(numbers, np.float32) for numbers in (coefficients, gradients, first, second)),
        np.array(closes, np.bool_),
        np.array(draws, np.uint32),
        f32(decay),
        f32(step_size),
        f32(eps),
        *_noise(key),
        _rounding(rounding_draw),
    )


def write_each(theta: Tensor, buffer: Tensor | None, script: Script, key: NoiseKey) -> None:
    """See reference.write_each."""
    buffers = None if buffer is None else [buffer]
    _write_each([address(theta, *_KINDS)], buffers, [theta.numel()], [key], theta.dtype, script)


def write_each_batch(batch: Batch, buffers: Sequence[Tensor] | None, script: Script) -> None:
    """As write_each, on all tensors of a batch without indices."""
    _write_each(batch.addresses, buffers, batch.counts, batch.keys, batch.dtype, script)


def _write_each(
    addresses: Sequence[int],
    buffers: Sequence[Tensor] | None,
    counts: Sequence[int],
    keys: Sequence[NoiseKey],
    dtype: torch.dtype,
    script: Script,
) -> None:
    beside = (0,) * len(counts)
    if buffers is not None:
        beside = tuple(address(buffer, torch.float32) for buffer in buffers)
    places = [
        (own, count, key.offset, key.stream, buffer)
        for own, count, key, buffer in zip(addresses, counts, keys, beside, strict=True)
    ]
    ends = np.cumsum([0, *(-(-count // cpu_writes.TILE) for count in counts)], dtype=np.int64)
    tiles = int(ends[-1])
    per_word, _, k0, k1, _, threshold = _noise(keys[0])
    arguments = (
        np.array(places, np.int64),
        ends,
        _WORD if dtype == torch.float32 else _HALFWORD,
        _KINDS[dtype],
        *script.arrays,
        script.kept,
        per_word,
        k0,
        k1,
        threshold,
    )
    share = cpu_threads.share(tiles, 1, MIN_PER_THREAD // cpu_writes.TILE)
    cpu_threads.run(cpu_writes.write_each, arguments, tiles, share)


def gather_rows(
    weight: Tensor, rows: Tensor, out: Tensor, alpha: float, key: NoiseKey, draw: int
) -> None:
    """See reference.gather_rows."""
    d = weight.shape[1]
    arguments = (
        _memory(weight),
        rows.numpy(),
        _memory(out),
        _KINDS[weight.dtype],
        f32(alpha),
        u32(draw),
        *_noise(key),
    )
    share = cpu_threads.share(rows.numel(), 1, -(-MIN_PER_THREAD // d))
    cpu_threads.run(cpu_kernels.gather_rows, arguments, rows.numel(), share)
