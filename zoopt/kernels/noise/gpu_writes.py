"""Many writes of theta on the GPU, compiled: all of them on one block while it is in registers."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_blocks import block_here, draw_of, memory_of, read, write
from zoopt.kernels.noise.gpu_kernels import _RUN_TIME
from zoopt.kernels.noise.gpu_tile import added, direction, kept, nearest, rounded


@triton.jit(do_not_specialize=_RUN_TIME)
def writes_kernel(
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
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    ESTIMATES: tl.constexpr,
    TABLE: tl.constexpr,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.write_each: theta stays in registers from its first write to its last, and so does
    the direction that was made last. terms are memory, as `Script.numbers` has them."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    theta, even = memory_of(theta, tensor, TABLE)
    whole = whole & even
    x = read(theta, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    one = tl.full([], 1.0, tl.float32)
    last = draw_of(tl.load(terms + 9), tl.load(terms + 10))
    z = direction(one, index, number, last, k0, k1, NORMAL, BACKEND, BLOCK)
    keep = kept(index, number, last, k0, k1, threshold, MASKED, BLOCK)
    w, at = 0, 0
    while w < count:
        x = tl.load(terms + at) * x
        stochastic = tl.load(terms + at + 1) != 0.0
        rounding_draw = draw_of(tl.load(terms + at + 2), tl.load(terms + at + 3))
        rule = tl.load(terms + at + 4)
        step_size, eps = tl.load(terms + at + 5), tl.load(terms + at + 6)
        j = tl.load(terms + at + 7).to(tl.int32)
        i = tl.load(terms + at + 8).to(tl.int32)
        at += 9
        while j > 0:
            draw = draw_of(tl.load(terms + at), tl.load(terms + at + 1))
            if draw != last:
                z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
                keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
                last = draw
            x = added(x, tl.load(terms + at + 2) * z, keep, MASKED)
            at += 3
            j -= 1
        if ESTIMATES:
            ghat = tl.zeros([BLOCK], tl.float32)
            m, v = ghat, ghat
            while i > 0:
                draw = draw_of(tl.load(terms + at), tl.load(terms + at + 1))
                if draw != last:
                    z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
                    keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
                    last = draw
                ghat = added(ghat, tl.load(terms + at + 2) * z, keep, MASKED)
                if tl.load(terms + at + 5) != 0.0:
                    m = m + tl.load(terms + at + 3) * ghat
                    v = v + tl.load(terms + at + 4) * (ghat * ghat)
                    ghat = tl.zeros([BLOCK], tl.float32)
                at += 6
                i -= 1
            if rule == 1.0:
                sign = tl.where(ghat > 0.0, 1.0, 0.0) - tl.where(ghat < 0.0, 1.0, 0.0)
                x = x + step_size * sign
            elif rule == 2.0:
                x = x + tl.div_rn(step_size * m, tl.sqrt_rn(v) + eps)
        if DTYPE.primitive_bitwidth < 32:
            if stochastic:
                x = rounded(
                    x, index, number, rounding_draw, k0, k1, DTYPE, True, BACKEND, BLOCK
                ).to(tl.float32)
            else:
                x = nearest(x, DTYPE, BACKEND).to(tl.float32)
        w += 1
    x = x.to(DTYPE)
    write(theta, x, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
