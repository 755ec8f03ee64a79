"""The average of a gradient and a stored moment on the GPU, compiled. See `gpu_kernels`."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam.gpu_kernels import (
    _MOMENTS,
    _RUN_TIME,
    EVEN_ELEMENTS,
    codes_of,
    scales_of,
    words_of,
)
from zoopt.kernels.adam.gpu_moments import moment_bytes, read_moment, write_moment
from zoopt.kernels.noise.gpu_blocks import _load, _memory, _place, _store
from zoopt.kernels.noise.gpu_tile import nearest, widened


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
    at,
    span,
    index,
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
    """`average_kernel` on the block at `at`, as `_moments_block`."""
    left = tl.minimum(span - at, BLOCK)
    if EVEN:
        left = tl.multiple_of(left, EVEN_ELEMENTS)
    inside = tl.arange(0, BLOCK) < left
    whole = left == BLOCK
    if MODE != "load":
        g = widened(_load(gradient + at, inside, whole, EVEN, BLOCK), BACKEND)
    if MODE == "store":
        m = g
    else:
        place = (at, left, whole)
        m = read_moment(codes, scale, *place, None, FORMAT, SIGNED, EVEN, BACKEND, BLOCK)
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
        _store(out + at, nearest(step, DTYPE, BACKEND), inside, whole, EVEN, BLOCK)
    if MODE != "load":
        random = 0
        if CODED:
            words = words_of(index + at, number, moment_draw, k0, k1, _MOMENTS, ALIGNED, BLOCK)
            low, high = moment_bytes(words, BACKEND, BLOCK)
            random = low if SIGNED else high
        write_moment(
            *(m, codes, scale, at, left, whole, random),
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
    begin = program * (BLOCKS * BLOCK)
    span = tl.minimum(numel - begin, BLOCKS * BLOCK).to(tl.int32)
    index = offset + begin
    if MODE != "load":
        gradient = _memory(gradient, tensor, GRADIENT, TABLE, VECTORS) + begin
    if MODE != "store":
        out = _memory(out, tensor, DTYPE, TABLE, VECTORS) + begin
    codes = codes_of(codes, tensor, begin, FIRST, FORMAT, TABLE, VECTORS)
    if FORMAT == "int8" or FORMAT == "int4":
        scale = scales_of(scale, tensor, begin, FORMAT, TABLE, VECTORS)
    at = 0
    while at < span:
        if EVEN:  # noqa: SIM114
            _average_block(
                *(gradient, out, codes, scale, at, span, index, number),
                *(look_m, look_g, keep_m, keep_g, moment_draw, k0, k1),
                *(DTYPE, GRADIENT, FORMAT, CODED, MODE, SIGNED, ALIGNED, True, BACKEND, BLOCK),
            )
        elif numel % EVEN_ELEMENTS == 0:
            _average_block(
                *(gradient, out, codes, scale, at, span, index, number),
                *(look_m, look_g, keep_m, keep_g, moment_draw, k0, k1),
                *(DTYPE, GRADIENT, FORMAT, CODED, MODE, SIGNED, ALIGNED, True, BACKEND, BLOCK),
            )
        else:
            _average_block(
                *(gradient, out, codes, scale, at, span, index, number),
                *(look_m, look_g, keep_m, keep_g, moment_draw, k0, k1),
                *(DTYPE, GRADIENT, FORMAT, CODED, MODE, SIGNED, ALIGNED, False, BACKEND, BLOCK),
            )
        at += BLOCK
