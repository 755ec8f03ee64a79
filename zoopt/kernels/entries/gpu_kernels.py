"""Operations on some entries of each tensor on the GPU, compiled: one program a block of entries.

A batch comes as a table of its tensors' entries, as in noise's `gpu_blocks`. `limits` is how many
elements a tensor has, or in memory that of each if TABLE: what is outside is not touched.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam.gpu_kernels import _step
from zoopt.kernels.entries import operands
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.gpu_blocks import _load, _memory, _place, _store
from zoopt.kernels.noise.gpu_tile import halfwords_at, nearest, stochastic, widened

_OLDEST = tl.constexpr(operands.OLDEST)
_ROUNDING = tl.constexpr(philox.PURPOSE_ROUNDING)
_RUN_TIME = ["limits", "widths", "shift", "numel", "offset", "number", "rounding_draw", "k0", "k1"]


@triton.jit
def _spots(
    index,
    limits,
    tensor,
    start,
    inside,
    whole,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the entries of a block lie in their tensor, and which of them do."""
    if index is None:
        return start + tl.arange(0, BLOCK), inside
    else:
        own = _memory(index, tensor, tl.int32, TABLE, VECTORS)
        spots = _load(own + start, inside, whole, False, BLOCK)
        if TABLE:
            limits = tl.load(limits + tensor)
        return spots, inside & (spots >= 0) & (spots < limits)


@triton.jit(do_not_specialize=[name for name in _RUN_TIME if name != "widths"])
def adam_entries_kernel(
    theta,
    gradient,
    index,
    base,
    first,
    second,
    age,
    limits,
    first_corrections,
    second_corrections,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    beta1,
    beta2,
    complement1,
    complement2,
    scale,
    eps,
    decay,
    rounding_draw,
    k0,
    k1,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.adam_entries."""
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start = block * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    inside, whole = tl.arange(0, BLOCK) < left, left == BLOCK
    spots, here = _spots(index, limits, tensor, start, inside, whole, TABLE, VECTORS, BLOCK)
    theta = _memory(theta, tensor, DTYPE, TABLE, False)
    gradient = _memory(gradient, tensor, GRADIENT, TABLE, False)
    first = _memory(first, tensor, tl.float32, TABLE, VECTORS) + start
    second = _memory(second, tensor, tl.float32, TABLE, VECTORS) + start
    age = _memory(age, tensor, tl.int16, TABLE, VECTORS) + start
    # All is loaded before anything is computed.
    g = widened(tl.load(gradient + spots, mask=here, other=0), BACKEND)
    x = widened(tl.load(theta + spots, mask=here, other=0), BACKEND)
    m = _load(first, inside, whole, False, BLOCK)
    v = _load(second, inside, whole, False, BLOCK)
    a = _load(age, inside, whole, False, BLOCK).to(tl.int32)
    a = tl.minimum(tl.maximum(a, 0), _OLDEST - 1) + 1
    m = m * beta1 + g * complement1
    v = v * beta2 + (g * g) * complement2
    mhat = tl.div_rn(m, tl.load(first_corrections + a))
    vhat = tl.div_rn(v, tl.load(second_corrections + a))
    step = _step(mhat, vhat, 1.0, eps, BACKEND) * scale
    if base is None:
        x = x + (step - x * decay)
    else:
        origin = _memory(base, tensor, DTYPE, TABLE, VECTORS) + start
        change = (widened(_load(origin, inside, whole, False, BLOCK), BACKEND) - x) * decay
        x = (x + change) + step
    if STOCHASTIC:
        bits = halfwords_at(offset + spots.to(tl.int64), number, rounding_draw, k0, k1, _ROUNDING)
        rounded = stochastic(x, bits, DTYPE, BACKEND)
    else:
        rounded = nearest(x, DTYPE, BACKEND)
    tl.store(theta + spots, rounded, mask=here)
    _store(first, m, inside, whole, False, BLOCK)
    _store(second, v, inside, whole, False, BLOCK)
    _store(age, a.to(tl.int16), inside, whole, False, BLOCK)


@triton.jit(do_not_specialize=["limits", "shift", "numel", "offset", "number"])
def sum_entries_kernel(
    gradient,
    index,
    total,
    squares,
    limits,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.sum_entries; sums are of DTYPE."""
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start = block * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    inside, whole = tl.arange(0, BLOCK) < left, left == BLOCK
    spots, here = _spots(index, limits, tensor, start, inside, whole, TABLE, VECTORS, BLOCK)
    gradient = _memory(gradient, tensor, GRADIENT, TABLE, False)
    total = _memory(total, tensor, DTYPE, TABLE, VECTORS) + start
    squares = _memory(squares, tensor, DTYPE, TABLE, VECTORS) + start
    g = widened(tl.load(gradient + spots, mask=here, other=0), BACKEND)
    x = widened(_load(total, inside, whole, False, BLOCK), BACKEND) + g
    y = widened(_load(squares, inside, whole, False, BLOCK), BACKEND) + g * g
    _store(total, nearest(x, DTYPE, BACKEND), inside, whole, False, BLOCK)
    _store(squares, nearest(y, DTYPE, BACKEND), inside, whole, False, BLOCK)


@triton.jit(do_not_specialize=["limits", "widths", "shift", "numel", "offset", "number"])
def cover_entries_kernel(
    gradient,
    index,
    rows,
    columns,
    bounds,
    limits,
    widths,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    GRADIENT: tl.constexpr,
    PICKED: tl.constexpr,
    RAISES: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.cover_entries in two launches: the first makes nu of all entries, `bounds`; if
    RAISES, rows and columns, then read as int32, are raised to it. `widths` is how many columns a
    matrix has, as `limits` is."""
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start = block * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    inside, whole = tl.arange(0, BLOCK) < left, left == BLOCK
    spots, here = _spots(index, limits, tensor, start, inside, whole, TABLE, VECTORS, BLOCK)
    if TABLE:
        widths = tl.load(widths + tensor)
    i = spots // widths.to(tl.int32)
    j = spots - i * widths.to(tl.int32)
    bounds = _memory(bounds, tensor, tl.int32 if RAISES else tl.float32, TABLE, VECTORS) + start
    if RAISES:
        # Numbers that are not negative are in the order of their bits, and a NaN is the greatest.
        nu = _load(bounds, inside, whole, False, BLOCK)
        rows = _memory(rows, tensor, tl.int32, TABLE, False)
        columns = _memory(columns, tensor, tl.int32, TABLE, False)
        tl.atomic_max(rows + i, nu, mask=here, sem="relaxed")
        tl.atomic_max(columns + j, nu, mask=here, sem="relaxed")
    else:
        rows = _memory(rows, tensor, tl.float32, TABLE, False)
        columns = _memory(columns, tensor, tl.float32, TABLE, False)
        gradient = _memory(gradient, tensor, GRADIENT, TABLE, False)
        if PICKED:
            spots = start + tl.arange(0, BLOCK)
        g = widened(tl.load(gradient + spots, mask=here, other=0), BACKEND)
        r = tl.load(rows + i, mask=here, other=0.0)
        c = tl.load(columns + j, mask=here, other=0.0)
        nu = tl.where((r < c) | (r != r), r, c) + g * g
        _store(bounds, tl.where(nu == nu, nu, float("nan")), inside, whole, False, BLOCK)
