"""Parts of the GPU kernels, in registers: generate a block of noise, round a block of results.

BACKEND is "cuda", "hip" or "interpreter" (numpy underneath). Two instructions have exact
substitutes where they are missing: in the interpreter a fused multiply-add goes through float64,
and rounding to bfloat16, one instruction in CUDA, is done on the integer bits elsewhere.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise import philox
from zoopt.kernels.runtime import gpu_ptx as ptx

_M0, _M1 = tl.constexpr(philox.MULTIPLIER_0), tl.constexpr(philox.MULTIPLIER_1)
_W0, _W1 = tl.constexpr(philox.WEYL_0), tl.constexpr(philox.WEYL_1)
_P1, _P2 = tl.constexpr(philox.P1), tl.constexpr(philox.P2)
_P3, _P4 = tl.constexpr(philox.P3), tl.constexpr(philox.P4)
_C0, _C1 = tl.constexpr(philox.C0), tl.constexpr(philox.C1)
_C2, _C3 = tl.constexpr(philox.C2), tl.constexpr(philox.C3)
_U_SCALE, _U_SHIFT = tl.constexpr(philox.U_SCALE), tl.constexpr(philox.U_SHIFT)
_Q_SHIFT = tl.constexpr(philox.Q_SHIFT)
_DIRECTION = tl.constexpr(philox.PURPOSE_DIRECTION)
_ROUNDING = tl.constexpr(philox.PURPOSE_ROUNDING)
_MASK = tl.constexpr(philox.PURPOSE_MASK)


@triton.jit
def _fma(a, b, c, BACKEND: tl.constexpr):
    if BACKEND == "interpreter":
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _u32(x):
    """An int32 argument read as unsigned."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def philox4x32(block, stream, draw, k0, k1, PURPOSE: tl.constexpr):
    """The four words of each Philox block of a tensor of block numbers, int64: uint32."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32) + (PURPOSE << 24)
    c2 = _u32(draw) + tl.zeros_like(c0)
    c3 = _u32(stream) + tl.zeros_like(c0)
    key_0, key_1 = _u32(k0), _u32(k1)
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * _M0
        product_1 = c2.to(tl.uint64) * _M1
        c0, c1, c2, c3 = (
            (product_1 >> 32).to(tl.uint32) ^ c1 ^ key_0,
            product_1.to(tl.uint32),
            (product_0 >> 32).to(tl.uint32) ^ c3 ^ key_1,
            product_0.to(tl.uint32),
        )
        key_0 = (key_0 + _W0).to(tl.uint32)
        key_1 = (key_1 + _W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _words(
    index, stream, draw, k0, k1, PURPOSE: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    """The words of the Philox blocks that hold BLOCK elements from index on: uint32.

    index is a multiple of PER_BLOCK, the elements that one Philox block serves. The result has
    shape (4 BLOCK / PER_BLOCK,).
    """
    block = index // PER_BLOCK + tl.arange(0, BLOCK // PER_BLOCK)
    c0, c1, c2, c3 = philox4x32(block, stream, draw, k0, k1, PURPOSE)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [4 * BLOCK // PER_BLOCK])


@triton.jit
def _quantile(half, BACKEND: tl.constexpr):
    """The normal for 16 bits, which are read as a signed integer (int32)."""
    x = half.to(tl.float32) + 0.5
    q = _fma(x, x, _Q_SHIFT, BACKEND).to(tl.int32, bitcast=True)
    u = _fma(q.to(tl.float32), _U_SCALE, _U_SHIFT, BACKEND)
    f = ((q & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    c = _fma(f, _C3, _C2, BACKEND)
    c = _fma(c, f, _C1, BACKEND)
    c = _fma(c, f, _C0, BACKEND)
    p = _fma(u, _P4, _P3, BACKEND)
    p = _fma(p, u, _P2, BACKEND)
    p = _fma(p, u, _P1, BACKEND)
    return x * _fma(p, u, c, BACKEND)


@triton.jit
def word_pairs(index, stream, draw, k0, k1, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """16 bits for each of BLOCK elements from index on, two elements to a word, the first in the
    low half: uint32, (BLOCK // 2,)."""
    return _words(index, stream, draw, k0, k1, PURPOSE, 8, BLOCK)


@triton.jit
def halves_of(words, BACKEND: tl.constexpr, BLOCK: tl.constexpr):
    """The 16 bits of each element of words of two: uint32, (BLOCK,)."""
    if BACKEND == "cuda":
        low, high = ptx.word_halves(words)
    else:
        low, high = words & 0xFFFF, words >> 16
    return tl.reshape(tl.join(low, high), [BLOCK])


@triton.jit
def halfwords(
    index,
    stream,
    draw,
    k0,
    k1,
    PURPOSE: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """16 bits for each of BLOCK elements from index on: uint32, (BLOCK,)."""
    return halves_of(word_pairs(index, stream, draw, k0, k1, PURPOSE, BLOCK), BACKEND, BLOCK)


@triton.jit
def halfwords_at(index, stream, draw, k0, k1, PURPOSE: tl.constexpr):
    """16 bits for each element of a tensor of indices, int64: a Philox call for each."""
    c0, c1, c2, c3 = philox4x32(index >> 3, stream, draw, k0, k1, PURPOSE)
    low = tl.where((index & 2) == 0, c0, c1)
    high = tl.where((index & 2) == 0, c2, c3)
    word = tl.where((index & 4) == 0, low, high)
    return tl.where((index & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def kept(index, stream, draw, k0, k1, threshold, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Which of BLOCK elements a direction moves: (BLOCK,), or an unused scalar without a mask."""
    if MASKED:
        # By any backend's operations: CUDA's own for halves saves nothing here.
        bits = halfwords(index, stream, draw, k0, k1, _MASK, "any", BLOCK)
        return bits.to(tl.int32) < threshold
    else:
        return True


@triton.jit
def added(x, step, keep, MASKED: tl.constexpr):
    """x + step, or the bits of x where the step is not kept."""
    if MASKED:
        return tl.where(keep, x + step, x)
    else:
        return x + step


@triton.jit
def direction(
    a,
    index,
    stream,
    draw,
    k0,
    k1,
    NORMAL: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a z of BLOCK elements from index on: float32, (BLOCK,)."""
    if NORMAL:
        w = _words(index, stream, draw, k0, k1, _DIRECTION, 8, BLOCK)
        low = (w << 16).to(tl.int32, bitcast=True) >> 16
        high = w.to(tl.int32, bitcast=True) >> 16
        z = tl.join(_quantile(low, BACKEND), _quantile(high, BACKEND))
        return a * tl.reshape(z, [BLOCK])
    else:
        w = _words(index, stream, draw, k0, k1, _DIRECTION, 128, BLOCK)
        w = tl.broadcast_to(tl.expand_dims(w, 1), [BLOCK // 32, 32])
        sign = (w << (31 - tl.arange(0, 32))[None, :]) & 0x80000000
        magnitude = tl.full([BLOCK], a, tl.float32)
        pattern = magnitude.to(tl.uint32, bitcast=True) ^ tl.reshape(sign, [BLOCK])
        return pattern.to(tl.float32, bitcast=True)


@triton.jit
def widened(x, BACKEND: tl.constexpr):
    """Numbers of any dtype as float32."""
    if BACKEND == "cuda" and x.dtype == tl.bfloat16:
        return ptx.wide_bfloat16(x)
    else:
        return x.to(tl.float32)


@triton.jit
def nearest(x, dtype: tl.constexpr, BACKEND: tl.constexpr):
    """x, float32, rounded to nearest in a dtype."""
    if BACKEND != "cuda" and dtype == tl.bfloat16:
        # A NaN stays one: the payloads of NaNs from bfloat16 or arithmetic cannot carry over.
        pattern = x.to(tl.uint32, bitcast=True)
        near = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
        return near.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def stochastic(x, bits, dtype: tl.constexpr, BACKEND: tl.constexpr):
    """x, float32, rounded to bfloat16 or float16 by random bits, uint32 below 65536."""
    pattern = x.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        if BACKEND == "cuda":
            carried = ptx.carried(x, bits)
        else:
            carried = tl.where(tl.abs(x) < float("inf"), pattern + bits, pattern)
        return (carried >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # The formula of reference.round_stochastic.
        magnitude = tl.abs(x)
        exponent = tl.maximum((pattern >> 23) & 0xFF, 113)
        ulp = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        inverse = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        uniform = (bits & 0x1FFF).to(tl.float32) * 0.0001220703125
        steps = tl.floor(magnitude * inverse + uniform)
        near = tl.where(magnitude < 65536.0, steps * ulp, magnitude)
        signed = near.to(tl.uint32, bitcast=True) | (pattern & 0x80000000)
        return signed.to(tl.float32, bitcast=True).to(tl.float16)


@triton.jit
def rounded(
    x,
    index,
    stream,
    draw,
    k0,
    k1,
    dtype: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, float32 (BLOCK,), in theta's dtype."""
    if STOCHASTIC:
        bits = halfwords(index, stream, draw, k0, k1, _ROUNDING, BACKEND, BLOCK)
        return stochastic(x, bits, dtype, BACKEND)
    else:
        return nearest(x, dtype, BACKEND)
