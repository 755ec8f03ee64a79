"""The CPU kernels' compiler, and machine operations that numba lacks, written in LLVM."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from zoopt.kernels.runtime import cache, width

i32, i64, f32 = np.int32, np.int64, np.float32
u16, u32, u64 = np.uint16, np.uint32, np.uint64


def jit(function):
    """Compile on first use, and keep the machine code on disk if possible."""
    options = {"nogil": True, "error_model": "numpy"}
    compiled = numba.njit(pipeline_class=width.Compiler, **options)(function)
    cache.keep(compiled, width.preferred)
    return compiled


@intrinsic
def fma(typing_context, a, b, c):
    """a b + c, rounded once."""
    signature = numba.float32(numba.float32, numba.float32, numba.float32)
    return signature, lambda context, builder, sig, args: builder.fma(*args)


@intrinsic
def bits_of(typing_context, x):
    """The bit pattern of a float32 as an int32."""
    signature = numba.int32(numba.float32)
    return signature, lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def float_of(typing_context, x):
    """The float32 of an int32 bit pattern."""
    signature = numba.float32(numba.int32)
    return signature, lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def add_any_order(typing_context, a, b):
    """a + b in a sum that the compiler may reorder, so that it can vectorise it."""
    signature = numba.float32(numba.float32, numba.float32)
    return signature, lambda context, builder, sig, args: builder.fadd(
        *args, flags=("reassoc", "nsz")
    )


@intrinsic
def unowned(typing_context, array):
    """The array without its reference count: each function that receives one with it, and each
    slice, counts atomically, some 5 ns. The memory must be held by another array, see `hold`."""

    def generate(context, builder, signature, args):
        return builder.insert_value(args[0], ir.Constant(args[0].type.elements[0], None), 0)

    return array(array), generate


@intrinsic
def hold(typing_context, array):
    """Do nothing, after which the array's memory may go."""
    return numba.void(array), lambda context, builder, sig, args: context.get_dummy_value()


INT32 = ir.IntType(32)
INT16S, INT32S, FLOAT32S = (
    ir.VectorType(element, 32) for element in (ir.IntType(16), INT32, ir.FloatType())
)


def _signed(builder, word, bits):
    """LLVM: 32 float32 values of one magnitude (`bits` is its pattern) with the signs of a word.

    It is one operation on a vector of 32, which LLVM cuts to the machine's width. A loop over the
    word's bits would become scalar code (0.12 instead of 0.02 ns an element).
    """

    def splat(value):
        undefined = ir.Constant(INT32S, ir.Undefined)
        single = builder.insert_element(undefined, value, INT32(0))
        return builder.shuffle_vector(single, undefined, INT32S([0] * 32))

    shifts = INT32S([31 - lane for lane in range(32)])
    signs = builder.and_(builder.shl(splat(word), shifts), INT32S([1 << 31] * 32))
    return builder.bitcast(builder.xor(signs, splat(bits)), FLOAT32S)


@intrinsic
def store_signs(typing_context, address, word):
    """Store a word's signs, +1 and -1, as 32 float32 at an address."""

    def generate(context, builder, signature, args):
        signs = _signed(builder, args[1], INT32(0x3F800000))
        builder.store(signs, builder.inttoptr(args[0], FLOAT32S.as_pointer()), align=4)
        return context.get_dummy_value()

    return numba.void(numba.uint64, numba.uint32), generate


@intrinsic
def add_signs(typing_context, address, word, bits):
    """Add a word's signs times bits, a float32's pattern, to the 32 float32 at an address."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], FLOAT32S.as_pointer())
        values = builder.load(pointer, align=4)
        builder.store(builder.fadd(values, _signed(builder, args[1], args[2])), pointer, align=4)
        return context.get_dummy_value()

    return numba.void(numba.uint64, numba.uint32, numba.uint32), generate


def _add_signs_times(count):
    """An intrinsic: add_signs with so many magnitudes in turn, each sum rounded."""

    @intrinsic
    def add_signs_times(typing_context, address, word, magnitudes):
        def generate(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], FLOAT32S.as_pointer())
            values = builder.load(pointer, align=4)
            for place in range(count):
                at = builder.add(args[2], ir.IntType(64)(4 * place))
                bits = builder.load(builder.inttoptr(at, INT32.as_pointer()), align=4)
                values = builder.fadd(values, _signed(builder, args[1], bits))
            builder.store(values, pointer, align=4)
            return context.get_dummy_value()

        return numba.void(numba.uint64, numba.uint32, numba.uint64), generate

    return add_signs_times


add_signs_once, add_signs_twice, add_signs_thrice = (_add_signs_times(n) for n in (1, 2, 3))


@intrinsic
def add_signs_below(typing_context, address, word, bits, randoms, threshold):
    """As add_signs, where the 32 uint16 at the address randoms are below the threshold."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], FLOAT32S.as_pointer())
        values = builder.load(pointer, align=4)
        random = builder.load(builder.inttoptr(args[3], INT16S.as_pointer()), align=2)
        undefined = ir.Constant(INT16S, ir.Undefined)
        single = builder.insert_element(undefined, args[4], INT32(0))
        limit = builder.shuffle_vector(single, undefined, INT32S([0] * 32))
        kept = builder.icmp_unsigned("<", random, limit)
        total = builder.fadd(values, _signed(builder, args[1], args[2]))
        builder.store(builder.select(kept, total, values), pointer, align=4)
        return context.get_dummy_value()

    signature = numba.void(numba.uint64, numba.uint32, numba.uint32, numba.uint64, numba.uint16)
    return signature, generate


@intrinsic
def add_signs_bfloat16(typing_context, source, target, word, bits):
    """As add_signs, from the 32 bfloat16 at one address to another, rounded to nearest."""

    def generate(context, builder, signature, args):
        stored = builder.load(builder.inttoptr(args[0], INT16S.as_pointer()), align=2)
        wide = builder.shl(builder.zext(stored, INT32S), INT32S([16] * 32))
        total = builder.fadd(builder.bitcast(wide, FLOAT32S), _signed(builder, args[2], args[3]))
        pattern = builder.bitcast(total, INT32S)
        odd = builder.and_(builder.lshr(pattern, INT32S([16] * 32)), INT32S([1] * 32))
        carried = builder.add(builder.add(pattern, INT32S([0x7FFF] * 32)), odd)
        number = builder.fcmp_ordered("ord", total, total)
        shifted = builder.lshr(carried, INT32S([16] * 32))
        rounded = builder.select(number, shifted, INT32S([0x7FC0] * 32))
        target = builder.inttoptr(args[1], INT16S.as_pointer())
        builder.store(builder.trunc(rounded, INT16S), target, align=2)
        return context.get_dummy_value()

    signature = numba.void(numba.uint64, numba.uint64, numba.uint32, numba.uint32)
    return signature, generate
