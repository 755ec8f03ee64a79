"""SM3 on the CPU: numba, a row at a time, in tiles that fit the first-level cache.

Accumulators are compared as integers. Since nu >= 0, the bit patterns have the same order as the
values, with NaN above infinity, and LLVM vectorises a maximum of integers. Loops are written as in
`cpu_tile`.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.cpu import _KINDS, MIN_PER_THREAD, _counter, _memory, _rounding
from zoopt.kernels.noise.cpu_tile import TILE, load, store
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.runtime import threads as cpu_threads
from zoopt.kernels.runtime.convert import FLOAT32, decode
from zoopt.kernels.runtime.intrinsics import bits_of, f32, float_of, i32, jit
from zoopt.kernels.runtime.spread import spread
from zoopt.kernels.sm3.reference import Bounds, Numbers

_MAGNITUDE = i32(0x7FFFFFFF)
#: These stand for None. An optional array would be a second type, and every combination of types
#: another kernel to compile; testing the length costs one comparison a tile.
_NO_ROWS, _NO_BUFFER = np.empty(0, np.int64), np.empty(0, np.float32)


@jit
def _bounds(nu, row, column):
    """nu (k w,) <- min(row, column), (k,) and (w,), all of them bits."""
    width = len(column)
    for i in range(len(row)):
        line, own = nu[i * width :][:width], row[i]
        for j in range(width):
            line[j] = min(own, column[j])


@jit
def _update(acc, nu, g, buffer, keep, gain, eps, momentum, complement, step):
    """acc <- acc + step u, all (k,); on entry nu has the bits of the bounds, on exit those of
    nu."""
    for j in range(len(acc)):
        x = f32(f32(keep * float_of(nu[j])) + f32(gain * f32(g[j] * g[j])))
        denominator = f32(f32(np.sqrt(x)) + eps)
        u = f32(0.0) if denominator == f32(0.0) else f32(g[j] / denominator)
        if len(buffer):
            u = f32(f32(momentum * buffer[j]) + f32(complement * u))
            buffer[j] = u
        acc[j] = f32(acc[j] + f32(step * u))
        nu[j] = i32(bits_of(x) & _MAGNITUDE)


@jit
def _maxima(nu, new_row, new_column):
    """Raise new_row (k,) and new_column (w,) to the maxima of nu (k w,), all of them bits."""
    width = len(new_column)
    for i in range(len(new_row)):
        line, highest = nu[i * width :][:width], new_row[i]
        for j in range(width):
            new_column[j] = max(new_column[j], line[j])
            highest = max(highest, line[j])
        new_row[i] = highest


@jit
def _sm3(
    theta,
    gradient,
    rows,
    row,
    column,
    new_row,
    new_columns,
    buffer,
    kind,
    gradient_kind,
    keep,
    gain,
    eps,
    decay,
    momentum,
    complement,
    step_size,
    stream,
    k0,
    k1,
    offset,
    rounding,
    share,
    span,
):
    """reference.sm3 on the gradient's rows span[0] ... span[1] - 1; all but columns flat.

    Spans run at the same time, so each keeps its own column maxima, new_columns (spans, n). A
    maximum is exact, so the order in which they are combined does not matter.
    """
    new_column = new_columns[span[0] // share]
    tile, gradient_tile = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    nu_tile = np.empty(TILE, np.int32)
    words = np.empty(TILE // 2 + 4, np.uint32)
    n = len(column)
    # A tile is part of one row, or several whole rows where these are narrow and adjacent.
    together = max(1, TILE // n) if len(rows) == 0 else 1
    for first in range(span[0], span[1], together):
        last = min(first + together, span[1])
        for start in range(0, n, TILE):
            stop = min(start + TILE, n)
            width = stop - start
            at = (first if len(rows) == 0 else rows[first]) * n + start
            size = (last - first) * width
            target, source = theta[at : at + size], gradient[first * n + start :][:size]
            acc = load(tile, target, target, kind, decay)
            if gradient_kind == FLOAT32:
                g = source.view(np.float32)
            else:
                g = gradient_tile[:size]
                decode(g, source, gradient_kind)
            nu = nu_tile[:size]
            average = buffer[at : at + size] if len(buffer) else buffer
            _bounds(nu, row[first:last], column[start:stop])
            _update(acc, nu, g, average, keep, gain, eps, momentum, complement, step_size)
            _maxima(nu, new_row[first:last], new_column[start:stop])
            store(target, acc, words, offset + at, kind, stream, rounding, k0, k1)


@jit
def _sm3_entry(arguments, team):
    """reference.sm3, on a team of threads."""
    spread(_sm3, arguments, team)


def sm3(
    theta: Tensor,
    gradient: Tensor,
    rows: Tensor | None,
    bounds: Bounds,
    buffer: Tensor | None,
    numbers: Numbers,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.sm3."""
    m, n = gradient.shape
    share = cpu_threads.share(m, 1, -(-MIN_PER_THREAD // n))
    columns = kept(torch.zeros, -(-m // share), n, dtype=torch.int32, device="cpu")
    arguments = (
        _memory(theta),
        _memory(gradient),
        _NO_ROWS if rows is None else rows.numpy(),
        *(bound.view(torch.int32).numpy() for bound in bounds[:3]),
        columns.numpy(),
        _NO_BUFFER if buffer is None else buffer.view(-1).numpy(),
        _KINDS[theta.dtype],
        _KINDS[gradient.dtype],
        *map(f32, numbers),
        *_counter(key),
        _rounding(rounding_draw),
        share,
    )
    once(cpu_threads.run, _sm3_entry, arguments, m, share)
    torch.amax(columns, 0, out=bounds.new_column.view(torch.int32))
