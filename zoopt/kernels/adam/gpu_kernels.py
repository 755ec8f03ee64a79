"""Adam on the GPU, compiled: one program a block of elements, both its moments in registers."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam.gpu_moments import read_moment, write_moment
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.gpu_tile import halfwords, halfwords_at, nearest, stochastic

_ROUNDING = tl.constexpr(philox.PURPOSE_ROUNDING)
_MOMENTS = tl.constexpr(philox.PURPOSE_MOMENTS)


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
def _store_sums(sums, x, start, numel, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of squares of every GROUP of x (BLOCK,)."""
    totals = tl.sum(tl.reshape(x * x, [BLOCK // GROUP, GROUP]), axis=1)
    group = start // GROUP + tl.arange(0, BLOCK // GROUP)
    tl.store(sums + group, totals, mask=group * GROUP < numel)


@triton.jit(do_not_specialize=["number", "moment_draw", "rounding_draw", "k0", "k1"])
def moments_kernel(
    theta,
    gradient,
    out,
    first_codes,
    first_scale,
    second_codes,
    second_scale,
    direction_sums,
    gradient_sums,
    decay,
    beta1,
    beta2,
    complement1,
    complement2,
    factor,
    eps,
    numel,
    pairs,
    first,
    number,
    moment_draw,
    rounding_draw,
    k0,
    k1,
    FORMAT: tl.constexpr,
    CODED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference_adam.adamw on theta or, where that is None, reference_adam.adam on out.

    pairs is numel / 2, rounded up. CODED and STOCHASTIC say whether moments and theta are rounded
    by random bits. Where GROUP is not 0, direction_sums and gradient_sums receive the sums of
    squares of every GROUP elements.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    inside = i < numel
    g = tl.load(gradient + i, mask=inside, other=0.0).to(tl.float32)
    m = read_moment(first_codes, first_scale, start, numel, pairs, FORMAT, True, BLOCK)
    v = read_moment(second_codes, second_scale, start, numel, pairs, FORMAT, False, BLOCK)
    m = beta1 * m + complement1 * g
    v = beta2 * v + complement2 * (g * g)
    step = tl.div_rn(factor * m, tl.sqrt_rn(v) + eps)
    if theta is None:
        tl.store(out + i, nearest(step, out.dtype.element_ty, BACKEND), mask=inside)
        if GROUP > 0:
            shown = tl.where(inside, step, 0.0)
            _store_sums(direction_sums, shown, start, numel, GROUP, BLOCK)
            _store_sums(gradient_sums, g, start, numel, GROUP, BLOCK)
    else:
        x = decay * tl.load(theta + i, mask=inside).to(tl.float32) + step
        dtype: tl.constexpr = theta.dtype.element_ty
        if STOCHASTIC:
            index = first + start
            bits = _bits(index, number, rounding_draw, k0, k1, _ROUNDING, ALIGNED, BLOCK)
            tl.store(theta + i, stochastic(x, bits, dtype), mask=inside)
        else:
            tl.store(theta + i, nearest(x, dtype, BACKEND), mask=inside)
    bits = 0
    if CODED:
        bits = _bits(first + start, number, moment_draw, k0, k1, _MOMENTS, ALIGNED, BLOCK)
    write_moment(
        m, first_codes, first_scale, start, numel, pairs, bits, FORMAT, True, CODED, BACKEND, BLOCK
    )
    write_moment(
        v,
        second_codes,
        second_scale,
        start,
        numel,
        pairs,
        bits,
        FORMAT,
        False,
        CODED,
        BACKEND,
        BLOCK,
    )
