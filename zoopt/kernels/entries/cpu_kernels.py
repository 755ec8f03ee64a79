"""Adam on some entries of a tensor on the CPU, compiled. See adam's `cpu_kernels`."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from zoopt.kernels.entries.operands import OLDEST
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.cpu_tile import make_blocks
from zoopt.kernels.runtime.convert import FLOAT32, decode, encode, encode_stochastic
from zoopt.kernels.runtime.intrinsics import f32, i32, jit
from zoopt.kernels.runtime.spread import spread

#: Entries of a tile.
TILE = 1024
_ROUNDING = philox.PURPOSE_ROUNDING


@jit
def _gather(tile, halves, source, kind, index, start, count):
    """tile, float32 (count,) <- the elements of the source at entries start ... start + count - 1,
    or those themselves where there is no index."""
    values = tile[:count]
    if kind == FLOAT32:
        memory = source.view(np.float32)
        for j in range(count):
            values[j] = memory[start + j if index is None else index[start + j]]
    else:
        bits, words = halves[:count], source.view(np.uint16)
        for j in range(count):
            bits[j] = words[start + j if index is None else index[start + j]]
        decode(values, bits, kind)
    return values


@jit
def _scatter(target, kind, index, start, values, halves, random, rounding):
    """Round values, float32 (m,), to the target's dtype, and put them where `_gather` found
    them."""
    if kind == FLOAT32:
        memory = target.view(np.float32)
        for j in range(len(values)):
            memory[start + j if index is None else index[start + j]] = values[j]
        return
    bits, words = halves[: len(values)], target.view(np.uint16)
    if rounding >= 0:
        encode_stochastic(bits, values, random, kind)
    else:
        encode(bits, values, kind)
    for j in range(len(values)):
        words[start + j if index is None else index[start + j]] = bits[j]


@jit
def _halfwords(random, words, index, start, count, key, draw):
    """random, uint16 (count,) <- the bits that round the elements at these entries."""
    stream, k0, k1, offset = key
    halves = words.view(np.uint16)
    for j in range(count):
        place = offset + (start + j if index is None else np.int64(index[start + j]))
        make_blocks(words, place // 8, 1, stream, draw, _ROUNDING, k0, k1)
        random[j] = halves[place % 8]


@jit
def _adam_entries(
    theta,
    kind,
    gradient,
    gradient_kind,
    index,
    base,
    first,
    second,
    age,
    first_corrections,
    second_corrections,
    numbers,
    decay,
    key,
    rounding,
    span,
):
    """reference.adam_entries."""
    beta1, beta2, complement1, complement2, rate, eps = numbers
    tiles = np.empty((3, TILE), np.float32)
    halves, random = np.empty(TILE, np.uint16), np.empty(TILE, np.uint16)
    words = np.empty(4, np.uint32)
    for start in range(span[0], span[1], TILE):
        count = min(start + TILE, span[1]) - start
        g = _gather(tiles[0], halves, gradient, gradient_kind, index, start, count)
        x = _gather(tiles[1], halves, theta, kind, index, start, count)
        for j in range(count):
            e = start + j
            a = i32(min(max(i32(age[e]), i32(0)), i32(OLDEST - 1)) + i32(1))
            m = f32(f32(first[e] * beta1) + f32(g[j] * complement1))
            v = f32(f32(second[e] * beta2) + f32(f32(g[j] * g[j]) * complement2))
            first[e], second[e], age[e] = m, v, a
            mhat = f32(m / first_corrections[a])
            vhat = f32(v / second_corrections[a])
            g[j] = f32(f32(mhat / f32(f32(np.sqrt(vhat)) + eps)) * rate)
        if base is None:
            for j in range(count):
                x[j] = f32(x[j] + f32(g[j] - f32(x[j] * decay)))
        else:
            origin = _gather(tiles[2], halves, base, kind, None, start, count)
            for j in range(count):
                change = f32(f32(origin[j] - x[j]) * decay)
                x[j] = f32(f32(x[j] + change) + g[j])
        if rounding >= 0 and kind != FLOAT32:
            _halfwords(random, words, index, start, count, key, rounding)
        _scatter(theta, kind, index, start, x, halves, random[:count], rounding)


@jit
def adam_entries(arguments, team):
    """reference.adam_entries, on a team of threads."""
    spread(_adam_entries, arguments, team)
