"""What the CPU kernels do to one tile: decode, generate noise, add it, encode.

Loops are written over slices that begin at 0 (numba then needs no wrap-around test and LLVM
vectorises them), and every integer result is cast back to 32 bits (numba widens them to 64).

A `threshold` is None at density 1, which is a type of its own: numba compiles kernels for it in
which nothing of a mask is left, and `random`, the mask's 16 bits an element, is empty.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from zoopt.kernels.noise import philox
from zoopt.kernels.runtime.convert import (
    FLOAT32,
    bfloat16_to_float,
    decode,
    encode,
    encode_stochastic,
    float_to_bfloat16_stochastic,
)
from zoopt.kernels.runtime.intrinsics import (
    add_signs,
    add_signs_below,
    add_signs_bfloat16,
    bits_of,
    f32,
    float_of,
    fma,
    i32,
    jit,
    store_signs,
    u32,
    u64,
)

#: Elements a tile: a multiple of SIGNS_PER_BLOCK.
TILE = 2048
#: Elements a word of noise, by distribution.
NORMALS_PER_WORD, SIGNS_PER_WORD = 2, 32

_M0, _M1 = u64(philox.MULTIPLIER_0), u64(philox.MULTIPLIER_1)
_W0, _W1 = u32(philox.WEYL_0), u32(philox.WEYL_1)
_HIGH, _LOW = u64(32), u64(0xFFFFFFFF)
_P1, _P2, _P3, _P4 = f32(philox.P1), f32(philox.P2), f32(philox.P3), f32(philox.P4)
_C0, _C1, _C2, _C3 = f32(philox.C0), f32(philox.C1), f32(philox.C2), f32(philox.C3)
_U_SCALE, _U_SHIFT, _Q_SHIFT = f32(philox.U_SCALE), f32(philox.U_SHIFT), f32(philox.Q_SHIFT)
_DIRECTION, _ROUNDING = philox.PURPOSE_DIRECTION, philox.PURPOSE_ROUNDING
_MASK = philox.PURPOSE_MASK


@jit
def make_blocks(out, first_block, blocks, stream, draw, purpose, k0, k1):
    """Fill out[: 4 blocks], uint32, with the words of consecutive blocks.

    A word has a lane of 64 bits, where the products are made, so that none is moved between lanes.
    What is in its high half is never read.
    """
    pairs = out.view(np.uint64)
    for b in range(blocks):
        block = u64(first_block + b)
        c0, c1 = block, u64(u64(block >> _HIGH) + u64(u32(purpose << u32(24))))
        c2, c3 = u64(u32(draw)), u64(u32(stream))
        key_0, key_1 = u32(k0), u32(k1)
        for _ in range(10):
            product_0, product_1 = u64(c0 & _LOW) * _M0, u64(c2 & _LOW) * _M1
            c0, c1, c2, c3 = (
                u64(u64(product_1 >> _HIGH) ^ c1 ^ u64(key_0)),
                product_1,
                u64(u64(product_0 >> _HIGH) ^ c3 ^ u64(key_1)),
                product_0,
            )
            key_0, key_1 = u32(key_0 + _W0), u32(key_1 + _W1)
        pairs[2 * b] = u64(c0 & _LOW) | u64(c1 << _HIGH)
        pairs[2 * b + 1] = u64(c2 & _LOW) | u64(c3 << _HIGH)


@jit
def _normals(z, half):
    """z, float32 (m,), from the halfwords, int16 (m,)."""
    for j in range(len(z)):
        x = f32(f32(half[j]) + f32(0.5))
        q = bits_of(fma(x, x, _Q_SHIFT))
        u = fma(f32(q), _U_SCALE, _U_SHIFT)
        f = float_of(i32((q & i32(0x7FFFFF)) | i32(0x3F800000)))
        c = fma(fma(fma(_C3, f, _C2), f, _C1), f, _C0)
        p = fma(fma(fma(_P4, u, _P3), u, _P2), u, _P1)
        z[j] = f32(x * fma(p, u, c))


@jit
def spread_signs(z, words):
    """z, float32 (32 n,) <- +1 and -1, the signs of words (n,)."""
    address = u64(z.ctypes.data)
    for k in range(len(words)):
        store_signs(address + u64(128 * k), words[k])


@jit
def generate(z, words, random, index, count, per_word, stream, draw, k0, k1, threshold):
    """One direction's words, normals and mask, for elements index ... index + count - 1.

    Returns how many elements of the scratch arrays precede the first of them.
    """
    per_block = 4 * per_word
    first = index // per_block
    lead = index - per_block * first
    blocks = (lead + count + per_block - 1) // per_block
    make_blocks(words, first, blocks, stream, draw, _DIRECTION, k0, k1)
    if per_word == NORMALS_PER_WORD:
        _normals(z[: 8 * blocks], words.view(np.int16)[: 8 * blocks])
    if threshold is not None:
        # From the same element on, so that both have the same lead.
        eighths = per_block // 8
        make_blocks(random, first * eighths, blocks * eighths, stream, draw, _MASK, k0, k1)
    return lead


@jit
def accumulate(acc, a, z, words, random, lead, per_word, threshold):
    """acc <- acc + a direction, float32 (m,), product and sum each rounded, where the mask is 1."""
    if per_word == NORMALS_PER_WORD:
        direction = z[lead : lead + len(acc)]
        if threshold is None:
            for j in range(len(acc)):
                acc[j] = f32(acc[j] + f32(a * direction[j]))
        else:
            halves = random.view(np.uint16)[lead : lead + len(acc)]
            for j in range(len(acc)):
                total = f32(acc[j] + f32(a * direction[j]))
                acc[j] = total if halves[j] < threshold else acc[j]
        return
    bits = u32(bits_of(a))
    address = u64(acc.ctypes.data)
    for k in range(lead // 32, (lead + len(acc) + 31) // 32):
        word, start = words[k], 32 * k - lead
        if start >= 0 and start + 32 <= len(acc):
            target = address + u64(4 * start)
            if threshold is None:
                add_signs(target, word, bits)
            else:
                add_signs_below(
                    target, word, bits, u64(random.ctypes.data) + u64(64 * k), threshold
                )
        else:
            for j in range(max(start, 0), min(start + 32, len(acc))):
                if threshold is None or random.view(np.uint16)[lead + j] < threshold:
                    sign = u32(u32(word << u32(31 + start - j)) & u32(0x80000000))
                    acc[j] = f32(acc[j] + float_of(i32(bits ^ sign)))


@jit
def signed_pass(out, theta, words, a):
    """out <- theta + a signs, both the bits of bfloat16 (32 n,), words (n,), in registers."""
    bits = u32(bits_of(a))
    source, target = u64(theta.ctypes.data), u64(out.ctypes.data)
    for k in range(len(theta) // 32):
        at = u64(64 * k)
        add_signs_bfloat16(source + at, target + at, words[k], bits)


@jit
def halfwords(words, index, count, stream, draw, purpose, k0, k1):
    """16 bits for each of elements index ... index + count - 1: uint16, a slice of the scratch."""
    first = index // 8
    lead = index - 8 * first
    make_blocks(words, first, (lead + count + 7) // 8, stream, draw, purpose, k0, k1)
    return words.view(np.uint16)[lead : lead + count]


@jit
def scale(y, a):
    """y <- a y, float32 (m,)."""
    for j in range(len(y)):
        y[j] = f32(a * y[j])


@jit
def add(y, x):
    """y <- y + x, float32 (m,)."""
    for j in range(len(y)):
        y[j] = f32(y[j] + x[j])


@jit
def add_bfloat16_stochastic(theta, addend, random, decay):
    """theta <- decay theta + addend, the bits of bfloat16 (m,), rounded by random, uint16 (m,).

    decode, scale, add and encode_stochastic in one loop, with no tile of float32 between them.
    """
    for j in range(len(theta)):
        x = f32(f32(decay * bfloat16_to_float(theta[j])) + bfloat16_to_float(addend[j]))
        theta[j] = float_to_bfloat16_stochastic(x, random[j])


@jit
def estimate(acc, ghat, z, random, a, g, threshold):
    """acc <- acc + a z, ghat <- ghat + g z, all float32 (m,), where the mask is 1."""
    for j in range(len(acc)):
        x, y = f32(acc[j] + f32(a * z[j])), f32(ghat[j] + f32(g * z[j]))
        if threshold is not None:
            x, y = (x, y) if random[j] < threshold else (acc[j], ghat[j])
        acc[j], ghat[j] = x, y


@jit
def close(acc, ghat, m, v, z, random, a, g, first, second, threshold):
    """As estimate; then m <- m + first ghat, v <- v + second (ghat ghat), ghat <- 0.

    A ghat that is 0 already can be None, and is spared the pass.
    """
    for j in range(len(acc)):
        before = f32(0.0) if ghat is None else ghat[j]
        x, y = f32(acc[j] + f32(a * z[j])), f32(before + f32(g * z[j]))
        if threshold is not None:
            x, y = (x, y) if random[j] < threshold else (acc[j], before)
        acc[j] = x
        m[j] = f32(m[j] + f32(first * y))
        v[j] = f32(v[j] + f32(second * f32(y * y)))
        if ghat is not None:
            ghat[j] = f32(0.0)


@jit
def adam(acc, m, v, step_size, eps):
    """acc <- acc + (step_size m) / (sqrt(v) + eps), float32 (m,), each operation rounded."""
    for j in range(len(acc)):
        denominator = f32(f32(np.sqrt(v[j])) + eps)
        acc[j] = f32(acc[j] + f32(f32(step_size * m[j]) / denominator))


@jit
def average(ghat, m, v, first, second):
    """m <- m + first ghat, v <- v + second (ghat ghat), ghat <- 0, all float32 (m,)."""
    for j in range(len(ghat)):
        m[j] = f32(m[j] + f32(first * ghat[j]))
        v[j] = f32(v[j] + f32(second * f32(ghat[j] * ghat[j])))
        ghat[j] = f32(0.0)


@jit
def add_sign(acc, ghat, step_size):
    """acc <- acc + step_size sign(ghat), float32 (m,)."""
    for j in range(len(acc)):
        sign = f32(1.0) if ghat[j] > f32(0.0) else f32(-1.0) if ghat[j] < f32(0.0) else f32(0.0)
        acc[j] = f32(acc[j] + f32(step_size * sign))


@jit
def load(tile, theta, out, kind, decay):
    """decay theta as float32 (m,): in the scratch tile, or in out itself if that is float32."""
    if kind == FLOAT32:
        acc = out.view(np.float32)
        if theta.ctypes.data != out.ctypes.data:
            out[:] = theta
    else:
        acc = tile[: len(theta)]
        decode(acc, theta, kind)
    if decay != f32(1.0):
        scale(acc, decay)
    return acc


@jit
def store(out, acc, words, index, kind, stream, rounding, k0, k1):
    """out, the bits of theta (m,) <- acc, float32 (m,), rounded; rounding < 0 means to nearest."""
    if kind == FLOAT32:
        return
    if rounding < 0:
        encode(out, acc, kind)
    else:
        random = halfwords(words, index, len(acc), stream, rounding, _ROUNDING, k0, k1)
        encode_stochastic(out, acc, random, kind)


@jit
def scratch(threshold):
    """tile, z, words and random, with room for the blocks that a tile only grazes."""
    tile, z = np.empty(TILE, np.float32), np.empty(TILE + 128, np.float32)
    words = np.empty(TILE // 2 + 4, np.uint32)
    # A mask covers whole blocks of signs, at most one more than fill the tile.
    random = np.empty(0 if threshold is None else (TILE + 128) // 2, np.uint32)
    return tile, z, words, random
