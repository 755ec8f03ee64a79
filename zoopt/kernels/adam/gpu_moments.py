"""How the GPU kernels read and write moments: a block of elements of any format, in registers.

FORMAT is a name of `moments.Format`. A program's block holds whole blocks of codes.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.adam import moments
from zoopt.kernels.noise.gpu_tile import nearest, stochastic

_BLOCK8, _BLOCK4 = tl.constexpr(moments.BLOCK["int8"]), tl.constexpr(moments.BLOCK["int4"])
_SIGNED8 = tl.constexpr(moments.SIGNED_LEVELS["int8"])
_SIGNED4 = tl.constexpr(moments.SIGNED_LEVELS["int4"])
_UNSIGNED8 = tl.constexpr(moments.UNSIGNED_LEVELS["int8"])
_UNSIGNED4 = tl.constexpr(moments.UNSIGNED_LEVELS["int4"])
_MIN_SCALE = tl.constexpr(moments.MIN_SCALE)


@triton.jit
def _spread(numbers, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Each element's number, of one for each SIZE of them: (BLOCK,)."""
    wide = tl.broadcast_to(tl.expand_dims(numbers, 1), [BLOCK // SIZE, SIZE])
    return tl.reshape(wide, [BLOCK])


@triton.jit
def read_moment(
    codes,
    scale,
    start,
    numel,
    pairs,
    FORMAT: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements start ... start + BLOCK - 1 of a moment of numel: float32, (BLOCK,).

    pairs is numel / 2, rounded up.
    """
    i = start + tl.arange(0, BLOCK)
    if FORMAT == "float32" or FORMAT == "bfloat16":
        value = tl.load(codes + i, mask=i < numel, other=0.0).to(tl.float32)
    else:
        SIZE: tl.constexpr = _BLOCK8 if FORMAT == "int8" else _BLOCK4
        TOP8: tl.constexpr = _SIGNED8 if SIGNED else _UNSIGNED8
        TOP4: tl.constexpr = _SIGNED4 if SIGNED else _UNSIGNED4
        TOP: tl.constexpr = TOP8 if FORMAT == "int8" else TOP4
        if FORMAT == "int8":
            level = tl.load(codes + i, mask=i < numel, other=0).to(tl.float32)
        else:
            pair = start // 2 + tl.arange(0, BLOCK // 2)
            packed = tl.load(codes + pair, mask=pair < pairs, other=0)
            level = tl.reshape(tl.join(packed & 15, packed >> 4), [BLOCK]).to(tl.float32)
            if SIGNED:
                level = level - 8.0
        if not SIGNED:
            level = level + 1.0
        row = start // SIZE + tl.arange(0, BLOCK // SIZE)
        spread = _spread(tl.load(scale + row, mask=row * SIZE < numel, other=0.0), SIZE, BLOCK)
        value = level * tl.abs(level) * (1.0 / (TOP * TOP)) * spread
    return value


@triton.jit
def write_moment(
    x,
    codes,
    scale,
    start,
    numel,
    pairs,
    bits,
    FORMAT: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, float32 (BLOCK,), as elements start ... start + BLOCK - 1 of a moment of numel.

    bits is uint32 (BLOCK,) below 65536 where STOCHASTIC, and nothing that is read elsewhere.
    """
    i = start + tl.arange(0, BLOCK)
    inside = i < numel
    if FORMAT == "float32":
        tl.store(codes + i, x, mask=inside)
    elif FORMAT == "bfloat16" and STOCHASTIC:
        upper = (bits << 8) & 0xFF00 if SIGNED else bits & 0xFF00
        tl.store(codes + i, stochastic(x, upper, tl.bfloat16), mask=inside)
    elif FORMAT == "bfloat16":
        tl.store(codes + i, nearest(x, tl.bfloat16, BACKEND), mask=inside)
    else:
        SIZE: tl.constexpr = _BLOCK8 if FORMAT == "int8" else _BLOCK4
        TOP8: tl.constexpr = _SIGNED8 if SIGNED else _UNSIGNED8
        TOP4: tl.constexpr = _SIGNED4 if SIGNED else _UNSIGNED4
        TOP: tl.constexpr = TOP8 if FORMAT == "int8" else TOP4
        pattern = tl.where(inside, x, 0.0).to(tl.int32, bitcast=True)
        # In patterns NaNs are larger than all else, and are so on every backend.
        magnitude = pattern & 0x7FFFFFFF
        largest = tl.max(tl.reshape(magnitude, [BLOCK // SIZE, SIZE]), axis=1)
        largest = largest.to(tl.float32, bitcast=True)
        tiny = (largest > 0.0) & (largest < _MIN_SCALE)
        largest = tl.where(tiny, _MIN_SCALE, largest)
        row = start // SIZE + tl.arange(0, BLOCK // SIZE)
        tl.store(scale + row, largest, mask=row * SIZE < numel)
        inverse = tl.div_rn(tl.full([BLOCK // SIZE], TOP * TOP, tl.float32), largest)
        squared = magnitude.to(tl.float32, bitcast=True) * _spread(inverse, SIZE, BLOCK)
        squared = tl.where(squared == squared, squared, 0.0)
        # Approximate roots do: see moments.encode.
        level = tl.minimum(tl.floor(tl.sqrt(squared)), TOP - 1.0)
        odd = 2.0 * level + 1.0
        if STOCHASTIC:
            low = bits & 0xFF if SIGNED else bits >> 8
            up = squared - level * level > (low.to(tl.float32) + 0.5) * 0.00390625 * odd
        else:
            up = squared - level * level > 0.5 * odd
        level = tl.where(up, level + 1.0, level)
        code = tl.where(pattern < 0, -level, level) if SIGNED else tl.maximum(level, 1.0) - 1.0
        dtype: tl.constexpr = codes.dtype.element_ty
        if FORMAT == "int8":
            tl.store(codes + i, code.to(tl.int32).to(dtype), mask=inside)
        else:
            if SIGNED:
                code = code + 8.0
            whole = tl.where(inside, code, 0.0).to(tl.int32)
            first, second = tl.split(tl.reshape(whole, [BLOCK // 2, 2]))
            pair = start // 2 + tl.arange(0, BLOCK // 2)
            tl.store(codes + pair, (first | (second << 4)).to(dtype), mask=pair < pairs)
