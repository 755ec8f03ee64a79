"""The operations on the CPU: numba, one tile at a time in the first-level cache.

A tile of theta is decoded to float32, directions are added to it, and it is encoded back, so each
operation reads and writes memory once however many directions it adds.

Kernels release the GIL and run on torch.get_num_threads() threads, each on tiles of its own: the
result does not depend on their number.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoopt.kernels.cpu_tile import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    NORMALS_PER_WORD,
    SIGNS_PER_WORD,
    TILE,
    accumulate,
    f32,
    generate,
    jit,
    load,
    scale,
    scratch,
    signed_pass,
    store,
    u32,
)
from zoopt.kernels.key import NoiseKey

#: Below this many elements a thread costs more than it saves.
MIN_PER_THREAD = 1 << 15

_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@jit
def _weighted_sum(
    theta, out, kind, coefficients, draws, decay, per_word, stream, k0, k1, offset, rounding, span
):
    """weighted_sum on elements span[0] ... span[1] - 1; rounding < 0 means to nearest."""
    tile, z, words = scratch()
    # One sign an element costs so little that passes through a tile would double it.
    plain_signs = kind == BFLOAT16 and per_word == SIGNS_PER_WORD and len(draws) == 1
    plain_signs = plain_signs and decay == f32(1.0) and rounding < 0
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        index, count = offset + start, stop - start
        if plain_signs and index % 128 == 0 and count % 32 == 0:
            generate(z, words, index, count, per_word, stream, draws[0], k0, k1)
            signed_pass(out[start:stop], theta[start:stop], words, coefficients[0])
            continue
        acc = load(tile, theta[start:stop], out[start:stop], kind, decay)
        for j in range(len(draws)):
            lead = generate(z, words, index, count, per_word, stream, draws[j], k0, k1)
            accumulate(acc, coefficients[j], z, words, lead, per_word)
        store(out[start:stop], acc, words, index, kind, stream, rounding, k0, k1)


@jit
def _momentum_sum(
    theta,
    buffer,
    kind,
    coefficients,
    gradients,
    draws,
    decay,
    momentum,
    step_size,
    per_word,
    stream,
    k0,
    k1,
    offset,
    rounding,
    span,
):
    """momentum_sum on elements span[0] ... span[1] - 1; rounding < 0 means to nearest."""
    tile, z, words = scratch()
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        index, count = offset + start, stop - start
        acc = load(tile, theta[start:stop], theta[start:stop], kind, decay)
        buf = buffer[start:stop]
        scale(buf, momentum)
        for j in range(len(draws)):
            lead = generate(z, words, index, count, per_word, stream, draws[j], k0, k1)
            accumulate(acc, coefficients[j], z, words, lead, per_word)
            accumulate(buf, gradients[j], z, words, lead, per_word)
        for j in range(count):
            acc[j] = f32(acc[j] + f32(step_size * buf[j]))
        store(theta[start:stop], acc, words, index, kind, stream, rounding, k0, k1)


@jit
def _gather_rows(weight, rows, out, kind, alpha, draw, per_word, stream, k0, k1, offset, span):
    """gather_rows on output rows span[0] ... span[1] - 1; weight (V d,), out (n d,)."""
    d = len(out) // len(rows)
    alphas, draws = np.full(1, alpha, np.float32), np.full(1, draw, np.uint32)
    for i in range(span[0], span[1]):
        start = rows[i] * d
        source, target = weight[start : start + d], out[i * d : i * d + d]
        _weighted_sum(
            source,
            target,
            kind,
            alphas,
            draws,
            f32(1.0),
            per_word,
            stream,
            k0,
            k1,
            offset + start,
            -1,
            (0, d),
        )


_pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None


def _parallel(kernel: Callable[..., None], count: int, unit: int, least: int, *args: Any) -> None:
    """Call kernel(*args, (start, stop)) on disjoint spans of 0 ... count - 1.

    Spans start at multiples of `unit`, and there are no more of them than spans of `least`.
    """
    global _pool
    threads = min(torch.get_num_threads(), -(-count // least))
    if threads <= 1:
        kernel(*args, (0, count))
        return
    # Threads do not survive a fork, so the pool belongs to the process that made it.
    owner = (os.getpid(), torch.get_num_threads())
    if _pool is None or _pool[0] != owner:
        _pool = owner, ThreadPoolExecutor(owner[1], thread_name_prefix="zoopt")
    share = -(-count // (threads * unit)) * unit
    spans = [(start, min(start + share, count)) for start in range(0, count, share)]
    for future in [_pool[1].submit(kernel, *args, span) for span in spans]:
        future.result()


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a contiguous tensor as integers of its width, (numel,)."""
    width = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    array = tensor.detach().view(-1).view(width).numpy()
    return array.view(np.uint32 if tensor.dtype == torch.float32 else np.uint16)


def _noise(key: NoiseKey) -> tuple[int, np.uint32, np.uint32, np.uint32, int]:
    """per_word, stream, k0, k1, offset: the arguments of every kernel that name its noise."""
    per_word = NORMALS_PER_WORD if key.distribution == "normal" else SIGNS_PER_WORD
    return per_word, u32(key.stream), u32(key.seed & 0xFFFFFFFF), u32(key.seed >> 32), key.offset


def weighted_sum(
    theta: Tensor,
    out: Tensor,
    coefficients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.weighted_sum."""
    _parallel(
        _weighted_sum,
        theta.numel(),
        TILE,
        MIN_PER_THREAD,
        _array(theta),
        _array(out),
        _KINDS[theta.dtype],
        np.array(coefficients, np.float32),
        np.array(draws, np.uint32),
        f32(decay),
        *_noise(key),
        -1 if rounding_draw is None else rounding_draw,
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
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.momentum_sum."""
    _parallel(
        _momentum_sum,
        theta.numel(),
        TILE,
        MIN_PER_THREAD,
        _array(theta),
        buffer.view(-1).numpy(),
        _KINDS[theta.dtype],
        np.array(coefficients, np.float32),
        np.array(gradients, np.float32),
        np.array(draws, np.uint32),
        f32(decay),
        f32(momentum),
        f32(step_size),
        *_noise(key),
        -1 if rounding_draw is None else rounding_draw,
    )


def gather_rows(
    weight: Tensor, rows: Tensor, out: Tensor, alpha: float, key: NoiseKey, draw: int
) -> None:
    """See reference.gather_rows."""
    d = weight.shape[1]
    _parallel(
        _gather_rows,
        rows.numel(),
        1,
        -(-MIN_PER_THREAD // d),
        _array(weight),
        rows.numpy(),
        _array(out),
        _KINDS[weight.dtype],
        f32(alpha),
        u32(draw),
        *_noise(key),
    )
