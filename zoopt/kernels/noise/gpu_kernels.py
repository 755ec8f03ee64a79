"""The operations on the GPU, compiled: one program a block of elements of one of a batch's tensors.

A batch comes as a table (TABLE): `places` has a row a tensor, int64 (count + 1, 4): the tensor's
first block, its elements, the position of its first element, its stream; the last row ends the
blocks. `hints` says in which tensor every 2^shift-th block lies. Tensors are then columns of
addresses, int64. A tensor alone comes as itself, with `numel`, `offset` and `number` by value.

Positions count from the start of the Philox block that holds the tensor's first element; `skipped`
elements of that block precede it, none where ALIGNED. Only blocks at a tensor's ends are masked.

Directions come in WIDTH numbers each: the draw's two halves, and its coefficients. Up to a few are
passed by value and unrolled (UNROLLED of them); `terms` of more is memory, `count` of them. Numbers
are floats, as Triton compiles anew for integers in a tuple that 16 divides.

`threshold` is the mask's where MASKED; elsewhere nothing of a mask is compiled. No parameter is
called `stream`, or anything else that Triton's launcher keeps for itself.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_tile import added, direction, kept, rounded

_RUN_TIME = ["shift", "numel", "offset", "number", "k0", "k1"]
_RUN_TIME += ["threshold", "rounding_draw", "count", "draw", "d"]


@triton.jit
def _place(places, hints, shift, numel, offset, number, TABLE: tl.constexpr):
    """The program's tensor, its block there, and the tensor's elements, offset and stream."""
    program = tl.program_id(0).to(tl.int64)
    if TABLE:
        tensor = tl.load(hints + (program >> shift))
        while tl.load(places + 4 * tensor + 4) <= program:
            tensor += 1
        row = places + 4 * tensor
        block = program - tl.load(row)
        return tensor, block, tl.load(row + 1), tl.load(row + 2), tl.load(row + 3).to(tl.int32)
    else:
        return 0, program, numel, offset, number


@triton.jit
def _memory(memory, tensor, DTYPE: tl.constexpr, TABLE: tl.constexpr, VECTORS: tl.constexpr):
    """Where the tensor lies; its address is a multiple of 16 if VECTORS."""
    if TABLE:
        pointer = tl.load(memory + tensor).to(tl.pointer_type(DTYPE))
        if VECTORS:
            pointer = tl.multiple_of(pointer, 16)
        return pointer
    else:
        return memory


@triton.jit
def _block(block, numel, offset, NORMAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block begins in the tensor, which of its elements lie inside, (BLOCK,), and whether
    all do. Within a block positions have 32 bits, so that addresses share their 64-bit base."""
    start = block * BLOCK
    i = tl.arange(0, BLOCK)
    if ALIGNED:
        left = tl.minimum(numel - start, BLOCK).to(tl.int32)
        return start, i < left, left == BLOCK
    else:
        start -= offset % (8 if NORMAL else 128)
        left = tl.minimum(numel - start, BLOCK).to(tl.int32)
        return start, (i < left) & (i >= tl.maximum(-start, 0).to(tl.int32)), False


@triton.jit
def _load(pointer, inside, whole, BLOCK: tl.constexpr):
    """A block, float32 (BLOCK,): without a mask where it is whole."""
    i = tl.arange(0, BLOCK)
    if whole:  # noqa: SIM108
        x = tl.load(pointer + i)
    else:
        x = tl.load(pointer + i, mask=inside)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, x, inside, whole, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if whole:
        tl.store(pointer + i, x)
    else:
        tl.store(pointer + i, x, mask=inside)


@triton.jit
def _draw(high, low):
    """The draw of two halves, which are floats below 65536: int32."""
    high, low = tl.full([], high, tl.float32), tl.full([], low, tl.float32)
    return (high.to(tl.int32) << 16) | low.to(tl.int32)


@triton.jit
def numbers_kernel(out, numbers, COUNT: tl.constexpr):
    """out (COUNT,) <- numbers that the launch brings by value, so that nothing is copied."""
    for j in tl.static_range(COUNT):
        tl.store(out + j, numbers[j])


@triton.jit(do_not_specialize=_RUN_TIME)
def sum_kernel(
    theta,
    out,
    addend,
    terms,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    count,
    decay,
    rounding_draw,
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    DECAYS: tl.constexpr,
    UNROLLED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out <- round(decay theta + sum_j a_j z_j + addend); the addend may be None."""
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start, inside, whole = _block(block, numel, offset, NORMAL, ALIGNED, BLOCK)
    index = offset + start
    theta = _memory(theta, tensor, DTYPE, TABLE, VECTORS)
    out = _memory(out, tensor, DTYPE, TABLE, VECTORS)
    x = _load(theta + start, inside, whole, BLOCK)
    if DECAYS:
        x = decay * x
    if UNROLLED:
        for j in tl.static_range(UNROLLED):
            draw = _draw(terms[3 * j], terms[3 * j + 1])
            step = direction(terms[3 * j + 2], index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            x = added(x, step, keep, MASKED)
    elif terms is not None:
        j = 0
        while j < count:
            draw = _draw(tl.load(terms + 3 * j), tl.load(terms + 3 * j + 1))
            a = tl.load(terms + 3 * j + 2)
            step = direction(a, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            x = added(x, step, keep, MASKED)
            j += 1
    if addend is not None:
        addend = _memory(addend, tensor, tl.float32, TABLE, VECTORS)
        x = x + _load(addend + start, inside, whole, BLOCK)
    x = rounded(x, index, number, rounding_draw, k0, k1, DTYPE, STOCHASTIC, BACKEND, BLOCK)
    _store(out + start, x, inside, whole, BLOCK)


@triton.jit(do_not_specialize=_RUN_TIME)
def momentum_kernel(
    theta,
    buffer,
    terms,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    count,
    decay,
    momentum,
    step_size,
    rounding_draw,
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    UNROLLED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """buffer <- momentum buffer + sum_j g_j z_j, and with the new buffer
    theta <- round(decay theta + sum_j a_j z_j + step_size buffer)."""
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start, inside, whole = _block(block, numel, offset, NORMAL, ALIGNED, BLOCK)
    index = offset + start
    theta = _memory(theta, tensor, DTYPE, TABLE, VECTORS)
    buffer = _memory(buffer, tensor, tl.float32, TABLE, VECTORS)
    x = decay * _load(theta + start, inside, whole, BLOCK)
    buf = momentum * _load(buffer + start, inside, whole, BLOCK)
    one = tl.full([], 1.0, tl.float32)
    if UNROLLED:
        for j in tl.static_range(UNROLLED):
            draw = _draw(terms[4 * j], terms[4 * j + 1])
            z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            x = added(x, terms[4 * j + 2] * z, keep, MASKED)
            buf = added(buf, terms[4 * j + 3] * z, keep, MASKED)
    elif terms is not None:
        j = 0
        while j < count:
            draw = _draw(tl.load(terms + 4 * j), tl.load(terms + 4 * j + 1))
            z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            x = added(x, tl.load(terms + 4 * j + 2) * z, keep, MASKED)
            buf = added(buf, tl.load(terms + 4 * j + 3) * z, keep, MASKED)
            j += 1
    _store(buffer + start, buf, inside, whole, BLOCK)
    x = x + step_size * buf
    x = rounded(x, index, number, rounding_draw, k0, k1, DTYPE, STOCHASTIC, BACKEND, BLOCK)
    _store(theta + start, x, inside, whole, BLOCK)


@triton.jit(do_not_specialize=_RUN_TIME)
def window_kernel(
    theta,
    terms,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    count,
    decay,
    step_size,
    eps,
    rounding_draw,
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.adam_window, the moments in registers. terms are memory, 7 numbers a direction: the
    draw's halves, coefficient, gradient, weights in m and in v, and whether it closes a step."""
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start, inside, whole = _block(block, numel, offset, NORMAL, ALIGNED, BLOCK)
    index = offset + start
    theta = _memory(theta, tensor, DTYPE, TABLE, VECTORS)
    x = decay * _load(theta + start, inside, whole, BLOCK)
    ghat = tl.zeros([BLOCK], tl.float32)
    m, v = ghat, ghat
    one = tl.full([], 1.0, tl.float32)
    j = 0
    while j < count:
        term = terms + 7 * j
        draw = _draw(tl.load(term), tl.load(term + 1))
        z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
        keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
        x = added(x, tl.load(term + 2) * z, keep, MASKED)
        ghat = added(ghat, tl.load(term + 3) * z, keep, MASKED)
        if tl.load(term + 6) != 0.0:
            m = m + tl.load(term + 4) * ghat
            v = v + tl.load(term + 5) * (ghat * ghat)
            ghat = tl.zeros([BLOCK], tl.float32)
        j += 1
    x = x + tl.div_rn(step_size * m, tl.sqrt_rn(v) + eps)
    x = rounded(x, index, number, rounding_draw, k0, k1, DTYPE, STOCHASTIC, BACKEND, BLOCK)
    _store(theta + start, x, inside, whole, BLOCK)


@triton.jit(do_not_specialize=_RUN_TIME)
def rows_kernel(
    weight,
    rows,
    out,
    alpha,
    d,
    offset,
    number,
    draw,
    k0,
    k1,
    threshold,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] <- weight[rows[i]] + alpha z, a program for each i and block of the row's noise."""
    PER_BLOCK: tl.constexpr = 8 if NORMAL else 128
    row = tl.load(rows + tl.program_id(0))
    begin = offset + row * d
    skipped = begin % PER_BLOCK
    start = tl.program_id(1) * BLOCK - skipped
    index = begin + start
    column = start + tl.arange(0, BLOCK)
    inside = (column >= 0) & (column < d)
    step = direction(alpha, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
    keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
    x = added(tl.load(weight + row * d + column, mask=inside).to(tl.float32), step, keep, MASKED)
    dtype: tl.constexpr = out.dtype.element_ty
    x = rounded(x, index, number, draw, k0, k1, dtype, False, BACKEND, BLOCK)
    tl.store(out + tl.program_id(0).to(tl.int64) * d + column, x, mask=inside)
