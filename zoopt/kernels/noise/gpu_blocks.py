"""The block of a tensor on which a GPU program works, and how it reads and writes it.

A batch is passed as a table (TABLE): `places`, int64 (count + 1, 4), has a row for each tensor: its
first block, its number of elements, the position of its first element, and its stream. The last row
ends the blocks. `hints` gives the tensor of every 2^shift-th block. Tensors are then columns of
addresses, int64. A single tensor is passed as itself, with `numel`, `offset` and `number` by value.

Positions count from the start of the Philox block that holds the tensor's first element; `skipped`
is the number of elements of that block before it, which is 0 for all tensors if ALIGNED. A block is
whole, and is loaded and stored 128 bits at a time, if it lies inside its tensor and is aligned in
memory as it is in the noise.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(places, hints, shift, numel, offset, number, TABLE: tl.constexpr):
    """The program's tensor, its block there, and the tensor's elements, offset and stream."""
    program = tl.program_id(0).to(tl.int64)
    if TABLE:
        tensor = tl.load(hints + (program >> shift))
        while tl.load(places + 4 * tensor + 4) <= program:
            tensor += 1
        row = places + 4 * tensor
        block = program - tl.load(row)
        return tensor, block, tl.load(row + 1), tl.load(row + 2), tl.load(row + 3).to(tl.int32)
    else:
        return 0, program, numel, offset, number


@triton.jit
def _memory(memory, tensor, DTYPE: tl.constexpr, TABLE: tl.constexpr, VECTORS: tl.constexpr):
    """The tensor's address, a multiple of 16 if VECTORS."""
    if TABLE:
        pointer = tl.load(memory + tensor).to(tl.pointer_type(DTYPE))
        if VECTORS:
            pointer = tl.multiple_of(pointer, 16)
        return pointer
    else:
        return memory


@triton.jit
def _load(pointer, inside, whole, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """A block of any dtype, (BLOCK,), loaded without a mask if it is whole.

    If EVEN, masks begin and end with vectors of memory, and cost nothing.
    """
    i = tl.arange(0, BLOCK)
    if EVEN:
        x = tl.load(pointer + i, mask=inside, other=0)
    else:
        if whole:  # noqa: SIM108
            x = tl.load(pointer + i)
        else:
            x = tl.load(pointer + i, mask=inside, other=0)
    return x


@triton.jit
def _store(pointer, x, inside, whole, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if EVEN:
        tl.store(pointer + i, x, mask=inside)
    else:
        if whole:
            tl.store(pointer + i, x)
        else:
            tl.store(pointer + i, x, mask=inside)


@triton.jit
def block_of(
    block, numel, offset, NORMAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Where a block begins in the tensor, which of its elements lie inside, (BLOCK,), and whether
    it is whole. Positions within a block have 32 bits, so that addresses share a 64-bit base.
    """
    i = tl.arange(0, BLOCK)
    if ALIGNED:
        start = block * BLOCK
        left = tl.minimum(numel - start, BLOCK).to(tl.int32)
        return start, i < left, left == BLOCK
    else:
        skipped = offset % (8 if NORMAL else 128)
        start = block * BLOCK - skipped
        left = tl.minimum(numel - start, BLOCK).to(tl.int32)
        inside = (i < left) & (i >= tl.maximum(-start, 0).to(tl.int32))
        return start, inside, (left == BLOCK) & (skipped == 0)


@triton.jit
def memory_of(memory, tensor, TABLE: tl.constexpr):
    """The tensor's address, and whether it is a multiple of 16. A single tensor is its own address,
    and Triton knows its alignment."""
    if TABLE:
        address = tl.load(memory + tensor)
        return address, (address & 15) == 0
    else:
        return memory, tl.full([], 1, tl.int1)


@triton.jit
def _pointer(memory, EVEN: tl.constexpr, DTYPE: tl.constexpr, TABLE: tl.constexpr):
    """The pointer from `memory_of`. If EVEN it is a multiple of 16, which only a cast can
    express."""
    if TABLE:
        pointer = memory.to(tl.pointer_type(DTYPE))
        if EVEN:
            pointer = tl.multiple_of(pointer, 16)
        return pointer
    else:
        return memory


@triton.jit
def spots_of(indices, tensor, start, inside, TABLE: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block's elements lie in their tensor, int64 (BLOCK,), if the operation works on
    indices; otherwise unused."""
    if indices is None:
        return tl.zeros([1], tl.int64)
    else:
        if TABLE:  # noqa: SIM108
            own = tl.load(indices + tensor).to(tl.pointer_type(tl.int64))
        else:
            own = indices
        return tl.load(own + start + tl.arange(0, BLOCK), mask=inside, other=0)


@triton.jit
def block_here(
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    indices,
    NORMAL: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The block that this program works on: its tensor, its number there, the tensor's stream, the
    block's first element and that one's position in the noise; which elements lie inside, whether
    all do, and their spots."""
    tensor, block, numel, offset, number = _place(
        places, hints, shift, numel, offset, number, TABLE
    )
    start, inside, whole = block_of(block, numel, offset, NORMAL, ALIGNED, BLOCK)
    spots = spots_of(indices, tensor, start, inside, TABLE, BLOCK)
    return tensor, block, number, start, offset + start, inside, whole, spots


@triton.jit
def read(
    memory,
    spots,
    block,
    start,
    inside,
    whole,
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block at the address from `memory_of`, float32 (BLOCK,); at its spots if INDEXED."""
    i = tl.arange(0, BLOCK)
    if INDEXED:
        x = tl.load(_pointer(memory, False, DTYPE, TABLE) + spots, mask=inside)
    else:
        if whole:
            x = tl.load(_pointer(memory, True, DTYPE, TABLE) + block * BLOCK + i)
        else:
            x = tl.load(_pointer(memory, False, DTYPE, TABLE) + start + i, mask=inside)
    return x.to(tl.float32)


@triton.jit
def write(
    memory,
    x,
    spots,
    block,
    start,
    inside,
    whole,
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a block, (BLOCK,), where `read` reads it."""
    i = tl.arange(0, BLOCK)
    if INDEXED:
        tl.store(_pointer(memory, False, DTYPE, TABLE) + spots, x, mask=inside)
    else:
        if whole:
            tl.store(_pointer(memory, True, DTYPE, TABLE) + block * BLOCK + i, x)
        else:
            tl.store(_pointer(memory, False, DTYPE, TABLE) + start + i, x, mask=inside)


@triton.jit
def draw_of(high, low):
    """A draw from its two halves, floats below 65536: int32."""
    high, low = tl.full([], high, tl.float32), tl.full([], low, tl.float32)
    return (high.to(tl.int32) << 16) | low.to(tl.int32)
