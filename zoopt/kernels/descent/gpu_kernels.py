"""The compiled operations on the GPU: one program per block of elements of a tensor in the batch.

Tables, directions and numbers are passed in the same way as to the noise kernels.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_blocks import block_here, draw_of, memory_of, read, write
from zoopt.kernels.noise.gpu_tile import added, direction, kept, rounded

_RUN_TIME = ["shift", "numel", "offset", "number", "k0", "k1"]
_RUN_TIME += ["threshold", "rounding_draw", "count"]


@triton.jit
def _sum(
    total,
    terms,
    count,
    index,
    number,
    k0,
    k1,
    threshold,
    WIDTH: tl.constexpr,
    COLUMN: tl.constexpr,
    UNROLLED: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total + sum_j a_j z_j; the a_j are in column COLUMN of the terms."""
    one = tl.full([], 1.0, tl.float32)
    if UNROLLED:
        for j in tl.static_range(UNROLLED):
            draw = draw_of(terms[WIDTH * j], terms[WIDTH * j + 1])
            z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            total = added(total, terms[WIDTH * j + COLUMN] * z, keep, MASKED)
    elif terms is not None:
        j = 0
        while j < count:
            term = terms + WIDTH * j
            draw = draw_of(tl.load(term), tl.load(term + 1))
            z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
            total = added(total, tl.load(term + COLUMN) * z, keep, MASKED)
            j += 1
    return total


@triton.jit
def _shaped(total, beside, radial, SHAPE: tl.constexpr):
    """Turn a sum of directions into a displacement, see `Shape`."""
    if SHAPE == 0:
        return total
    elif SHAPE <= 2:
        return total * beside
    elif SHAPE == 3:
        return tl.div_rn(total, tl.sqrt_rn(beside))
    else:
        return total + beside * radial


@triton.jit(do_not_specialize=_RUN_TIME)
def descend_kernel(
    theta,
    out,
    first,
    second,
    beside,
    indices,
    terms,
    numbers,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    count,
    decay,
    radial,
    radial_estimate,
    rounding_draw,
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    SHAPE: tl.constexpr,
    RULE: tl.constexpr,
    UNROLLED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TABLE: tl.constexpr,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.descend; SHAPE and RULE are the numbers in `gpu._SHAPES` and `gpu._RULES`."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    theta, even = memory_of(theta, tensor, TABLE)
    out, even_out = memory_of(out, tensor, TABLE)
    whole = whole & even & even_out
    if RULE == 1 or RULE == 3:
        first, even = memory_of(first, tensor, TABLE)
        whole = whole & even
    if RULE == 3:
        second, even = memory_of(second, tensor, TABLE)
        whole = whole & even
    if SHAPE >= 2:
        beside, even = memory_of(beside, tensor, TABLE)
        whole = whole & even
    x = read(theta, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    shaping = x
    if SHAPE == 1:
        if TABLE:
            limit = tl.load(tl.load(beside + tensor).to(tl.pointer_type(tl.float32)))
        else:
            limit = tl.load(beside)
        limit = limit.to(DTYPE).to(tl.float32)
        shaping = tl.where(tl.abs(x) <= limit, 1.0, 0.0)
    elif SHAPE == 2:
        shaping = read(beside, spots, block, start, inside, whole, tl.uint8, TABLE, False, BLOCK)
    elif SHAPE >= 3:
        shaping = read(beside, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK)
    if SHAPE == 3:
        shaping = tl.where(inside, shaping, 1.0)
    x = decay * x
    if RULE:
        estimate = _sum(
            *(tl.zeros([BLOCK], tl.float32), terms, count, index, number, k0, k1, threshold),
            *(4, 3, UNROLLED, NORMAL, MASKED, BACKEND, BLOCK),
        )
        update = _shaped(estimate, shaping, radial_estimate, SHAPE)
        if RULE == 1:
            a = read(first, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK)
            a = numbers[0] * a + update
            write(first, a, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK)
            update = numbers[1] * a
        elif RULE == 2:
            update = numbers[0] * tl.where(update > 0.0, 1.0, tl.where(update < 0.0, -1.0, 0.0))
        else:
            a = read(first, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK)
            a = numbers[0] * a + numbers[1] * update
            write(first, a, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK)
            b = read(second, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK)
            b = numbers[2] * b + numbers[3] * (update * update)
            write(second, b, spots, block, start, inside, whole, tl.float32, TABLE, False, BLOCK)
            correction = tl.full([BLOCK], numbers[4], tl.float32)
            root = tl.sqrt_rn(tl.div_rn(b, correction)) + numbers[6]
            update = tl.div_rn(numbers[5] * a, root)
    if SHAPE == 0:
        x = _sum(
            *(x, terms, count, index, number, k0, k1, threshold),
            *(4, 2, UNROLLED, NORMAL, MASKED, BACKEND, BLOCK),
        )
        if RULE:
            x = x + update
    else:
        moved = _sum(
            *(tl.zeros([BLOCK], tl.float32), terms, count, index, number, k0, k1, threshold),
            *(4, 2, UNROLLED, NORMAL, MASKED, BACKEND, BLOCK),
        )
        moved = _shaped(moved, shaping, radial, SHAPE)
        if RULE:
            moved = update + moved
        x = x + moved
    x = rounded(x, index, number, rounding_draw, k0, k1, DTYPE, STOCHASTIC, BACKEND, BLOCK)
    write(out, x, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)


@triton.jit(do_not_specialize=_RUN_TIME)
def curve_kernel(
    state,
    indices,
    terms,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    count,
    base,
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    UNROLLED: tl.constexpr,
    TABLE: tl.constexpr,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """state <- state (base + sum_j a_j z_j^2)."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    state, even = memory_of(state, tensor, TABLE)
    whole = whole & even
    growth = tl.zeros([BLOCK], tl.float32) + base
    one = tl.full([], 1.0, tl.float32)
    if UNROLLED:
        for j in tl.static_range(UNROLLED):
            draw = draw_of(terms[3 * j], terms[3 * j + 1])
            z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            growth += terms[3 * j + 2] * (z * z)
    elif terms is not None:
        j = 0
        while j < count:
            draw = draw_of(tl.load(terms + 3 * j), tl.load(terms + 3 * j + 1))
            z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
            growth += tl.load(terms + 3 * j + 2) * (z * z)
            j += 1
    x = read(state, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    write(state, growth * x, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)


@triton.jit(do_not_specialize=_RUN_TIME)
def turn_kernel(
    state,
    indices,
    terms,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    count,
    radial,
    keep,
    grow,
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    UNROLLED: tl.constexpr,
    TABLE: tl.constexpr,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """state <- keep state + grow (sum_j a_j z_j + radial state)."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    state, even = memory_of(state, tensor, TABLE)
    whole = whole & even
    estimate = _sum(
        *(tl.zeros([BLOCK], tl.float32), terms, count, index, number, k0, k1, threshold),
        *(3, 2, UNROLLED, NORMAL, MASKED, BACKEND, BLOCK),
    )
    x = read(state, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    x = keep * x + grow * (estimate + radial * x)
    write(state, x, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
