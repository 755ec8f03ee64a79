"""Many writes of theta on the CPU, compiled: all of them on one tile while it is in the cache."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from zoopt.kernels.noise.cpu_tile import (
    NORMALS_PER_WORD,
    TILE,
    accumulate,
    adam,
    add_sign,
    average,
    generate,
    load,
    scratch,
    store,
)
from zoopt.kernels.noise.writes import RULES
from zoopt.kernels.runtime.convert import FLOAT32
from zoopt.kernels.runtime.intrinsics import f32, jit
from zoopt.kernels.runtime.spread import spread

_NONE, _SIGN, _ADAM = RULES["none"], RULES["sign"], RULES["adam"]


@jit
def _made(draw, made, z, words, random, index, count, per_word, stream, k0, k1, threshold):
    """Where a direction is kept: at its draw's remainder. It is made if another one is there."""
    place = draw % len(made)
    if made[place] != draw:
        generate(
            z[place],
            words[place],
            random[place],
            index,
            count,
            per_word,
            stream,
            draw,
            k0,
            k1,
            threshold,
        )
        made[place] = draw
    return place


@jit
def _add_thrice(acc, z, decays, numbers):
    """Three times acc <- decay acc + number z, float32 (m,), each operation rounded: out along a
    direction, across and back, which is a step in place."""
    d0, d1, d2 = decays[0], decays[1], decays[2]
    a0, a1, a2 = numbers[0], numbers[1], numbers[2]
    for j in range(len(acc)):
        x = f32(f32(d0 * acc[j]) + f32(a0 * z[j]))
        x = f32(f32(d1 * x) + f32(a1 * z[j]))
        acc[j] = f32(f32(d2 * x) + f32(a2 * z[j]))


@jit
def _write_each(
    theta,
    kind,
    ends,
    middles,
    trios,
    rounds,
    rules,
    decays,
    step_sizes,
    epsilons,
    draws,
    numbers,
    first,
    second,
    closes,
    kept,
    per_word,
    stream,
    k0,
    k1,
    offset,
    threshold,
    span,
):
    """reference.write_each, with `kept` directions of a tile beside it.

    Write w has terms ends[w] ... ends[w + 1] - 1; from middles[w] on they are its estimate's.
    """
    tile, _, bits, _ = scratch(threshold)
    z = np.empty((kept, TILE + 128), np.float32)
    words = np.empty((kept, TILE // 2 + 4), np.uint32)
    random = np.empty((kept, 0 if threshold is None else (TILE + 128) // 2), np.uint32)
    made = np.empty(kept, np.int64)
    moments = np.empty((3, TILE), np.float32)
    fused = kind == FLOAT32 and per_word == NORMALS_PER_WORD and threshold is None
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        index, count = offset + start, stop - start
        lead = index % (4 * per_word)
        made[:] = -1
        ghat, m, v = moments[0, :count], moments[1, :count], moments[2, :count]
        values = theta[start:stop]
        left = 0
        for w in range(len(rules)):
            if left > 0:
                left -= 1
                continue
            trio = fused and trios[w]
            acc = load(tile, values, values, kind, f32(1.0) if trio else decays[w])
            if rules[w] != _NONE:
                moments[:] = f32(0.0)
            for j in range(ends[w], ends[w + 1]):
                place = _made(
                    draws[j],
                    made,
                    z,
                    words,
                    random,
                    index,
                    count,
                    per_word,
                    stream,
                    k0,
                    k1,
                    threshold,
                )
                if trio:
                    direction = z[place, lead : lead + count]
                    _add_thrice(acc, direction, decays[w : w + 3], numbers[j : j + 3])
                    left = 2
                    break
                accumulate(
                    acc if j < middles[w] else ghat,
                    numbers[j],
                    z[place],
                    words[place],
                    random[place],
                    lead,
                    per_word,
                    threshold,
                )
                if closes[j]:
                    average(ghat, m, v, first[j], second[j])
            if rules[w] == _SIGN:
                add_sign(acc, ghat, step_sizes[w])
            elif rules[w] == _ADAM:
                adam(acc, m, v, step_sizes[w], epsilons[w])
            store(values, acc, bits, index, kind, stream, rounds[w], k0, k1)


@jit
def write_each(arguments, team):
    """reference.write_each, on a team of threads."""
    spread(_write_each, arguments, team)
