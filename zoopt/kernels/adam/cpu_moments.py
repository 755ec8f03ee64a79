"""How the CPU kernels read and write moments: between any format and float32, a tile at a time.

Codes are bytes. A byte b stands for the level (b ^ flip) + shift, so that one loop decodes every
format: flip and shift are 128 and -128 for int8 (two's complement), 0 and -8 for signed int4, and 0
and 1 for unsigned codes. Loops are written as in `cpu_tile`.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from zoopt.kernels.adam import moments
from zoopt.kernels.runtime.convert import BFLOAT16, decode, encode, encode_stochastic
from zoopt.kernels.runtime.intrinsics import bits_of, f32, float_of, i32, jit, u16, u64

#: How moments are stored.
FLOAT, HALF, INT8, INT4 = range(4)
FORMATS = {"float32": FLOAT, "bfloat16": HALF, "int8": INT8, "int4": INT4}

_BLOCK8, _BLOCK4 = moments.BLOCK["int8"], moments.BLOCK["int4"]
_SIGNED8, _SIGNED4 = moments.SIGNED_LEVELS["int8"], moments.SIGNED_LEVELS["int4"]
_UNSIGNED8, _UNSIGNED4 = moments.UNSIGNED_LEVELS["int8"], moments.UNSIGNED_LEVELS["int4"]
_MIN_SCALE = f32(moments.MIN_SCALE)


@jit
def _levels(form, signed):
    """Q, and the elements of a block."""
    if form == INT8:
        return (_SIGNED8 if signed else _UNSIGNED8), _BLOCK8
    return (_SIGNED4 if signed else _UNSIGNED4), _BLOCK4


@jit
def _decode_block(values, codes, start, stop, scale, flip, shift, unit):
    """values[start:stop], float32 <- level |level| unit scale of its codes, uint8."""
    for j in range(u64(start), u64(stop)):
        level = f32(f32(i32(codes[j] ^ flip)) + shift)
        values[j] = f32(f32(f32(level * abs(level)) * unit) * scale)


@jit
def read_moment(tile, unpacked, codes, scale, form, signed, start, count):
    """A moment's elements start ... start + count - 1, float32 (count,): in the scratch tile, or in
    place if the moment is float32. `start` is the first element of a block."""
    if form == FLOAT:
        return codes.view(np.float32)[start : start + count]
    values = tile[:count]
    if form == HALF:
        decode(values, codes.view(np.uint16)[start : start + count], BFLOAT16)
        return values
    if form == INT8:
        stored = codes[start : start + count]
    else:
        packed = codes[start // 2 : (start + count + 1) // 2]
        pairs = unpacked.view(np.uint16)
        for j in range(len(packed)):
            pair = u16(packed[j])
            pairs[j] = u16(u16(pair & u16(15)) | u16(u16(pair >> u16(4)) << u16(8)))
        stored = unpacked[:count]
    top, block = _levels(form, signed)
    unit = f32(f32(1.0) / f32(top * top))
    flip = np.uint8(128 if signed and form == INT8 else 0)
    shift = f32((-128.0 if form == INT8 else -8.0) if signed else 1.0)
    for i in range(0, count, block):
        stop = min(i + block, count)
        _decode_block(values, stored, i, stop, scale[(start + i) // block], flip, shift, unit)
    return values


@jit
def _encode_block(codes, values, random, start, stop, inverse, top, signed, bias, stochastic):
    """codes[start:stop], uint8 <- values, float32, by the formula of moments.encode.

    `random` is uint16, and a signed moment's bits are its low eight.
    """
    half = u16(0 if signed else 8)
    for j in range(u64(start), u64(stop)):
        pattern = bits_of(values[j])
        squared = f32(float_of(i32(pattern & i32(0x7FFFFFFF))) * inverse)
        squared = squared if squared == squared else f32(0.0)
        k = i32(min(i32(f32(np.sqrt(squared))), i32(top - 1)))
        level = f32(k)
        uniform = f32(0.5)
        if stochastic:
            bits = i32(u16(random[j] >> half) & u16(0xFF))
            uniform = f32(f32(f32(bits) + f32(0.5)) * f32(2.0**-8))
        odd = f32(f32(f32(2.0) * level) + f32(1.0))
        if f32(squared - f32(level * level)) > f32(uniform * odd):
            k = i32(k + i32(1))
        if signed:
            codes[j] = i32((i32(-k) if pattern < i32(0) else k) + bias)
        else:
            codes[j] = i32(max(k, i32(1)) - i32(1))


@jit
def _largest(values, start, stop):
    """The largest magnitude of values[start:stop], by bit patterns, in which NaNs are the
    largest."""
    largest = i32(0)
    for j in range(u64(start), u64(stop)):
        largest = max(largest, i32(bits_of(values[j]) & i32(0x7FFFFFFF)))
    return float_of(largest)


@jit
def write_moment(values, unpacked, shifted, codes, scale, form, signed, start, random, stochastic):
    """Store values, float32 (m,), as a moment's elements start ... start + m - 1.

    `start` is the first element of a block. `random` is uint16 (m,) if `stochastic`; unpacked,
    uint8, and shifted, uint16, are scratch.
    """
    count = len(values)
    if form == FLOAT:
        return
    if form == HALF:
        target = codes.view(np.uint16)[start : start + count]
        if not stochastic:
            encode(target, values, BFLOAT16)
            return
        bits = shifted[:count]
        for j in range(count):
            bits[j] = u16(random[j] << u16(8)) if signed else u16(random[j] & u16(0xFF00))
        encode_stochastic(target, values, bits, BFLOAT16)
        return
    top, block = _levels(form, signed)
    bias = i32(8 if signed and form == INT4 else 0)
    stored = codes[start : start + count] if form == INT8 else unpacked[:count]
    for i in range(0, count, block):
        stop = min(i + block, count)
        largest = _largest(values, i, stop)
        if f32(0.0) < largest < _MIN_SCALE:
            largest = _MIN_SCALE
        scale[(start + i) // block] = largest
        inverse = f32(f32(top * top) / largest)
        _encode_block(stored, values, random, i, stop, inverse, i32(top), signed, bias, stochastic)
    if form == INT4:
        if count % 2:
            unpacked[count] = 0
        packed = codes[start // 2 : (start + count + 1) // 2]
        pairs = unpacked.view(np.uint16)
        for j in range(len(packed)):
            packed[j] = u16(u16(pairs[j] & u16(15)) | u16(pairs[j] >> u16(4)))
