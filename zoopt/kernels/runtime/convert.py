"""How the CPU kernels read and write theta: the bits of its dtype, to and from float32.

Loops are written as in `cpu_tile`.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from zoopt.kernels.runtime.intrinsics import bits_of, f32, float_of, i32, jit, u32

#: How theta is stored.
FLOAT32, BFLOAT16, FLOAT16 = range(3)


@jit
def bfloat16_to_float(b):
    """bfloat16 bits -> float32."""
    return float_of(i32(i32(b) << i32(16)))


@jit
def float_to_bfloat16_stochastic(x, bits):
    """float32 -> bfloat16 bits, uint32, rounded by 16 random bits; NaN and infinity are
    truncated."""
    pattern = u32(bits_of(x))
    finite = u32(pattern & u32(0x7F800000)) != u32(0x7F800000)
    return u32(u32(pattern + (u32(bits) if finite else u32(0))) >> u32(16))


@jit
def _half_to_float(h):
    """float16 bits -> float32: scaling by 2^112 moves the exponent and normalises subnormals."""
    magnitude = float_of(i32((h & i32(0x7FFF)) << i32(13)))
    scaled = bits_of(f32(magnitude * f32(2.0**112)))
    if (h & i32(0x7C00)) == i32(0x7C00):
        scaled = i32(scaled | i32(0x7F800000))
    return float_of(i32(scaled | i32((h & i32(0x8000)) << i32(16))))


@jit
def _float_to_half(x):
    """float32 -> float16 bits, to nearest, ties to even."""
    pattern = bits_of(x)
    sign = i32((pattern >> i32(16)) & i32(0x8000))
    magnitude = i32(pattern & i32(0x7FFFFFFF))
    if magnitude > i32(0x7F800000):
        result = i32(0x7E00)
    elif magnitude >= i32(0x477FF000):
        result = i32(0x7C00)
    elif magnitude < i32(0x38800000):
        # Adding 1/2 leaves the float16 subnormal, rounded, in the low bits.
        result = i32(bits_of(f32(float_of(magnitude) + f32(0.5))) - i32(0x3F000000))
    else:
        odd = i32((magnitude >> i32(13)) & i32(1))
        result = i32(i32(magnitude - i32(0x38000000) + i32(0xFFF) + odd) >> i32(13))
    return i32(result | sign)


@jit
def _float_to_half_stochastic(x, bits):
    """float32 -> float16 bits, by the formula of reference.round_stochastic."""
    pattern = bits_of(x)
    magnitude = float_of(i32(pattern & i32(0x7FFFFFFF)))
    exponent = max(i32((pattern >> i32(23)) & i32(0xFF)), i32(113))
    ulp = float_of(i32((exponent - i32(10)) << i32(23)))
    inverse = float_of(i32((i32(264) - exponent) << i32(23)))
    uniform = f32(f32(i32(bits & i32(0x1FFF))) * f32(2.0**-13))
    rounded = f32(f32(np.floor(f32(f32(magnitude * inverse) + uniform))) * ulp)
    if not magnitude < f32(65536.0):
        rounded = magnitude
    return i32(_float_to_half(rounded) | i32((pattern >> i32(16)) & i32(0x8000)))


@jit
def decode(tile, source, kind):
    """tile, float32 (m,) <- source, the bits of theta (m,)."""
    if kind == FLOAT16:
        for j in range(len(tile)):
            tile[j] = _half_to_float(i32(source[j]))
    else:
        for j in range(len(tile)):
            tile[j] = bfloat16_to_float(source[j])


@jit
def encode(target, tile, kind):
    """target, the bits of theta (m,) <- tile, float32 (m,), to nearest."""
    bits = tile.view(np.int32)
    if kind == FLOAT16:
        for j in range(len(tile)):
            target[j] = _float_to_half(tile[j])
    else:
        for j in range(len(tile)):
            b = u32(bits[j])
            odd = u32((b >> u32(16)) & u32(1))
            rounded = u32(u32(b + u32(0x7FFF) + odd) >> u32(16))
            target[j] = rounded if tile[j] == tile[j] else u32(0x7FC0)


@jit
def encode_stochastic(target, tile, random, kind):
    """As encode, rounding by the random bits, uint16 (m,)."""
    if kind == FLOAT16:
        for j in range(len(tile)):
            target[j] = _float_to_half_stochastic(tile[j], i32(random[j]))
    else:
        for j in range(len(tile)):
            target[j] = float_to_bfloat16_stochastic(tile[j], random[j])


@jit
def rounded(tile, kind):
    """tile, float32 (m,) <- the nearest values that 16 bits hold."""
    if kind == FLOAT16:
        for j in range(len(tile)):
            tile[j] = _half_to_float(_float_to_half(tile[j]))
    else:
        bits = tile.view(np.int32)
        for j in range(len(tile)):
            b = u32(bits[j])
            odd = u32((b >> u32(16)) & u32(1))
            nearest = u32(u32(b + u32(0x7FFF) + odd) & u32(0xFFFF0000))
            bits[j] = i32(nearest if tile[j] == tile[j] else u32(0x7FC00000))


@jit
def rounded_stochastic(tile, random, kind):
    """As rounded, by the random bits, uint16 (m,)."""
    if kind == FLOAT16:
        for j in range(len(tile)):
            tile[j] = _half_to_float(_float_to_half_stochastic(tile[j], i32(random[j])))
    else:
        bits = tile.view(np.int32)
        for j in range(len(tile)):
            bits[j] = i32(u32(float_to_bfloat16_stochastic(tile[j], random[j]) << u32(16)))


@jit
def truncate(target, tile):
    """target, the bits of bfloat16 (m,) <- tile, float32 (m,), whose low halves are dropped."""
    bits = tile.view(np.int32)
    for j in range(len(tile)):
        target[j] = np.uint16(u32(bits[j]) >> u32(16))
