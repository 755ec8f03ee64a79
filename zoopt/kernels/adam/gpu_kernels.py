"""Adam on the GPU, compiled: one program a block of elements, both its moments in registers.

A batch comes as a table, and its tensors as columns of addresses, as in noise's `gpu_kernels`.
Blocks are aligned to those of codes; only the last block of a tensor is masked.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam.gpu_moments import read_moment, write_moment
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.gpu_blocks import _load, _memory, _place, _store
from zoopt.kernels.noise.gpu_tile import halfwords, halfwords_at, nearest, stochastic

_ROUNDING = tl.constexpr(philox.PURPOSE_ROUNDING)
_MOMENTS = tl.constexpr(philox.PURPOSE_MOMENTS)
_RUN_TIME = ["shift", "numel", "offset", "number", "moment_draw", "rounding_draw", "k0", "k1"]


@triton.jit
def _bits(
    index,
    number,
    draw,
    k0,
    k1,
    PURPOSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """16 bits for each of BLOCK elements from index on, which begins a Philox block if ALIGNED."""
    if ALIGNED:
        return halfwords(index, number, draw, k0, k1, PURPOSE, BLOCK)
    else:
        return halfwords_at(index + tl.arange(0, BLOCK), number, draw, k0, k1, PURPOSE)


@triton.jit
def _store_sums(sums, x, left, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of squares of groups of GROUP elements of x (BLOCK,); `left` of x are inside."""
    totals = tl.sum(tl.reshape(x * x, [BLOCK // GROUP, GROUP]), axis=1)
    group = tl.arange(0, BLOCK // GROUP)
    tl.store(sums + group, totals, mask=group * GROUP < left)


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
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.adamw on theta, of DTYPE, or, where that is None, reference.adam on out, of DTYPE.

    FIRST and SECOND are the dtypes of the moments' codes. CODED and STOCHASTIC say whether moments
    and theta are rounded by random bits. Where GROUP is not 0, direction_sums and gradient_sums
    receive the sums of squares of every GROUP elements, those of a tensor from groups[tensor] on.
    """
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start = block * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    inside = tl.arange(0, BLOCK) < left
    whole = left == BLOCK
    index = offset + start
    gradient = _memory(gradient, tensor, GRADIENT, TABLE, VECTORS)
    first_codes = _memory(first_codes, tensor, FIRST, TABLE, VECTORS)
    second_codes = _memory(second_codes, tensor, SECOND, TABLE, VECTORS)
    if FORMAT == "int8" or FORMAT == "int4":
        first_scale = _memory(first_scale, tensor, tl.float32, TABLE, VECTORS)
        second_scale = _memory(second_scale, tensor, tl.float32, TABLE, VECTORS)
    g = _load(gradient + start, inside, whole, BLOCK)
    m = read_moment(first_codes, first_scale, start, left, whole, FORMAT, True, BLOCK)
    v = read_moment(second_codes, second_scale, start, left, whole, FORMAT, False, BLOCK)
    m = beta1 * m + complement1 * g
    v = beta2 * v + complement2 * (g * g)
    step = tl.div_rn(scale * m, tl.sqrt_rn(v) + eps)
    if theta is None:
        out = _memory(out, tensor, DTYPE, TABLE, VECTORS)
        _store(out + start, nearest(step, DTYPE, BACKEND), inside, whole, BLOCK)
        if GROUP > 0:
            group = start // GROUP
            if TABLE:
                group += tl.load(groups + tensor)
            _store_sums(direction_sums + group, tl.where(inside, step, 0.0), left, GROUP, BLOCK)
            _store_sums(gradient_sums + group, tl.where(inside, g, 0.0), left, GROUP, BLOCK)
    else:
        theta = _memory(theta, tensor, DTYPE, TABLE, VECTORS)
        x = decay * _load(theta + start, inside, whole, BLOCK) + step
        if STOCHASTIC:
            bits = _bits(index, number, rounding_draw, k0, k1, _ROUNDING, ALIGNED, BLOCK)
            rounded = stochastic(x, bits, DTYPE)
        else:
            rounded = nearest(x, DTYPE, BACKEND)
        _store(theta + start, rounded, inside, whole, BLOCK)
    bits = 0
    if CODED:
        bits = _bits(index, number, moment_draw, k0, k1, _MOMENTS, ALIGNED, BLOCK)
    write_moment(
        m, first_codes, first_scale, start, left, whole, bits, FORMAT, True, CODED, BACKEND, BLOCK
    )
    write_moment(
        v,
        second_codes,
        second_scale,
        start,
        left,
        whole,
        bits,
        FORMAT,
        False,
        CODED,
        BACKEND,
        BLOCK,
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
    SIGNS: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.average on out, of DTYPE, and one signed moment, whose codes are of FIRST."""
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start = block * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    inside = tl.arange(0, BLOCK) < left
    whole = left == BLOCK
    gradient = _memory(gradient, tensor, GRADIENT, TABLE, VECTORS)
    out = _memory(out, tensor, DTYPE, TABLE, VECTORS)
    codes = _memory(codes, tensor, FIRST, TABLE, VECTORS)
    if FORMAT == "int8" or FORMAT == "int4":
        scale = _memory(scale, tensor, tl.float32, TABLE, VECTORS)
    g = _load(gradient + start, inside, whole, BLOCK)
    m = read_moment(codes, scale, start, left, whole, FORMAT, True, BLOCK)
    # Multiples of the gradient are rounded to its own dtype before they are added.
    look, keep = nearest(look_g * g, GRADIENT, BACKEND), nearest(keep_g * g, GRADIENT, BACKEND)
    step = look_m * m + look.to(tl.float32)
    m = keep_m * m + keep.to(tl.float32)
    if SIGNS:
        step = tl.where(step > 0.0, 1.0, tl.where(step < 0.0, -1.0, 0.0))
    _store(out + start, nearest(step, DTYPE, BACKEND), inside, whole, BLOCK)
    bits = 0
    if CODED:
        index = offset + start
        bits = _bits(index, number, moment_draw, k0, k1, _MOMENTS, ALIGNED, BLOCK)
    write_moment(m, codes, scale, start, left, whole, bits, FORMAT, True, CODED, BACKEND, BLOCK)
