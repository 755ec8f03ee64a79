"""The operations on the GPU, compiled: one program a block of elements of one of a batch's tensors.

For the place of a block see `gpu_blocks`. If there are `indices`, the elements are those at the
indices, in order.

A direction is WIDTH numbers: the draw's two halves, and its coefficients. A few directions are
passed by value and unrolled (UNROLLED of them); with more, `terms` is memory with `count` of them.
Numbers are floats, since Triton compiles again for integers in a tuple that 16 divides.

`threshold` is the mask's if MASKED; otherwise no mask is compiled. No parameter is called `stream`,
or has another name that Triton's launcher reserves.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_blocks import block_here, draw_of, memory_of, read, write
from zoopt.kernels.noise.gpu_tile import added, direction, kept, rounded

_RUN_TIME = ["shift", "numel", "offset", "number", "k0", "k1"]
_RUN_TIME += ["threshold", "rounding_draw", "count", "draw", "d"]


@triton.jit
def numbers_kernel(out, numbers, COUNT: tl.constexpr):
    """out (COUNT,) <- numbers that the launch passes by value, so that nothing is copied."""
    for j in tl.static_range(COUNT):
        tl.store(out + j, numbers[j])


@triton.jit(do_not_specialize=_RUN_TIME)
def sum_kernel(
    theta,
    out,
    addend,
    indices,
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
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out <- round(decay theta + sum_j a_j z_j + addend); the addend may be None."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    theta, even = memory_of(theta, tensor, TABLE)
    out, even_out = memory_of(out, tensor, TABLE)
    whole = whole & even & even_out
    x = read(theta, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    if DECAYS:
        x = decay * x
    if UNROLLED:
        for j in tl.static_range(UNROLLED):
            draw = draw_of(terms[3 * j], terms[3 * j + 1])
            step = direction(terms[3 * j + 2], index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            x = added(x, step, keep, MASKED)
    elif terms is not None:
        j = 0
        while j < count:
            draw = draw_of(tl.load(terms + 3 * j), tl.load(terms + 3 * j + 1))
            a = tl.load(terms + 3 * j + 2)
            step = direction(a, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            x = added(x, step, keep, MASKED)
            j += 1
    if addend is not None:
        addend, even = memory_of(addend, tensor, TABLE)
        x = x + read(
            addend, spots, block, start, inside, whole & even, tl.float32, TABLE, False, BLOCK
        )
    x = rounded(x, index, number, rounding_draw, k0, k1, DTYPE, STOCHASTIC, BACKEND, BLOCK)
    write(out, x, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)


@triton.jit(do_not_specialize=_RUN_TIME)
def momentum_kernel(
    theta,
    buffer,
    indices,
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
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """buffer <- momentum buffer + sum_j g_j z_j, and with the new buffer
    theta <- round(decay theta + sum_j a_j z_j + step_size buffer)."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    theta, even = memory_of(theta, tensor, TABLE)
    buffer, even_buffer = memory_of(buffer, tensor, TABLE)
    whole = whole & even & even_buffer
    x = decay * read(theta, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    buf = momentum * read(
        buffer, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK
    )
    one = tl.full([], 1.0, tl.float32)
    if UNROLLED:
        for j in tl.static_range(UNROLLED):
            draw = draw_of(terms[4 * j], terms[4 * j + 1])
            z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            x = added(x, terms[4 * j + 2] * z, keep, MASKED)
            buf = added(buf, terms[4 * j + 3] * z, keep, MASKED)
    elif terms is not None:
        j = 0
        while j < count:
            draw = draw_of(tl.load(terms + 4 * j), tl.load(terms + 4 * j + 1))
            z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            x = added(x, tl.load(terms + 4 * j + 2) * z, keep, MASKED)
            buf = added(buf, tl.load(terms + 4 * j + 3) * z, keep, MASKED)
            j += 1
    write(buffer, buf, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK)
    x = x + step_size * buf
    x = rounded(x, index, number, rounding_draw, k0, k1, DTYPE, STOCHASTIC, BACKEND, BLOCK)
    write(theta, x, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)


@triton.jit(do_not_specialize=_RUN_TIME)
def window_kernel(
    theta,
    indices,
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
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.adam_window, the moments in registers. terms are memory, 7 numbers for each
    direction: the draw's halves, coefficient, gradient, weights in m and in v, and whether it
    closes a step."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    theta, even = memory_of(theta, tensor, TABLE)
    whole = whole & even
    x = decay * read(theta, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    ghat = tl.zeros([BLOCK], tl.float32)
    m, v = ghat, ghat
    one = tl.full([], 1.0, tl.float32)
    j = 0
    while j < count:
        term = terms + 7 * j
        draw = draw_of(tl.load(term), tl.load(term + 1))
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
    write(theta, x, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)


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
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] <- weight[rows[i]] + alpha z, a program for each i and block of the row's noise.

    If ALIGNED, all rows begin and end at Philox blocks, and so at vectors of memory.
    """
    PER_BLOCK: tl.constexpr = 8 if NORMAL else 128
    row = tl.load(rows + tl.program_id(0))
    if ALIGNED:
        d = d // PER_BLOCK * PER_BLOCK  # So the compiler sees that it is a multiple.
    begin = offset + row * d
    start = tl.program_id(1) * BLOCK
    if not ALIGNED:
        start = start - begin % PER_BLOCK
    index = begin + start
    column = start + tl.arange(0, BLOCK)
    inside = column < d
    if not ALIGNED:
        inside = inside & (column >= 0)
    step = direction(alpha, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
    keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
    x = added(tl.load(weight + row * d + column, mask=inside).to(tl.float32), step, keep, MASKED)
    dtype: tl.constexpr = out.dtype.element_ty
    x = rounded(x, index, number, draw, k0, k1, dtype, False, BACKEND, BLOCK)
    tl.store(out + tl.program_id(0).to(tl.int64) * d + column, x, mask=inside)
