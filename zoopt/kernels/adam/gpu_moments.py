"""How the GPU kernels read and write moments: a block of elements of any format, in registers.

FORMAT is a name of `moments.Format`. A program's block holds whole blocks of codes.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam import moments
from zoopt.kernels.noise.gpu_blocks import _store
from zoopt.kernels.noise.gpu_tile import nearest, stochastic

_BLOCK8, _BLOCK4 = tl.constexpr(moments.BLOCK["int8"]), tl.constexpr(moments.BLOCK["int4"])
_SIGNED8 = tl.constexpr(moments.SIGNED_LEVELS["int8"])
_SIGNED4 = tl.constexpr(moments.SIGNED_LEVELS["int4"])
_UNSIGNED8 = tl.constexpr(moments.UNSIGNED_LEVELS["int8"])
_UNSIGNED4 = tl.constexpr(moments.UNSIGNED_LEVELS["int4"])
_MIN_SCALE = tl.constexpr(moments.MIN_SCALE)
#: A float32 whose spacing is 1, on both sides.
_INTEGER = tl.constexpr(1.5 * 2.0**23)
_TINY = tl.constexpr(2.0**-100)


@triton.jit
def _spread(numbers, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Repeat each number for SIZE elements: (BLOCK // SIZE,) -> (BLOCK,)."""
    wide = tl.broadcast_to(tl.expand_dims(numbers, 1), [BLOCK // SIZE, SIZE])
    return tl.reshape(wide, [BLOCK])


@triton.jit
def _shifted(word, BYTE: tl.constexpr):
    """2^23 + a byte of uint32 words, as float32: the byte becomes the low bits of the mantissa."""
    return ((word >> (8 * BYTE)) & 0xFF | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _level(squared, BACKEND: tl.constexpr):
    """floor(sqrt(squared)) as a float32, for squared >= 2^-100.

    Where the root is very close to an integer, the result may be that integer or the one below:
    both lead to the same code. So an approximate root suffices, and the floor is taken by rounding
    root - 1/2 to nearest; adding 1.5 2^23 does that without a conversion.
    """
    if BACKEND == "cuda":
        # One instruction; the general form would also handle denormal numbers.
        inverse = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [squared], tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = tl.rsqrt(squared)
    return (tl.fma(squared, inverse, -0.5) + _INTEGER) - _INTEGER


@triton.jit
def _codes(codes, start, left, whole, HALVES: tl.constexpr, BLOCK: tl.constexpr):
    """Codes as they are stored from element `start` on; HALVES says that they are 4 bits each."""
    if HALVES:
        i = tl.arange(0, BLOCK // 2)
        if whole:
            packed = tl.load(codes + start // 2 + i)
        else:
            packed = tl.load(codes + start // 2 + i, mask=2 * i < left, other=0)
        return tl.reshape(tl.join(packed & 15, packed >> 4), [BLOCK])
    else:
        i = tl.arange(0, BLOCK)
        if whole:
            code = tl.load(codes + start + i)
        else:
            code = tl.load(codes + start + i, mask=i < left, other=0)
        return code


@triton.jit
def read_moment(
    codes,
    scale,
    start,
    left,
    whole,
    FORMAT: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements start ... start + BLOCK - 1 of a moment, the first `left` of them inside: float32,
    (BLOCK,)."""
    if FORMAT == "float32" or FORMAT == "bfloat16":
        value = _codes(codes, start, left, whole, False, BLOCK).to(tl.float32)
    else:
        SIZE: tl.constexpr = _BLOCK8 if FORMAT == "int8" else _BLOCK4
        TOP8: tl.constexpr = _SIGNED8 if SIGNED else _UNSIGNED8
        TOP4: tl.constexpr = _SIGNED4 if SIGNED else _UNSIGNED4
        TOP: tl.constexpr = TOP8 if FORMAT == "int8" else TOP4
        code = _codes(codes, start, left, whole, FORMAT == "int4", BLOCK)
        if FORMAT == "int8" and SIGNED:
            level = code.to(tl.float32)
        else:
            level = _shifted(code.to(tl.uint32), 0) - (8388616.0 if SIGNED else 8388607.0)
        row = tl.arange(0, BLOCK // SIZE)
        scales = tl.load(scale + start // SIZE + row, mask=row * SIZE < left, other=0.0)
        value = level * tl.abs(level) * (1.0 / (TOP * TOP)) * _spread(scales, SIZE, BLOCK)
    return value


@triton.jit
def write_moment(
    x,
    codes,
    scale,
    start,
    left,
    whole,
    bits,
    FORMAT: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store x, float32 (BLOCK,), as elements start ... start + BLOCK - 1 of a moment; the first
    `left` of them are inside.

    bits is uint32 (BLOCK,) below 65536 if STOCHASTIC, and not read otherwise.
    """
    inside = tl.arange(0, BLOCK) < left
    if FORMAT == "float32":
        _store(codes + start, x, inside, whole, BLOCK)
    elif FORMAT == "bfloat16":
        if STOCHASTIC:
            upper = (bits << 8) & 0xFF00 if SIGNED else bits & 0xFF00
            rounded = stochastic(x, upper, tl.bfloat16)
        else:
            rounded = nearest(x, tl.bfloat16, BACKEND)
        _store(codes + start, rounded, inside, whole, BLOCK)
    else:
        SIZE: tl.constexpr = _BLOCK8 if FORMAT == "int8" else _BLOCK4
        TOP8: tl.constexpr = _SIGNED8 if SIGNED else _UNSIGNED8
        TOP4: tl.constexpr = _SIGNED4 if SIGNED else _UNSIGNED4
        TOP: tl.constexpr = TOP8 if FORMAT == "int8" else TOP4
        if not whole:
            x = tl.where(inside, x, 0.0)
        pattern = x.to(tl.int32, bitcast=True)
        # By bit patterns, in which NaNs are the largest on every backend.
        largest = tl.max(tl.reshape(pattern & 0x7FFFFFFF, [BLOCK // SIZE, SIZE]), axis=1)
        largest = largest.to(tl.float32, bitcast=True)
        tiny = (largest > 0.0) & (largest < _MIN_SCALE)
        largest = tl.where(tiny, _MIN_SCALE, largest)
        row = tl.arange(0, BLOCK // SIZE)
        tl.store(scale + start // SIZE + row, largest, mask=row * SIZE < left)
        inverse = tl.div_rn(tl.full([BLOCK // SIZE], TOP * TOP, tl.float32), largest)
        # Replaces NaN (0 times infinity) and values too small for `_level`.
        squared = tl.abs(x) * _spread(inverse, SIZE, BLOCK)
        squared = tl.where(squared > _TINY, squared, _TINY)
        level = _level(squared, BACKEND)
        # All products are exact: the square of a level, and nine bits times nine.
        rest = tl.fma(level * -1.0, level, squared)
        if STOCHASTIC:
            uniform = _shifted(bits, 0 if SIGNED else 1) - 8388607.5
            up = rest > uniform * tl.fma(level, 0.0078125, 0.00390625)
        else:
            up = rest > level + 0.5
        level = tl.where(up, level + 1.0, level)
        if SIGNED:
            sign = pattern & -2147483648
            code = (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            code += _INTEGER if FORMAT == "int8" else _INTEGER + 8.0
        else:
            code = tl.maximum(level, 1.0) + (_INTEGER - 1.0)
        # An integer in the mantissa, as its low bits.
        low = code.to(tl.int32, bitcast=True)
        dtype: tl.constexpr = codes.dtype.element_ty
        if FORMAT == "int8":
            _store(codes + start, low.to(dtype), inside, whole, BLOCK)
        else:
            # With an odd number of elements, the upper half of the last byte is 0.
            if not whole:
                low = tl.where(inside, low, 0)
            pairs = tl.reshape(low & 15, [BLOCK // 2, 2])
            first, second = tl.split(pairs)
            i = tl.arange(0, BLOCK // 2)
            packed = (first | (second << 4)).to(dtype)
            _store(codes + start // 2, packed, 2 * i < left, whole, BLOCK // 2)
