"""The noise of many directions on the same elements: compiled, a group of elements at a time.

A group is 32 blocks of Philox, 256 elements. What a direction does to them is independent of their
order, so they lie in the order in which the words come: see `grouped`. In that order a word's two
halves are in vectors of their own, and nothing is moved between lanes.

Of ten rounds, the first two multiply only numbers that depend on the block or on the draw. So the
products of blocks are made once for all draws, see `tables`, and eight rounds are left.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from zoopt.kernels.noise import philox
from zoopt.kernels.runtime.intrinsics import jit, u32, u64
from zoopt.kernels.runtime.vectors import FLOAT, INT32, INT64, Vector, words_together

#: Blocks and elements of a group, and elements of a quarter.
BLOCKS, GROUP, QUARTER = 32, 256, 64
#: Numbers that name a draw: three of its first two rounds, and the keys of the others.
KEYS = 3 + 2 * (philox.ROUNDS - 2)

_M0, _M1 = u64(philox.MULTIPLIER_0), u64(philox.MULTIPLIER_1)
_W0, _W1 = u32(philox.WEYL_0), u32(philox.WEYL_1)
_HIGH, _LOW = u64(32), u64(0xFFFFFFFF)
_HIGH_HALF = 0xFFFF0000


@jit
def grouped(out, values):
    """out <- values, float32 (256 n,), in the order of groups.

    Halfword 2 w + h of block b goes to quarter h + 2 (w div 2), lane 2 b + w mod 2.
    """
    for start in range(0, len(values), GROUP):
        own, target = values[start : start + GROUP], out[start : start + GROUP]
        for b in range(BLOCKS):
            for e in range(8):
                target[QUARTER * (e % 2 + 2 * (e // 4)) + 2 * b + e // 2 % 2] = own[8 * b + e]


@jit
def ungrouped(out, values):
    """The inverse of `grouped`."""
    for start in range(0, len(values), GROUP):
        own, target = values[start : start + GROUP], out[start : start + GROUP]
        for b in range(BLOCKS):
            for e in range(8):
                target[8 * b + e] = own[QUARTER * (e % 2 + 2 * (e // 4)) + 2 * b + e // 2 % 2]


@jit
def tables(low, product, first_block, stream, k0, k1):
    """What the first two rounds make of blocks alone, both uint64 (blocks,)."""
    for b in range(len(low)):
        low[b] = u64(u64(first_block + b) & _LOW) * _M0
        c2 = u64(u64(low[b] >> _HIGH) ^ u64(u32(stream) ^ u32(k1)))
        product[b] = c2 * _M1


@jit
def set_seed(keys, k0, k1):
    """keys, uint64 (KEYS,): the keys of rounds 3 ... 10."""
    key_0, key_1 = u32(k0), u32(k1)
    for r in range(philox.ROUNDS):
        if r >= 2:
            keys[2 * r - 1], keys[2 * r] = key_0, key_1
        key_0, key_1 = u32(key_0 + _W0), u32(key_1 + _W1)


@jit
def set_draw(keys, first_block, draw, purpose, k0, k1):
    """keys, uint64 (KEYS,): what the first two rounds make of the draw alone."""
    product_1 = u64(u64(u32(draw)) * _M1)
    c1 = u32(u32(u64(first_block) >> _HIGH) + u32(purpose << u32(24)))
    c0 = u32(u32(u64(product_1 >> _HIGH)) ^ c1 ^ u32(k0))
    product_0 = u64(u64(c0) * _M0)
    keys[0] = u64(u32(u32(product_1) ^ u32(u32(k0) + _W0)))
    keys[1] = u64(u32(u32(u64(product_0 >> _HIGH)) ^ u32(u32(k1) + _W1)))
    keys[2] = u64(u32(product_0))


@intrinsic
def words(typing_context, out, low, product, keys):
    """Store a group's words at the address out: 32 pairs c0, c1, then 32 pairs c2, c3."""

    def generate(context, builder, signature, args):
        out, low, product, keys = args
        count = words_together() // 2
        for start in range(0, BLOCKS, count):
            c0, c1, c2, c3 = _rounds(builder, low, product, keys, start, count)
            for pair, place in (((c0, c1), 0), ((c2, c3), 8 * BLOCKS)):
                joined = (pair[0] & 0xFFFFFFFF) | (pair[1] << 32)
                joined.store(out, place + 8 * start)
        return context.get_dummy_value()

    return numba.void(*[numba.uint64] * 4), generate


def _rounds(builder, low, product, keys, start, count):
    """LLVM: rounds 3 ... 10 of `count` blocks. Only the low halves of results are words."""

    def key(number):
        return Vector.loaded(builder, INT64, count, keys, 8 * number)

    own = Vector.load(builder, INT64, count, product, 8 * start)
    c0, c1 = (own >> 32) ^ key(0), own
    c2, c3 = Vector.load(builder, INT64, count, low, 8 * start) ^ key(1), key(2)
    for r in range(2, philox.ROUNDS):
        product_0 = (c0 & 0xFFFFFFFF) * philox.MULTIPLIER_0
        product_1 = (c2 & 0xFFFFFFFF) * philox.MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ key(2 * r - 1),
            product_1,
            (product_0 >> 32) ^ c3 ^ key(2 * r),
            product_0,
        )
    return c0, c1, c2, c3


def _normals(halves):
    """LLVM: float32 of the signed integers in the high halves of int32; see philox."""
    x = halves.floats().fma(2.0**-16, 0.5)  # exact: 17 bits
    q = x.fma(x, philox.Q_SHIFT).as_int32()
    u = q.floats().fma(philox.U_SCALE, philox.U_SHIFT)
    f = ((q & 0x7FFFFF) | 0x3F800000).as_floats()
    three, four = Vector(f.builder, f._same(philox.C3)), Vector(f.builder, f._same(philox.P4))
    c = three.fma(f, philox.C2).fma(f, philox.C1).fma(f, philox.C0)
    p = four.fma(u, philox.P3).fma(u, philox.P2).fma(u, philox.P1)
    return x * p.fma(u, c)


def _parts(builder, addresses):
    """LLVM: the halves of a group's words, as many as are worked on together.

    Args:
        addresses: of words; halves of the same elements of each are in the high half of int32.

    Returns:
        Pairs: where these elements are in the group, in bytes of float32, and the halves.
    """
    count = words_together()
    for half in range(2):
        for start in range(0, 2 * GROUP // 4, count):
            pair, lane = divmod(start, QUARTER)
            pairs = [Vector.load(builder, INT32, count, own, 4 * start) for own in addresses]
            halves = [own & _HIGH_HALF if half else own << 16 for own in pairs]
            yield 4 * (QUARTER * (half + 2 * pair) + lane), halves


@intrinsic
def normals(typing_context, out, words):
    """Store the normals of a group's words as float32 at the address out."""

    def generate(context, builder, signature, args):
        for place, [halves] in _parts(builder, args[1:]):
            _normals(halves).store(args[0], place)
        return context.get_dummy_value()

    return numba.void(numba.uint64, numba.uint64), generate


def _along(decayed):
    """An intrinsic: writes along one direction on a group; see `along`."""

    @intrinsic
    def along(typing_context, theta, words, writes, decays, numbers):
        def generate(context, builder, signature, args):
            theta, words, writes, decays, numbers = args
            count = words_together()
            for place, [halves] in _parts(builder, [words]):
                z = _normals(halves)
                total = cgutils.alloca_once(builder, ir.VectorType(FLOAT, count))
                builder.store(Vector.load(builder, FLOAT, count, theta, place).value, total)
                with cgutils.for_range(builder, writes) as loop:
                    x, at = Vector(builder, builder.load(total)), _place(builder, loop.index, 4)
                    if decayed:
                        x = x * Vector.loaded(builder, FLOAT, count, builder.add(decays, at))
                    x = x + z * Vector.loaded(builder, FLOAT, count, builder.add(numbers, at))
                    builder.store(x.value, total)
                Vector(builder, builder.load(total)).store(theta, place)
            return context.get_dummy_value()

        u, i = numba.uint64, numba.int64
        return numba.void(u, u, i, u, u), generate

    return along


def _place(builder, index, size):
    """LLVM: where the number of that index is in a row of numbers of so many bytes."""
    return builder.mul(index, INT64(size))


_along_plain, _along_decayed = _along(False), _along(True)


@jit
def along(theta, pairs, writes, decays, numbers):
    """`writes` times theta <- decay theta + number z, float32 (256 n,), each operation rounded.

    Args:
        pairs: the direction's words, uint32 (128 n,).
        decays, numbers: float32 (writes,).
    """
    start, own = u64(theta.ctypes.data), u64(pairs.ctypes.data)
    d, a = u64(decays.ctypes.data), u64(numbers.ctypes.data)
    decayed = False
    for w in range(writes):
        decayed = decayed or decays[w] != np.float32(1.0)
    for g in range(len(theta) // GROUP):
        here, halves = u64(start + u64(4 * GROUP * g)), u64(own + u64(2 * GROUP * g))
        if decayed:
            _along_decayed(here, halves, writes, d, a)
        else:
            _along_plain(here, halves, writes, d, a)


@intrinsic
def _once_rounded(typing_context, theta, words, random, decay, number):
    """theta <- round(decay theta + number z), all bfloat16 as float32, rounded stochastically."""

    def generate(context, builder, signature, args):
        theta, words, random, decay, number = args
        count = words_together()
        decay, number = (Vector.filled(builder, own, count) for own in (decay, number))
        for place, (halves, bits) in _parts(builder, [words, random]):
            x = Vector.load(builder, FLOAT, count, theta, place) * decay
            pattern = (x + _normals(halves) * number).as_int32()
            finite = (pattern & 0x7F800000).differs(0x7F800000)
            rounded = pattern + (bits >> 16).where(finite, 0)
            (rounded & _HIGH_HALF).store(theta, place)
        return context.get_dummy_value()

    f32 = numba.float32
    return numba.void(numba.uint64, numba.uint64, numba.uint64, f32, f32), generate


@jit
def along_rounded(theta, pairs, random, decay, number):
    """theta <- round(decay theta + number z), bfloat16 held as float32 (256 n,).

    Args:
        pairs, random: the words of the direction, and of the rounding, uint32 (128 n,).
    """
    start = u64(theta.ctypes.data)
    own, bits = u64(pairs.ctypes.data), u64(random.ctypes.data)
    for g in range(len(theta) // GROUP):
        at = u64(2 * GROUP * g)
        _once_rounded(u64(start + u64(2 * at)), u64(own + at), u64(bits + at), decay, number)


@intrinsic
def _add_terms(typing_context, theta, z, stride, places, numbers, first, last):
    """Add terms first ... last - 1 to two quarters of a group; see `add_terms`."""

    def generate(context, builder, signature, args):
        theta, z, stride, places, numbers, first, last = args
        count = words_together()
        # Twice the usual number of elements together: a term's address and number serve them all.
        for half in range(0, 2 * QUARTER, 2 * count):
            starts = (half, half + count)
            totals = [cgutils.alloca_once(builder, ir.VectorType(FLOAT, count)) for _ in starts]
            for total, start in zip(totals, starts, strict=True):
                own = Vector.load(builder, FLOAT, count, theta, 4 * start)
                builder.store(own.value, total)
            with cgutils.for_range_slice(builder, first, last, INT64(1)) as (j, _):
                where = builder.add(places, _place(builder, j, 8))
                place = builder.load(builder.inttoptr(where, INT64.as_pointer()))
                row = builder.add(z, builder.mul(place, stride))
                at = builder.add(numbers, _place(builder, j, 4))
                number = Vector.loaded(builder, FLOAT, count, at)
                for total, start in zip(totals, starts, strict=True):
                    term = Vector.load(builder, FLOAT, count, row, 4 * start) * number
                    builder.store((Vector(builder, builder.load(total)) + term).value, total)
            for total, start in zip(totals, starts, strict=True):
                Vector(builder, builder.load(total)).store(theta, 4 * start)
        return context.get_dummy_value()

    u, i = numba.uint64, numba.int64
    return numba.void(u, u, u, u, u, i, i), generate


@jit
def add_terms(theta, z, places, numbers, first, last):
    """theta <- theta + numbers[j] z[places[j]] for j = first ... last - 1, each operation rounded.

    Args:
        theta: float32 (128 n,).
        z: float32 (kept, m), its rows at least as long.
        places, numbers: int64 and float32, one a term.
    """
    start, own, stride = u64(theta.ctypes.data), u64(z.ctypes.data), u64(z.strides[0])
    where, weights = u64(places.ctypes.data), u64(numbers.ctypes.data)
    for q in range(len(theta) // (2 * QUARTER)):
        at = u64(8 * QUARTER * q)
        _add_terms(u64(start + at), u64(own + at), stride, where, weights, first, last)


@jit
def make_words(pairs, low, product, keys):
    """pairs, uint32 (128 n,): the words of n groups."""
    out = u64(pairs.ctypes.data)
    own, made, named = u64(low.ctypes.data), u64(product.ctypes.data), u64(keys.ctypes.data)
    for g in range(len(pairs) // (GROUP // 2)):
        at, before = u64(2 * GROUP * g), u64(8 * BLOCKS * g)
        words(u64(out + at), u64(own + before), u64(made + before), named)


@jit
def make_normals(z, pairs):
    """z, float32 (256 n,), from the words of n groups, uint32 (128 n,)."""
    out, own = u64(z.ctypes.data), u64(pairs.ctypes.data)
    for g in range(len(pairs) // (GROUP // 2)):
        normals(u64(out + u64(4 * GROUP * g)), u64(own + u64(2 * GROUP * g)))


@jit
def halves(out, pairs):
    """out, uint16 (256 n,): the halfwords of n groups, in the order of groups."""
    for g in range(len(pairs) // (GROUP // 2)):
        for pair in range(2):
            start = GROUP * g + 2 * QUARTER * pair
            own = pairs[start // 2 : start // 2 + QUARTER]
            low, high = out[start : start + QUARTER], out[start + QUARTER : start + 2 * QUARTER]
            for j in range(QUARTER):
                low[j] = np.uint16(own[j])
                high[j] = np.uint16(u32(own[j] >> u32(16)))
