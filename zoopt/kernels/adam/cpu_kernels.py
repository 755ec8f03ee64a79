"""Adam on the CPU, compiled: tile by tile, so that each tensor is read and written once.

theta, the gradient, the direction and the moments' codes arrive as bytes, each with a number for
its dtype, so that one compilation serves all dtypes. `key` is (stream, k0, k1, offset). Entry
points and spans are as in noise's `cpu_kernels`. `moment_draw` and `rounding` are negative for
rounding to nearest.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from zoopt.kernels.adam.cpu_moments import FLOAT, read_moment, write_moment
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.cpu_tile import halfwords, store
from zoopt.kernels.runtime.convert import FLOAT32, decode, encode
from zoopt.kernels.runtime.intrinsics import add_any_order, f32, fma, jit
from zoopt.kernels.runtime.spread import spread

#: Elements of a tile; its data fit into the first-level cache. A multiple of the codes' blocks.
TILE = 2048
_MOMENTS = philox.PURPOSE_MOMENTS
#: What becomes of an average: see `reference.Mode`.
_AVERAGE, _SIGNS, _LERP, _STORE, _LOAD = range(5)
MODES = {"average": _AVERAGE, "signs": _SIGNS, "lerp": _LERP, "store": _STORE, "load": _LOAD}


@jit
def _direction(out, g, m, v, numbers):
    """m <- beta1 m + complement1 g, v <- beta2 v + complement2 (g g), out <- (factor m) / (sqrt(v)
    + eps), all float32 (k,)."""
    beta1, beta2, complement1, complement2, factor, eps = numbers
    for j in range(len(out)):
        x = g[j]
        a = f32(f32(beta1 * m[j]) + f32(complement1 * x))
        b = f32(f32(beta2 * v[j]) + f32(complement2 * f32(x * x)))
        out[j] = f32(f32(factor * a) / f32(f32(np.sqrt(b)) + eps))
        m[j], v[j] = a, b


@jit
def _descend(theta, g, m, v, decay, numbers):
    """Both moments as in _direction, and theta <- decay theta + (factor m) / (sqrt(v) + eps)."""
    beta1, beta2, complement1, complement2, factor, eps = numbers
    for j in range(len(theta)):
        x = g[j]
        a = f32(f32(beta1 * m[j]) + f32(complement1 * x))
        b = f32(f32(beta2 * v[j]) + f32(complement2 * f32(x * x)))
        quotient = f32(f32(factor * a) / f32(f32(np.sqrt(b)) + eps))
        theta[j] = f32(f32(decay * theta[j]) + quotient)
        m[j], v[j] = a, b


@jit
def _read(tile, source, kind, start, stop):
    """Elements of theta or the gradient as float32: in the scratch tile, or in place if float32."""
    if kind == FLOAT32:
        return source.view(np.float32)[start:stop]
    values = tile[: stop - start]
    decode(values, source.view(np.uint16)[start:stop], kind)
    return values


@jit
def _scratch():
    """Four tiles of values, and the bytes, halfwords and words of one."""
    return (
        np.empty((4, TILE + 48), np.float32),
        np.empty(TILE, np.uint8),
        np.empty(TILE, np.uint16),
        np.empty(TILE // 2 + 4, np.uint32),
    )


@jit
def _add_row_sums(norms, heads, values, width, start):
    """Sums of squares of rows of `width` elements, over values (k,), the tile that begins at
    `start`.

    A row that begins in this tile is written to norms (rows,). The part of a row that began in an
    earlier tile goes to heads (tiles,), since another thread may own that tile.
    """
    i = 0
    while i < len(values):
        row = (start + i) // width
        stop = min((row + 1) * width - start, len(values))
        part, total = values[i:stop], f32(0.0)
        for j in range(len(part)):
            total = add_any_order(total, f32(part[j] * part[j]))
        if row * width >= start:
            norms[row] = total
        else:
            heads[start // TILE] = total
        i = stop


@jit
def _read_moments(scratch, first, first_scale, second, second_scale, form, start, count):
    """Both moments of a tile: in the scratch tiles, or in place if they are float32."""
    tiles, unpacked, _, _ = scratch
    m = read_moment(tiles[0], unpacked, first, first_scale, form, True, start, count)
    v = read_moment(tiles[1], unpacked, second, second_scale, form, False, start, count)
    return m, v


@jit
def _keep(scratch, m, v, first, first_scale, second, second_scale, form, start, key, moment_draw):
    """Store a tile's moments."""
    if form == FLOAT:
        return
    _, unpacked, shifted, words = scratch
    stochastic = moment_draw >= 0
    random = shifted[: len(m)]
    if stochastic:
        stream, k0, k1, offset = key
        index = offset + start
        random = halfwords(words, index, len(m), stream, moment_draw, _MOMENTS, k0, k1)
    write_moment(m, unpacked, shifted, first, first_scale, form, True, start, random, stochastic)
    write_moment(v, unpacked, shifted, second, second_scale, form, False, start, random, stochastic)


@jit
def _adam(
    gradient,
    gradient_kind,
    out,
    out_kind,
    first,
    first_scale,
    second,
    second_scale,
    form,
    numbers,
    key,
    moment_draw,
    norms,
    heads,
    width,
    span,
):
    """reference_adam.adam; width is 0 where there are no norms."""
    scratch = _scratch()
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        g = _read(scratch[0][2], gradient, gradient_kind, start, stop)
        count = stop - start
        m, v = _read_moments(scratch, first, first_scale, second, second_scale, form, start, count)
        # In scratch memory, since `out` may be the gradient's own memory.
        direction = scratch[0][3][:count]
        _direction(direction, g, m, v, numbers)
        if width:
            _add_row_sums(norms[1], heads[1], g, width, start)
            _add_row_sums(norms[0], heads[0], direction, width, start)
        if out_kind == FLOAT32:
            out.view(np.float32)[start:stop] = direction
        else:
            encode(out.view(np.uint16)[start:stop], direction, out_kind)
        _keep(
            scratch,
            m,
            v,
            first,
            first_scale,
            second,
            second_scale,
            form,
            start,
            key,
            moment_draw,
        )


@jit
def _adamw(
    theta,
    kind,
    gradient,
    gradient_kind,
    first,
    first_scale,
    second,
    second_scale,
    form,
    decay,
    numbers,
    key,
    moment_draw,
    rounding,
    span,
):
    """reference_adam.adamw."""
    # Where all is float32, working tile by tile would take a quarter more time.
    if form == FLOAT and kind == FLOAT32 and gradient_kind == FLOAT32:
        part = slice(span[0], span[1])
        arrays = theta.view(np.float32)[part], gradient.view(np.float32)[part]
        moments = first.view(np.float32)[part], second.view(np.float32)[part]
        _descend(*arrays, *moments, decay, numbers)
        return
    stream, k0, k1, offset = key
    scratch = _scratch()
    tiles, words = scratch[0], scratch[3]
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        g = _read(tiles[2], gradient, gradient_kind, start, stop)
        acc = _read(tiles[3], theta, kind, start, stop)
        m, v = _read_moments(
            scratch, first, first_scale, second, second_scale, form, start, stop - start
        )
        _descend(acc, g, m, v, decay, numbers)
        target = theta.view(np.uint16)[start:stop]
        store(target, acc, words, offset + start, kind, stream, rounding, k0, k1)
        _keep(
            scratch,
            m,
            v,
            first,
            first_scale,
            second,
            second_scale,
            form,
            start,
            key,
            moment_draw,
        )


@jit
def _multiple(values, g, factor, kind, shifted):
    """values, float32 (k,) <- factor g, rounded to the gradient's dtype."""
    for j in range(len(values)):
        values[j] = f32(factor * g[j])
    if kind != FLOAT32:
        narrow = shifted[: len(values)]
        encode(narrow, values, kind)
        decode(values, narrow, kind)


@jit
def _average_tile(look, keep, m, numbers, mode):
    """look, float32 (k,) <- look_m m + look, or its signs, and m <- keep_m m + keep."""
    look_m, _, keep_m, _ = numbers
    for j in range(len(m)):
        look[j] = f32(f32(look_m * m[j]) + look[j])
        m[j] = f32(f32(keep_m * m[j]) + keep[j])
    if mode == _SIGNS:
        for j in range(len(m)):
            x = look[j]
            look[j] = f32(1.0) if x > f32(0.0) else (f32(-1.0) if x < f32(0.0) else f32(0.0))


@jit
def _lerp_tile(out, m, g, weight):
    """out, m, float32 (k,) <- m + weight (g - m), rounded as by torch.lerp."""
    if weight < f32(0.5):
        for j in range(len(m)):
            m[j] = fma(weight, f32(g[j] - m[j]), m[j])
    else:
        for j in range(len(m)):
            m[j] = fma(f32(weight - f32(1.0)), f32(g[j] - m[j]), g[j])
    out[:] = m


@jit
def _average(
    gradient,
    gradient_kind,
    out,
    out_kind,
    codes,
    scale,
    form,
    numbers,
    mode,
    signed,
    key,
    moment_draw,
    span,
):
    """reference.average."""
    tiles, unpacked, shifted, words = _scratch()
    stream, k0, k1, offset = key
    stochastic = moment_draw >= 0
    for start in range(span[0], span[1], TILE):
        stop = min(start + TILE, span[1])
        count = stop - start
        g = _read(tiles[2], gradient, gradient_kind, start, stop)
        m = tiles[0][:count]
        if mode != _STORE or form == FLOAT:
            m = read_moment(tiles[0], unpacked, codes, scale, form, signed, start, count)
        look, keep = tiles[1][:count], tiles[3][:count]
        if mode == _STORE:
            m[:] = g
        elif mode == _LOAD:
            look[:] = m
        elif mode == _LERP:
            _lerp_tile(look, m, g, numbers[0])
        else:
            _multiple(look, g, numbers[1], gradient_kind, shifted)
            _multiple(keep, g, numbers[3], gradient_kind, shifted)
            _average_tile(look, keep, m, numbers, mode)
        if mode == _STORE:
            pass
        elif out_kind == FLOAT32:
            out.view(np.float32)[start:stop] = look
        else:
            encode(out.view(np.uint16)[start:stop], look, out_kind)
        if mode == _LOAD:
            continue
        random = shifted[:count]
        if form != FLOAT and stochastic:
            index = offset + start
            random = halfwords(words, index, count, stream, moment_draw, _MOMENTS, k0, k1)
        write_moment(m, unpacked, shifted, codes, scale, form, signed, start, random, stochastic)


@jit
def average(arguments, team):
    """reference.average, on a team of threads."""
    spread(_average, arguments, team)


@jit
def adam(arguments, team):
    """reference_adam.adam, on a team of threads."""
    spread(_adam, arguments, team)


@jit
def adamw(arguments, team):
    """reference_adam.adamw, on a team of threads."""
    spread(_adamw, arguments, team)
