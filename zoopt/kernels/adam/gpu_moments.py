"""How the GPU kernels read and write moments: a block of elements of any format, in registers.

FORMAT is a name of `moments.Format`. A program's block holds whole blocks of codes.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam import moments
from zoopt.kernels.noise.gpu_blocks import _load, _store
from zoopt.kernels.noise.gpu_tile import nearest, stochastic, widened
from zoopt.kernels.runtime import gpu_ptx as ptx

#: Tensors whose elements are a multiple of so many are read and written as vectors to their ends.
EVEN_ELEMENTS = 16
_BLOCK8, _BLOCK4 = tl.constexpr(moments.BLOCK["int8"]), tl.constexpr(moments.BLOCK["int4"])
_SIGNED8 = tl.constexpr(moments.SIGNED_LEVELS["int8"])
_SIGNED4 = tl.constexpr(moments.SIGNED_LEVELS["int4"])
_UNSIGNED8 = tl.constexpr(moments.UNSIGNED_LEVELS["int8"])
_UNSIGNED4 = tl.constexpr(moments.UNSIGNED_LEVELS["int4"])
_MIN_SCALE = tl.constexpr(moments.MIN_SCALE)
#: Magnitudes, as squares in units of a block's levels, below which only a code's rounding differs:
#: those of 0 or 1, signed, and of unsigned codes 0.
_LEAST_SIGNED, _LEAST_UNSIGNED = tl.constexpr(0.25), tl.constexpr(1.6)
#: Elements of a thread on NVIDIA's GPUs.
_THREAD = tl.constexpr(8)
#: The first float32 whose spacing is 1.
_BYTE = tl.constexpr(2.0**23)


@triton.jit
def _spread(numbers, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Repeat each number for SIZE elements: (BLOCK // SIZE,) -> (BLOCK,)."""
    wide = tl.broadcast_to(tl.expand_dims(numbers, 1), [BLOCK // SIZE, SIZE])
    return tl.reshape(wide, [BLOCK])


@triton.jit
def _pairs(even, odd, BLOCK: tl.constexpr):
    """Numbers of even and of odd elements, one after the other: (BLOCK,)."""
    return tl.reshape(tl.join(even, odd), [BLOCK])


@triton.jit
def _float_of(bits):
    """2^23 + a number of few bits, as float32: the bits become the low ones of the mantissa."""
    return (bits.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def moment_bytes(words, BACKEND: tl.constexpr, BLOCK: tl.constexpr):
    """The random bytes of both moments, each as the float32 number 2^23 + byte: (BLOCK,) each.

    Args:
        words: 16 bits for each of two elements, uint32 (BLOCK // 2,).
    """
    if BACKEND == "cuda":
        even_m, even_v, odd_m, odd_v = ptx.word_floats(words)
    else:
        even_m, even_v = _float_of(words & 0xFF), _float_of((words >> 8) & 0xFF)
        odd_m, odd_v = _float_of((words >> 16) & 0xFF), _float_of(words >> 24)
    return _pairs(even_m, odd_m, BLOCK), _pairs(even_v, odd_v, BLOCK)


@triton.jit
def _floats(codes, SIGNED: tl.constexpr, BACKEND: tl.constexpr):
    """2^23 + b of bytes, or 2^23 + 128 + c of signed ones: float32."""
    if BACKEND == "cuda":
        return ptx.byte_floats(codes, SIGNED)
    elif SIGNED:
        return _float_of(codes.to(tl.int32) + 128)
    else:
        return _float_of(codes)


@triton.jit
def _half_floats(packed, BLOCK: tl.constexpr):
    """2^23 + h of the halves h of bytes (BLOCK // 2,): float32 (BLOCK,)."""
    return _pairs(_float_of(packed & 15), _float_of(packed >> 4), BLOCK)


@triton.jit
def _level(squared, BASE: tl.constexpr, BACKEND: tl.constexpr):
    """BASE + floor(sqrt(squared)) as a float32 of [2^23, 2^24), whose spacing is 1; BASE is 2^23 or
    2^23 - 1.

    Where the root is very close to an integer, the result may be that integer or the one below:
    both lead to the same code. So an approximate root suffices, and the floor is taken by rounding
    BASE + root - 1/2 to nearest, in the one rounding of the multiply-add.
    """
    inverse = ptx.inverse_roots(squared) if BACKEND == "cuda" else tl.rsqrt(squared)
    return tl.fma(squared, inverse, BASE - 0.5)


@triton.jit
def _scaled(levels, scales, TOP: tl.constexpr, SIGNED: tl.constexpr):
    """The numbers that levels stand for; unsigned ones' scales are already divided by TOP^2."""
    if SIGNED:
        return levels * tl.abs(levels) * (1.0 / (TOP * TOP)) * scales
    else:
        return levels * levels * scales


@triton.jit
def read_moment(
    codes,
    scale,
    start,
    left,
    whole,
    factor,
    FORMAT: tl.constexpr,
    SIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements start ... start + BLOCK - 1 of a moment, the first `left` of them inside, and all of
    them if `whole`: float32, (BLOCK,), times a factor, unless that is None. If EVEN, `left` is a
    multiple of EVEN_ELEMENTS. What elements outside are is undefined.
    """
    if FORMAT == "float32" or FORMAT == "bfloat16":
        inside = tl.arange(0, BLOCK) < left
        value = widened(_load(codes + start, inside, whole, EVEN, BLOCK), BACKEND)
    else:
        SIZE: tl.constexpr = _BLOCK8 if FORMAT == "int8" else _BLOCK4
        TOP8: tl.constexpr = _SIGNED8 if SIGNED else _UNSIGNED8
        TOP4: tl.constexpr = _SIGNED4 if SIGNED else _UNSIGNED4
        TOP: tl.constexpr = TOP8 if FORMAT == "int8" else TOP4
        row = tl.arange(0, BLOCK // SIZE)
        scales = tl.load(scale + start // SIZE + row, mask=row * SIZE < left, other=0.0)
        if not SIGNED:
            # A power of two, which may multiply the scale as well: all products are normal.
            scales *= 1.0 / (TOP * TOP)
        if FORMAT == "int8":
            inside = tl.arange(0, BLOCK) < left
            code = _load(codes + start, inside, whole, EVEN, BLOCK)
            level = _floats(code, SIGNED, BACKEND) - (_BYTE + 128.0 if SIGNED else _BYTE - 1.0)
            value = _scaled(level, _spread(scales, SIZE, BLOCK), TOP, SIGNED)
        else:
            inside = tl.arange(0, BLOCK // 2) < (left // 2 if EVEN else (left + 1) // 2)
            code = _load(codes + start // 2, inside, whole, EVEN, BLOCK // 2)
            if BACKEND == "cuda":
                spread = _spread(scales, SIZE // 2, BLOCK // 2)
                times = 1.0 if factor is None else factor
                first, second = ptx.looked_up(code, spread, times, SIGNED)
                return _pairs(first, second, BLOCK)
            level = _half_floats(code, BLOCK) - (_BYTE + 8.0 if SIGNED else _BYTE - 1.0)
            value = _scaled(level, _spread(scales, SIZE, BLOCK), TOP, SIGNED)
    if factor is not None:
        value = factor * value
    return value


@triton.jit
def _greater(a, b):
    """The larger number, or a NaN if there is one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(
    x,
    left,
    SIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    SIZE: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest magnitude of every SIZE elements of x (BLOCK,), which may be negative if SIGNED.
    If EVEN, those from `left` on are left out.

    By bit patterns, in which NaNs are the largest on every backend. First of the elements of a
    thread, which are all inside or all outside.
    """
    OWN: tl.constexpr = BLOCK // _THREAD
    if SIGNED:
        if BACKEND == "cuda":
            # The magnitude is free there.
            top = tl.reduce(tl.reshape(tl.abs(x), [OWN, _THREAD]), 1, _greater)
            top = top.to(tl.int32, bitcast=True)
        else:
            pattern = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            top = tl.max(tl.reshape(pattern, [OWN, _THREAD]), axis=1)
    else:
        top = tl.max(tl.reshape(x.to(tl.uint32, bitcast=True), [OWN, _THREAD]), axis=1)
    if EVEN:
        top = tl.where(tl.arange(0, OWN) * _THREAD < left, top, 0)
    largest = tl.max(tl.reshape(top, [BLOCK // SIZE, SIZE // _THREAD]), axis=1)
    # Of unsigned numbers only the sign of a NaN has to go.
    return (largest & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def write_moment(
    x,
    codes,
    scale,
    start,
    left,
    whole,
    random,
    FORMAT: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EVEN: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store x, float32 (BLOCK,), as elements start ... start + BLOCK - 1 of a moment; the first
    `left` of them are inside.

    random is 2^23 + a byte, float32 (BLOCK,), if STOCHASTIC, and not read otherwise.
    """
    inside = tl.arange(0, BLOCK) < left
    if FORMAT == "float32":
        _store(codes + start, x, inside, whole, EVEN, BLOCK)
    elif FORMAT == "bfloat16":
        if STOCHASTIC:
            upper = (random.to(tl.uint32, bitcast=True) & 0xFF) << 8
            rounded = stochastic(x, upper, tl.bfloat16, BACKEND)
        else:
            rounded = nearest(x, tl.bfloat16, BACKEND)
        _store(codes + start, rounded, inside, whole, EVEN, BLOCK)
    else:
        SIZE: tl.constexpr = _BLOCK8 if FORMAT == "int8" else _BLOCK4
        TOP8: tl.constexpr = _SIGNED8 if SIGNED else _UNSIGNED8
        TOP4: tl.constexpr = _SIGNED4 if SIGNED else _UNSIGNED4
        TOP: tl.constexpr = TOP8 if FORMAT == "int8" else TOP4
        if not EVEN:  # noqa: SIM102
            if not whole:
                x = tl.where(inside, x, 0.0)
        largest = _largest(x, left, SIGNED, EVEN, SIZE, BACKEND, BLOCK)
        tiny = (largest > 0.0) & (largest < _MIN_SCALE)
        largest = tl.where(tiny, _MIN_SCALE, largest)
        row = tl.arange(0, BLOCK // SIZE)
        if BACKEND == "cuda":
            ptx.stored(scale + start // SIZE + row, largest, row * SIZE < left)
            inverse = ptx.inverses(largest, TOP * TOP)
        else:
            tl.store(scale + start // SIZE + row, largest, mask=row * SIZE < left)
            inverse = tl.div_rn(tl.full([BLOCK // SIZE], TOP * TOP, tl.float32), largest)
        squared = tl.abs(x) * _spread(inverse, SIZE, BLOCK)
        # Numbers below have the level of this one, as have NaNs (0 times infinity).
        LEAST: tl.constexpr = _LEAST_SIGNED if SIGNED else _LEAST_UNSIGNED
        # An unsigned code is its level less 1.
        BASE: tl.constexpr = _BYTE if SIGNED else _BYTE - 1.0
        shifted = _level(tl.where(squared > LEAST, squared, LEAST), BASE, BACKEND)
        level = shifted - BASE
        # All products are exact: the square of a level, and nine bits times nine.
        rest = tl.fma(level * -1.0, level, squared)
        if STOCHASTIC:
            spacing = tl.fma(level, 0.0078125, 0.00390625)
            below = tl.fma(random - (_BYTE - 0.5), spacing, rest * -1.0)
        else:
            below = level + 0.5 - rest
        # Up where that is negative. The code is the integer in the mantissa.
        if BACKEND == "cuda":
            # By the sign, of which NaNs have none there.
            up = (below.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
        else:
            up = (below < 0.0).to(tl.int32)
        low = shifted.to(tl.int32, bitcast=True) + up
        if FORMAT == "int8":
            _store(codes + start, _bytes(low, x, SIGNED, BACKEND), inside, whole, EVEN, BLOCK)
        else:
            inside = tl.arange(0, BLOCK // 2) < (left // 2 if EVEN else (left + 1) // 2)
            packed = _halves(low, x, SIGNED, BACKEND, BLOCK)
            if not EVEN:  # noqa: SIM102
                if not whole:
                    # With an odd number of elements, the upper half of the last byte is 0.
                    both = tl.arange(0, BLOCK // 2) < left // 2
                    packed = tl.where(both, packed, packed & 15)
            _store(codes + start // 2, packed, inside, whole, EVEN, BLOCK // 2)


@triton.jit
def _bytes(low, x, SIGNED: tl.constexpr, BACKEND: tl.constexpr):
    """The codes of 8 bits in the low bytes of int32 numbers; if SIGNED, with the signs of x."""
    if BACKEND == "cuda":
        return ptx.packed_bytes(low, x, SIGNED)
    elif SIGNED:
        magnitude = low & 0xFF
        return tl.where(x < 0.0, -magnitude, magnitude).to(tl.int8)
    else:
        return (low & 0xFF).to(tl.uint8)


@triton.jit
def _halves(low, x, SIGNED: tl.constexpr, BACKEND: tl.constexpr, BLOCK: tl.constexpr):
    """The codes of 4 bits in the low bytes of int32 numbers (BLOCK,), two to a byte; if SIGNED,
    with the signs of x, and 8 more."""
    first, second = tl.split(tl.reshape(low, [BLOCK // 2, 2]))
    x_first, x_second = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
    if BACKEND == "cuda":
        return ptx.packed_halves(first, second, x_first, x_second, SIGNED)
    elif SIGNED:
        first, second = first & 15, second & 15
        first = 8 + tl.where(x_first < 0.0, -first, first)
        second = 8 + tl.where(x_second < 0.0, -second, second)
        return (first | (second << 4)).to(tl.uint8)
    else:
        return ((first & 15) | ((second & 15) << 4)).to(tl.uint8)
