"""Adam on the GPU, compiled: one program a few blocks of elements, both moments in registers.

A batch comes as a table, and its tensors as columns of addresses, as in noise's `gpu_kernels`.
Blocks are aligned to those of codes; only the last block of a tensor is masked.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam import gpu_moments, moments
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
_BLOCK8, _BLOCK4 = tl.constexpr(moments.BLOCK["int8"]), tl.constexpr(moments.BLOCK["int4"])
_RUN_TIME = ["shift", "numel", "offset", "number", "moment_draw", "rounding_draw", "k0", "k1"]


@triton.jit
def words_of(
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
        # Of an unsigned number an eighth is a shift.
        return word_pairs(index.to(tl.uint64), number, draw, k0, k1, PURPOSE, BLOCK)
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
def codes_of(
    memory,
    tensor,
    begin,
    TYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """A moment's codes from element `begin` on."""
    return _memory(memory, tensor, TYPE, TABLE, VECTORS) + (
        begin // 2 if FORMAT == "int4" else begin
    )


@triton.jit
def scales_of(
    memory, tensor, begin, FORMAT: tl.constexpr, TABLE: tl.constexpr, VECTORS: tl.constexpr
):
    """The scales of a moment's codes from that of element `begin` on."""
    SIZE: tl.constexpr = _BLOCK8 if FORMAT == "int8" else _BLOCK4
    return _memory(memory, tensor, tl.float32, TABLE, VECTORS) + begin // SIZE


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
    at,
    span,
    index,
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
    """`moments_kernel` on the block at `at` of `span` elements, of which the first one's position
    in the noise is `index`."""
    left = tl.minimum(span - at, BLOCK)
    if EVEN:
        left = tl.multiple_of(left, EVEN_ELEMENTS)
    inside = tl.arange(0, BLOCK) < left
    whole = left == BLOCK
    index += at
    # All is loaded before anything is computed.
    g = widened(_load(gradient + at, inside, whole, EVEN, BLOCK), BACKEND)
    if theta is not None:
        x = widened(_load(theta + at, inside, whole, EVEN, BLOCK), BACKEND)
    place = (at, left, whole)
    m = read_moment(first_codes, first_scale, *place, beta1, FORMAT, True, EVEN, BACKEND, BLOCK)
    v = read_moment(second_codes, second_scale, *place, beta2, FORMAT, False, EVEN, BACKEND, BLOCK)
    m += complement1 * g
    v += complement2 * (g * g)
    step = _step(m, v, scale, eps, BACKEND)
    if theta is None:
        _store(out + at, nearest(step, DTYPE, BACKEND), inside, whole, EVEN, BLOCK)
        if GROUP > 0:
            group = at // GROUP
            _store_sums(direction_sums + group, tl.where(inside, step, 0.0), left, GROUP, BLOCK)
            _store_sums(gradient_sums + group, tl.where(inside, g, 0.0), left, GROUP, BLOCK)
    else:
        x = decay * x + step
        if STOCHASTIC:
            words = words_of(index, number, rounding_draw, k0, k1, _ROUNDING, ALIGNED, BLOCK)
            rounded = stochastic(x, halves_of(words, BACKEND, BLOCK), DTYPE, BACKEND)
        else:
            rounded = nearest(x, DTYPE, BACKEND)
        _store(theta + at, rounded, inside, whole, EVEN, BLOCK)
    first_random, second_random = 0, 0
    if CODED:
        words = words_of(index, number, moment_draw, k0, k1, _MOMENTS, ALIGNED, BLOCK)
        first_random, second_random = moment_bytes(words, BACKEND, BLOCK)
    write_moment(
        *(m, first_codes, first_scale, at, left, whole, first_random),
        *(FORMAT, True, CODED, EVEN, BACKEND, BLOCK),
    )
    write_moment(
        *(v, second_codes, second_scale, at, left, whole, second_random),
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
    begin = program * (BLOCKS * BLOCK)
    span = tl.minimum(numel - begin, BLOCKS * BLOCK).to(tl.int32)
    index = offset + begin
    gradient = _memory(gradient, tensor, GRADIENT, TABLE, VECTORS) + begin
    first_codes = codes_of(first_codes, tensor, begin, FIRST, FORMAT, TABLE, VECTORS)
    second_codes = codes_of(second_codes, tensor, begin, SECOND, FORMAT, TABLE, VECTORS)
    if FORMAT == "int8" or FORMAT == "int4":
        first_scale = scales_of(first_scale, tensor, begin, FORMAT, TABLE, VECTORS)
        second_scale = scales_of(second_scale, tensor, begin, FORMAT, TABLE, VECTORS)
    if theta is None:
        out = _memory(out, tensor, DTYPE, TABLE, VECTORS) + begin
        if GROUP > 0:
            group = begin // GROUP
            if TABLE:
                group += tl.load(groups + tensor)
            direction_sums += group
            gradient_sums += group
    else:
        theta = _memory(theta, tensor, DTYPE, TABLE, VECTORS) + begin
    at = 0
    while at < span:
        if EVEN:  # noqa: SIM114
            _moments_block(
                *(theta, gradient, out, first_codes, first_scale, second_codes, second_scale),
                *(at, span, index, number, decay, beta1, beta2, complement1, complement2),
                *(scale, eps, direction_sums, gradient_sums, moment_draw, rounding_draw, k0, k1),
                *(DTYPE, FORMAT, CODED, STOCHASTIC, GROUP, ALIGNED, True, BACKEND, BLOCK),
            )
        elif numel % EVEN_ELEMENTS == 0:
            _moments_block(
                *(theta, gradient, out, first_codes, first_scale, second_codes, second_scale),
                *(at, span, index, number, decay, beta1, beta2, complement1, complement2),
                *(scale, eps, direction_sums, gradient_sums, moment_draw, rounding_draw, k0, k1),
                *(DTYPE, FORMAT, CODED, STOCHASTIC, GROUP, ALIGNED, True, BACKEND, BLOCK),
            )
        else:
            _moments_block(
                *(theta, gradient, out, first_codes, first_scale, second_codes, second_scale),
                *(at, span, index, number, decay, beta1, beta2, complement1, complement2),
                *(scale, eps, direction_sums, gradient_sums, moment_draw, rounding_draw, k0, k1),
                *(DTYPE, FORMAT, CODED, STOCHASTIC, GROUP, ALIGNED, False, BACKEND, BLOCK),
            )
        at += BLOCK
