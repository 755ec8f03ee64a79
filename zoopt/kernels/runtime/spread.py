"""Runs a compiled kernel on many threads: one call into an OpenMP team, without Python."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from zoopt.kernels.runtime.width import preferred, set_width

INT32, INT64 = ir.IntType(32), ir.IntType(64)
POINTER = ir.IntType(8).as_pointer()
SPAN = types.UniTuple(types.int64, 2)
#: A tensor's memory as an argument: its address, the number of items, and a sample item for the
#: type. It costs a fifth of the time that torch and numpy take to make an array of a tensor.
Memory = tuple[int, int, np.generic]
#: What the threads share: the arguments, the start of the next span, the end of the last one, the
#: length of a span, and whether a span has failed.
ARGUMENTS, NEXT, END, SHARE, FAILED = range(5)


@intrinsic
def spread(typing_context, kernel, arguments, team):
    """Call kernel(*arguments, (start, stop)) on disjoint spans, several at once.

    Args:
        kernel: a compiled function that frees its own memory and returns nothing.
        arguments: the kernel's, a tuple; the arrays in it must outlive the call. The kernel sees a
            `Memory` as an array.
        team: int64: GOMP_parallel's address, or 0 to run on this thread alone; where the first span
            starts; where the last one ends; the length of a span.

    Raises:
        MemoryError: there was no memory for a kernel's scratch.
    """
    inner = (*map(_seen, arguments.types), SPAN)
    kernel.get_call_type(typing_context, inner, {})

    def generate(context, builder, signature, args):
        compiled = kernel.dispatcher.get_compile_result(numba.void(*inner))
        context.add_linking_libs([compiled.library])
        region, start, stop, share = cgutils.unpack_tuple(builder, args[2], 4)
        values = (args[1], start, stop, share, INT32(0))
        shared = ir.LiteralStructType([value.type for value in values])
        memory = cgutils.alloca_once(builder, shared)
        for place, value in enumerate(values):
            builder.store(value, _field(builder, memory, place))
        work = _worker(context, builder.module, shared, compiled, arguments, inner)
        data = builder.bitcast(memory, POINTER)
        with builder.if_else(builder.icmp_signed("==", region, INT64(0))) as (alone, together):
            with alone:
                builder.call(work, [data])
            with together:
                spans = builder.sdiv(builder.sub(builder.add(stop, share), INT64(1)), share)
                threads = builder.trunc(spans, INT32)
                c_type = ir.FunctionType(ir.VoidType(), [work.type, POINTER, INT32, INT32])
                parallel = builder.inttoptr(region, c_type.as_pointer())
                builder.call(parallel, [work, data, threads, INT32(0)])
        failed = builder.load(_field(builder, memory, FAILED))
        with builder.if_then(cgutils.is_not_null(builder, failed), likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, ("a kernel's scratch",))
        return context.get_dummy_value()

    return numba.void(kernel, arguments, types.UniTuple(types.int64, 4)), generate


def _field(builder, pointer, place):
    return builder.gep(pointer, [INT32(0), INT32(place)])


def _worker(context, module, shared, compiled, arguments, inner):
    """LLVM: void work(void *shared), which takes spans until none are left."""
    name = module.get_unique_name("zoopt.work")
    work = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name=name)
    work.linkage = "internal"
    set_width(work, preferred())
    begin, take, do, end = (work.append_basic_block() for _ in range(4))
    builder = ir.IRBuilder(begin)
    own = builder.bitcast(work.args[0], shared.as_pointer())
    whole, stop, share = (builder.load(_field(builder, own, i)) for i in (ARGUMENTS, END, SHARE))
    values = [
        _passed(context, builder, value, kind)
        for value, kind in zip(cgutils.unpack_tuple(builder, whole), arguments.types, strict=True)
    ]
    builder.branch(take)

    builder.position_at_end(take)
    first = builder.atomic_rmw("add", _field(builder, own, NEXT), share, "monotonic")
    builder.cbranch(builder.icmp_signed("<", first, stop), do, end)

    builder.position_at_end(do)
    last = builder.add(first, share)
    last = builder.select(builder.icmp_signed("<", last, stop), last, stop)
    span = context.make_tuple(builder, SPAN, (first, last))
    status, _ = context.call_internal_no_propagate(
        builder, compiled.fndesc, numba.void(*inner), [*values, span]
    )
    with builder.if_then(status.is_error, likely=False):
        builder.store(INT32(1), _field(builder, own, FAILED))
    builder.branch(take)

    builder.position_at_end(end)
    builder.ret_void()
    return work


def _seen(kind):
    """The type as which a kernel sees an argument."""
    if isinstance(kind, types.BaseTuple) and kind.types[:2] == (types.int64, types.int64):
        return types.Array(kind.types[2], 1, "C")
    return kind


def _array(context, builder, kind, address, count):
    """An array of `count` items at an address."""
    array = context.make_array(kind)(context, builder)
    item = context.get_data_type(kind.dtype)
    size = INT64(context.get_abi_sizeof(item))
    populate_array(
        array,
        data=builder.inttoptr(address, item.as_pointer()),
        shape=[count],
        strides=[size],
        itemsize=size,
        meminfo=None,
    )
    return array._getvalue()


@intrinsic
def memory_at(typing_context, address, count, item):
    """The `count` items at an address, of the type of `item`; the array does not own them."""
    kind = types.Array(item, 1, "C")

    def generate(context, builder, signature, args):
        return _array(context, builder, kind, args[0], args[1])

    return kind(types.int64, types.int64, item), generate


def _passed(context, builder, value, kind):
    """The argument as a kernel sees it. Arrays lose their reference count: the threads would
    contend for that one word of memory at every slice, and be no faster than one thread."""
    seen = _seen(kind)
    if seen is not kind:
        address, count, _ = cgutils.unpack_tuple(builder, value, 3)
        return _array(context, builder, seen, address, count)
    if isinstance(kind, types.Array):
        return builder.insert_value(value, ir.Constant(value.type.elements[0], None), 0)
    return value
