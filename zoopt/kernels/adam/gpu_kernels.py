"""Adam on the GPU, compiled: one program a few blocks of elements, both moments in registers.

A batch comes as a table, and its tensors as columns of addresses, as in noise's `gpu_kernels`.
Blocks are aligned to those of codes; only the last block of a tensor is masked.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam import gpu_moments
from zoopt.kernels.adam.gpu_moments import moment_bytes, read_moment, write_moment
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.gpu_blocks import _load, _memory, _place, _store
from zoopt.kernels.noise.gpu_tile import (
    halfwords_at,
    halves_of,
    nearest,
    stochastic,
    widened,
    word_pairs,
)
from zoopt.kernels.runtime import gpu_ptx as ptx

EVEN_ELEMENTS = tl.constexpr(gpu_moments.EVEN_ELEMENTS)
_ROUNDING = tl.constexpr(philox.PURPOSE_ROUNDING)
_MOMENTS = tl.constexpr(philox.PURPOSE_MOMENTS)
_RUN_TIME = ["shift", "numel", "offset", "number", "moment_draw", "rounding_draw", "k0", "k1"]


@triton.jit
def _words(
    index,
    number,
    draw,
    k0,
    k1,
    PURPOSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """16 bits for each of BLOCK elements from index on, which begins a Philox block if ALIGNED: two
    elements to a word, uint32 (BLOCK // 2,)."""
    if ALIGNED:
        return word_pairs(index, number, draw, k0, k1, PURPOSE, BLOCK)
    else:
        bits = halfwords_at(index + tl.arange(0, BLOCK), number, draw, k0, k1, PURPOSE)
        first, second = tl.split(tl.reshape(bits, [BLOCK // 2, 2]))
        return first | (second << 16)


@triton.jit
def _step(m, v, scale, eps, BACKEND: tl.constexpr):
    """(scale m) / (sqrt(v) + eps)."""
    if BACKEND == "cuda":
        return ptx.quotients(scale * m, v, eps)
    else:
        return tl.div_rn(scale * m, tl.sqrt_rn(v) + eps)


@triton.jit
def _store_sums(sums, x, left, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of squares of groups of GROUP elements of x (BLOCK,); `left` of x are inside."""
    totals = tl.sum(tl.reshape(x * x, [BLOCK // GROUP, GROUP]), axis=1)
    group = tl.arange(0, BLOCK // GROUP)
    tl.store(sums + group, totals, mask=group * GROUP < left)


@triton.jit
def _moments_block(
    theta,
    gradient,
    out,
    first_codes,
    first_scale,
    second_codes,
    second_scale,
    start,
    end,
    offset,
    number,
    decay,
    beta1,
    beta2,
    complement1,
    complement2,
    scale,
    eps,
    direction_sums,
    gradient_sums,
    moment_draw,
    rounding_draw,
    k0,
    k1,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    CODED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`moments_kernel` on the block of a tensor that begins at `start`."""
    left = tl.minimum(end - start, BLOCK).to(tl.int32)
    if EVEN:
        left = tl.multiple_of(left, EVEN_ELEMENTS)
    inside = tl.arange(0, BLOCK) < left
    whole = left == BLOCK
    index = offset + start
    # All is loaded before anything is computed.
    g = widened(_load(gradient + start, inside, whole, EVEN, BLOCK), BACKEND)
    if theta is not None:
        x = widened(_load(theta + start, inside, whole, EVEN, BLOCK), BACKEND)
    place = (start, left, whole)
    m = read_moment(first_codes, first_scale, *place, FORMAT, True, EVEN, BACKEND, BLOCK)
    v = read_moment(second_codes, second_scale, *place, FORMAT, False, EVEN, BACKEND, BLOCK)
    m = beta1 * m + complement1 * g
    v = beta2 * v + complement2 * (g * g)
    step = _step(m, v, scale, eps, BACKEND)
    if theta is None:
        _store(out + start, nearest(step, DTYPE, BACKEND), inside, whole, EVEN, BLOCK)
        if GROUP > 0:
            group = start // GROUP
            _store_sums(direction_sums + group, tl.where(inside, step, 0.0), left, GROUP, BLOCK)
            _store_sums(gradient_sums + group, tl.where(inside, g, 0.0), left, GROUP, BLOCK)
    else:
        x = decay * x + step
        if STOCHASTIC:
            words = _words(index, number, rounding_draw, k0, k1, _ROUNDING, ALIGNED, BLOCK)
            rounded = stochastic(x, halves_of(words, BACKEND, BLOCK), DTYPE, BACKEND)
        else:
            rounded = nearest(x, DTYPE, BACKEND)
        _store(theta + start, rounded, inside, whole, EVEN, BLOCK)
    first_random, second_random = 0, 0
    if CODED:
        words = _words(index, number, moment_draw, k0, k1, _MOMENTS, ALIGNED, BLOCK)
        first_random, second_random = moment_bytes(words, BACKEND, BLOCK)
    write_moment(
        *(m, first_codes, first_scale, start, left, whole, first_random),
        *(FORMAT, True, CODED, EVEN, BACKEND, BLOCK),
    )
    write_moment(
        *(v, second_codes, second_scale, start, left, whole, second_random),
        *(FORMAT, False, CODED, EVEN, BACKEND, BLOCK),
    )


@triton.jit(do_not_specialize=_RUN_TIME)
def moments_kernel(
    theta,
    gradient,
    out,
    first_codes,
    first_scale,
    second_codes,
    second_scale,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    decay,
    beta1,
    beta2,
    complement1,
    complement2,
    scale,
    eps,
    direction_sums,
    gradient_sums,
    groups,
    moment_draw,
    rounding_draw,
    k0,
    k1,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    FORMAT: tl.constexpr,
    CODED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUP: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.adamw on theta, of DTYPE, or, where that is None, reference.adam on out, of DTYPE.

    FIRST and SECOND are the dtypes of the moments' codes. CODED and STOCHASTIC say whether moments
    and theta are rounded by random bits. If EVEN, all tensors have a multiple of EVEN_ELEMENTS
    elements, and code for others is not compiled. Where GROUP is not 0, direction_sums and
    gradient_sums receive the sums of squares of every GROUP elements, those of a tensor from
    groups[tensor] on.
    """
    tensor, program, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    gradient = _memory(gradient, tensor, GRADIENT, TABLE, VECTORS)
    first_codes = _memory(first_codes, tensor, FIRST, TABLE, VECTORS)
    second_codes = _memory(second_codes, tensor, SECOND, TABLE, VECTORS)
    if FORMAT == "int8" or FORMAT == "int4":
        first_scale = _memory(first_scale, tensor, tl.float32, TABLE, VECTORS)
        second_scale = _memory(second_scale, tensor, tl.float32, TABLE, VECTORS)
    if theta is None:
        out = _memory(out, tensor, DTYPE, TABLE, VECTORS)
        if GROUP > 0 and TABLE:
            direction_sums += tl.load(groups + tensor)
            gradient_sums += tl.load(groups + tensor)
    else:
        theta = _memory(theta, tensor, DTYPE, TABLE, VECTORS)
    start = program * (BLOCKS * BLOCK)
    end = tl.minimum(start + BLOCKS * BLOCK, numel)
    while start < end:
        if EVEN:  # noqa: SIM114
            _moments_block(
                *(theta, gradient, out, first_codes, first_scale, second_codes, second_scale),
                *(start, end, offset, number, decay, beta1, beta2, complement1, complement2),
                *(scale, eps, direction_sums, gradient_sums, moment_draw, rounding_draw, k0, k1),
                *(DTYPE, FORMAT, CODED, STOCHASTIC, GROUP, ALIGNED, True, BACKEND, BLOCK),
            )
        elif numel % EVEN_ELEMENTS == 0:
            _moments_block(
                *(theta, gradient, out, first_codes, first_scale, second_codes, second_scale),
                *(start, end, offset, number, decay, beta1, beta2, complement1, complement2),
                *(scale, eps, direction_sums, gradient_sums, moment_draw, rounding_draw, k0, k1),
                *(DTYPE, FORMAT, CODED, STOCHASTIC, GROUP, ALIGNED, True, BACKEND, BLOCK),
            )
        else:
            _moments_block(
                *(theta, gradient, out, first_codes, first_scale, second_codes, second_scale),
                *(start, end, offset, number, decay, beta1, beta2, complement1, complement2),
                *(scale, eps, direction_sums, gradient_sums, moment_draw, rounding_draw, k0, k1),
                *(DTYPE, FORMAT, CODED, STOCHASTIC, GROUP, ALIGNED, False, BACKEND, BLOCK),
            )
        start += BLOCK


@triton.jit
def _fma(a, b, c, BACKEND: tl.constexpr):
    """a b + c of float32 numbers, rounded once."""
    if BACKEND == "interpreter":
        # Its own rounds twice. In float64 the product is exact.
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _average_block(
    gradient,
    out,
    codes,
    scale,
    start,
    end,
    offset,
    number,
    look_m,
    look_g,
    keep_m,
    keep_g,
    moment_draw,
    k0,
    k1,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    FORMAT: tl.constexpr,
    CODED: tl.constexpr,
    MODE: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`average_kernel` on the block of a tensor that begins at `start`."""
    left = tl.minimum(end - start, BLOCK).to(tl.int32)
    if EVEN:
        left = tl.multiple_of(left, EVEN_ELEMENTS)
    inside = tl.arange(0, BLOCK) < left
    whole = left == BLOCK
    if MODE != "load":
        g = widened(_load(gradient + start, inside, whole, EVEN, BLOCK), BACKEND)
    if MODE == "store":
        m = g
    else:
        m = read_moment(codes, scale, start, left, whole, FORMAT, SIGNED, EVEN, BACKEND, BLOCK)
        if MODE == "load":
            step = m
        elif MODE == "lerp":
            near = look_m < 0.5
            m = _fma(tl.where(near, look_m, look_m - 1.0), g - m, tl.where(near, m, g), BACKEND)
            step = m
        else:
            # Multiples of the gradient are rounded to its own dtype before they are added.
            look = nearest(look_g * g, GRADIENT, BACKEND)
            keep = nearest(keep_g * g, GRADIENT, BACKEND)
            step = look_m * m + widened(look, BACKEND)
            m = keep_m * m + widened(keep, BACKEND)
            if MODE == "signs":
                step = tl.where(step > 0.0, 1.0, tl.where(step < 0.0, -1.0, 0.0))
        _store(out + start, nearest(step, DTYPE, BACKEND), inside, whole, EVEN, BLOCK)
    if MODE != "load":
        random = 0
        if CODED:
            index = offset + start
            words = _words(index, number, moment_draw, k0, k1, _MOMENTS, ALIGNED, BLOCK)
            low, high = moment_bytes(words, BACKEND, BLOCK)
            random = low if SIGNED else high
        write_moment(
            *(m, codes, scale, start, left, whole, random),
            *(FORMAT, SIGNED, CODED, EVEN, BACKEND, BLOCK),
        )


@triton.jit(do_not_specialize=_RUN_TIME)
def average_kernel(
    gradient,
    out,
    codes,
    scale,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    look_m,
    look_g,
    keep_m,
    keep_g,
    moment_draw,
    k0,
    k1,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    FIRST: tl.constexpr,
    FORMAT: tl.constexpr,
    CODED: tl.constexpr,
    MODE: tl.constexpr,
    SIGNED: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.average on out, of DTYPE, or None, and one moment, whose codes are of FIRST."""
    tensor, program, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    if MODE != "load":
        gradient = _memory(gradient, tensor, GRADIENT, TABLE, VECTORS)
    if MODE != "store":
        out = _memory(out, tensor, DTYPE, TABLE, VECTORS)
    codes = _memory(codes, tensor, FIRST, TABLE, VECTORS)
    if FORMAT == "int8" or FORMAT == "int4":
        scale = _memory(scale, tensor, tl.float32, TABLE, VECTORS)
    start = program * (BLOCKS * BLOCK)
    end = tl.minimum(start + BLOCKS * BLOCK, numel)
    while start < end:
        if EVEN:  # noqa: SIM114
            _average_block(
                *(gradient, out, codes, scale, start, end, offset, number),
                *(look_m, look_g, keep_m, keep_g, moment_draw, k0, k1),
                *(DTYPE, GRADIENT, FORMAT, CODED, MODE, SIGNED, ALIGNED, True, BACKEND, BLOCK),
            )
        elif numel % EVEN_ELEMENTS == 0:
            _average_block(
                *(gradient, out, codes, scale, start, end, offset, number),
                *(look_m, look_g, keep_m, keep_g, moment_draw, k0, k1),
                *(DTYPE, GRADIENT, FORMAT, CODED, MODE, SIGNED, ALIGNED, True, BACKEND, BLOCK),
            )
        else:
            _average_block(
                *(gradient, out, codes, scale, start, end, offset, number),
                *(look_m, look_g, keep_m, keep_g, moment_draw, k0, k1),
                *(DTYPE, GRADIENT, FORMAT, CODED, MODE, SIGNED, ALIGNED, False, BACKEND, BLOCK),
            )
        start += BLOCK
