"""Which block of which tensor a GPU program serves, and how it reads and writes it.

A batch comes as a table (TABLE): `places` has a row a tensor, int64 (count + 1, 4): the tensor's
first block, its elements, the position of its first element, its stream; the last row ends the
blocks. `hints` says in which tensor every 2^shift-th block lies. Tensors are then columns of
addresses, int64. A tensor alone comes as itself, with `numel`, `offset` and `number` by value.

Positions count from the start of the Philox block that holds the tensor's first element; the
elements of that block which precede it are `skipped`, none of any tensor where ALIGNED. A block is
whole, and moves 128 bits at a time, if all of it lies inside its tensor and in memory as it does in
the noise.
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
    """Where the tensor lies; its address is a multiple of 16 if VECTORS."""
    if TABLE:
        pointer = tl.load(memory + tensor).to(tl.pointer_type(DTYPE))
        if VECTORS:
            pointer = tl.multiple_of(pointer, 16)
        return pointer
    else:
        return memory


@triton.jit
def _load(pointer, inside, whole, BLOCK: tl.constexpr):
    """A block, float32 (BLOCK,): without a mask where it is whole."""
    i = tl.arange(0, BLOCK)
    if whole:  # noqa: SIM108
        x = tl.load(pointer + i)
    else:
        x = tl.load(pointer + i, mask=inside)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, x, inside, whole, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if whole:
        tl.store(pointer + i, x)
    else:
        tl.store(pointer + i, x, mask=inside)


@triton.jit
def block_of(
    block, numel, offset, NORMAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Where a block begins in the tensor, which of its elements lie inside, (BLOCK,), and whether
    it is whole. Within a block positions have 32 bits, so that addresses share their 64-bit base.
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
    """The tensor's address, and whether it is a multiple of 16; a tensor alone is its own address,
    and Triton knows by itself."""
    if TABLE:
        address = tl.load(memory + tensor)
        return address, (address & 15) == 0
    else:
        return memory, tl.full([], 1, tl.int1)


@triton.jit
def _pointer(memory, EVEN: tl.constexpr, DTYPE: tl.constexpr, TABLE: tl.constexpr):
    """Where `memory_of` points to; a multiple of 16 if EVEN, which only a cast can carry."""
    if TABLE:
        pointer = memory.to(tl.pointer_type(DTYPE))
        if EVEN:
            pointer = tl.multiple_of(pointer, 16)
        return pointer
    else:
        return memory


@triton.jit
def spots_of(indices, tensor, start, inside, TABLE: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block's elements lie in their tensor, int64 (BLOCK,), if it is worked on at indices
    only; otherwise nothing that is read."""
    if indices is None:
        return tl.zeros([1], tl.int64)
    else:
        if TABLE:  # noqa: SIM108
            own = tl.load(indices + tensor).to(tl.pointer_type(tl.int64))
        else:
            own = indices
        return tl.load(own + start + tl.arange(0, BLOCK), mask=inside, other=0)


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
    """A block of what `memory_of` found, float32 (BLOCK,): at its spots where INDEXED."""
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
    """Write a block, (BLOCK,), where `read` has it from."""
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
    """The draw of two halves, which are floats below 65536: int32."""
    high, low = tl.full([], high, tl.float32), tl.full([], low, tl.float32)
    return (high.to(tl.int32) << 16) | low.to(tl.int32)
