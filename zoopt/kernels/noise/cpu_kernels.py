"""The operations on the CPU, compiled: tile by tile, over the spans of a team of threads.

Each one works on elements (or rows) span[0] ... span[1] - 1, and has an entry point (arguments,
team) that distributes the spans over the threads. `rounding` is the draw whose bits round, or
negative for rounding to nearest; `threshold` is the mask's, or None at density 1.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from zoopt.kernels.noise import philox
from zoopt.kernels.noise.cpu_tile import (
    SIGNS_PER_WORD,
    TILE,
    accumulate,
    adam,
    add,
    add_bfloat16_stochastic,
    close,
    estimate,
    generate,
    halfwords,
    load,
    scale,
    scratch,
    signed_pass,
    spread_signs,
    store,
)
from zoopt.kernels.runtime.convert import BFLOAT16
from zoopt.kernels.runtime.intrinsics import f32, jit
from zoopt.kernels.runtime.spread import spread

_ROUNDING = philox.PURPOSE_ROUNDING


@jit
def _weighted_sum(
    theta,
    out,
    addend,
    kind,
    coefficients,
    draws,
    decay,
    per_word,
    stream,
    k0,
    k1,
    offset,
    threshold,
    rounding,
    span,
):
    """reference.weighted_sum; numba compiles a separate kernel for an addend of None."""
    tile, z, words, random = scratch(threshold)
    # Signs are so cheap to generate that passing through a tile would double the time.
    plain_signs = kind == BFLOAT16 and per_word == SIGNS_PER_WORD and len(draws) == 1
    plain_signs = plain_signs and decay == f32(1.0) and rounding < 0
    plain_signs = plain_signs and addend is None and threshold is None
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        index, count = offset + start, stop - start
        if plain_signs and index % 128 == 0 and count % 32 == 0:
            generate(z, words, random, index, count, per_word, stream, draws[0], k0, k1, threshold)
            signed_pass(out[start:stop], theta[start:stop], words, coefficients[0])
            continue
        acc = load(tile, theta[start:stop], out[start:stop], kind, decay)
        for j in range(len(draws)):
            lead = generate(
                z, words, random, index, count, per_word, stream, draws[j], k0, k1, threshold
            )
            accumulate(acc, coefficients[j], z, words, random, lead, per_word, threshold)
        if addend is not None:
            add(acc, addend[start:stop])
        store(out[start:stop], acc, words, index, kind, stream, rounding, k0, k1)


@jit
def _scaled_rows(
    theta,
    out,
    scales,
    kind,
    alpha,
    draw,
    per_word,
    stream,
    k0,
    k1,
    offset,
    threshold,
    span,
):
    """reference.scaled_rows."""
    tile, z, words, random = scratch(threshold)
    columns = len(theta) // len(scales)
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        index, count = offset + start, stop - start
        acc = load(tile, theta[start:stop], out[start:stop], kind, f32(1.0))
        lead = generate(z, words, random, index, count, per_word, stream, draw, k0, k1, threshold)
        first, row = 0, start // columns
        while first < count:
            last = min(count, (row + 1) * columns - start)
            scale_ = f32(alpha * scales[row])
            accumulate(acc[first:last], scale_, z, words, random, lead + first, per_word, threshold)
            first, row = last, row + 1
        store(out[start:stop], acc, words, index, kind, stream, -1, k0, k1)


@jit
def _add_stochastic(theta, addend, decay, stream, k0, k1, offset, rounding, span):
    """theta <- decay theta + addend, rounded by random bits, both the bits of bfloat16 (n,)."""
    words = np.empty(TILE // 2 + 4, np.uint32)
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        random = halfwords(words, offset + start, stop - start, stream, rounding, _ROUNDING, k0, k1)
        add_bfloat16_stochastic(theta[start:stop], addend[start:stop], random, decay)


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
    threshold,
    rounding,
    span,
):
    """reference.momentum_sum."""
    tile, z, words, random = scratch(threshold)
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        index, count = offset + start, stop - start
        acc = load(tile, theta[start:stop], theta[start:stop], kind, decay)
        buf = buffer[start:stop]
        scale(buf, momentum)
        for j in range(len(draws)):
            lead = generate(
                z, words, random, index, count, per_word, stream, draws[j], k0, k1, threshold
            )
            accumulate(acc, coefficients[j], z, words, random, lead, per_word, threshold)
            accumulate(buf, gradients[j], z, words, random, lead, per_word, threshold)
        for j in range(count):
            acc[j] = f32(acc[j] + f32(step_size * buf[j]))
        store(theta[start:stop], acc, words, index, kind, stream, rounding, k0, k1)


@jit
def _adam_window(
    theta,
    kind,
    coefficients,
    gradients,
    first,
    second,
    closes,
    draws,
    decay,
    step_size,
    eps,
    per_word,
    stream,
    k0,
    k1,
    offset,
    threshold,
    rounding,
    span,
):
    """reference.adam_window; a tile's moments stay in the cache and are never written to memory."""
    tile, z, words, random = scratch(threshold)
    moments = np.empty((3, TILE), np.float32)
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        index, count = offset + start, stop - start
        acc = load(tile, theta[start:stop], theta[start:stop], kind, decay)
        moments[:] = f32(0.0)
        ghat, m, v = moments[0, :count], moments[1, :count], moments[2, :count]
        for j in range(len(draws)):
            lead = generate(
                z, words, random, index, count, per_word, stream, draws[j], k0, k1, threshold
            )
            if per_word == SIGNS_PER_WORD:
                blocks = (lead + count + 127) // 128
                spread_signs(z, words[: 4 * blocks])
            direction = z[lead : lead + count]
            halves = random.view(np.uint16)[lead : lead + count]
            a, g = coefficients[j], gradients[j]
            if not closes[j]:
                estimate(acc, ghat, direction, halves, a, g, threshold)
            elif j == 0 or closes[j - 1]:
                close(acc, None, m, v, direction, halves, a, g, first[j], second[j], threshold)
            else:
                close(acc, ghat, m, v, direction, halves, a, g, first[j], second[j], threshold)
        adam(acc, m, v, step_size, eps)
        store(theta[start:stop], acc, words, index, kind, stream, rounding, k0, k1)


@jit
def _gather_rows(
    weight, rows, out, kind, alpha, draw, per_word, stream, k0, k1, offset, threshold, span
):
    """reference.gather_rows on output rows; weight (V d,), out (n d,)."""
    d = len(out) // len(rows)
    alphas, draws = np.full(1, alpha, np.float32), np.full(1, draw, np.uint32)
    for i in range(span[0], span[1]):
        start = rows[i] * d
        source, target = weight[start : start + d], out[i * d : i * d + d]
        _weighted_sum(
            source,
            target,
            None,
            kind,
            alphas,
            draws,
            f32(1.0),
            per_word,
            stream,
            k0,
            k1,
            offset + start,
            threshold,
            -1,
            (0, d),
        )


@jit
def weighted_sum(arguments, team):
    """reference.weighted_sum, on a team of threads."""
    spread(_weighted_sum, arguments, team)


@jit
def scaled_rows(arguments, team):
    """reference.scaled_rows, on a team of threads."""
    spread(_scaled_rows, arguments, team)


@jit
def add_stochastic(arguments, team):
    """_add_stochastic, on a team of threads."""
    spread(_add_stochastic, arguments, team)


@jit
def momentum_sum(arguments, team):
    """reference.momentum_sum, on a team of threads."""
    spread(_momentum_sum, arguments, team)


@jit
def adam_window(arguments, team):
    """reference.adam_window, on a team of threads."""
    spread(_adam_window, arguments, team)


@jit
def gather_rows(arguments, team):
    """reference.gather_rows, on a team of threads."""
    spread(_gather_rows, arguments, team)
