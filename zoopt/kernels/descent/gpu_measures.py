"""What operations on the GPU only read of tensors: which elements are small, sums of squares."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.descent.gpu_kernels import _RUN_TIME, _sum
from zoopt.kernels.noise.gpu_blocks import block_here, memory_of, read, write


@triton.jit(do_not_specialize=_RUN_TIME)
def small_kernel(
    theta,
    limit,
    out,
    indices,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    TABLE: tl.constexpr,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out <- |theta| <= limit, one byte per element."""
    tensor, block, _number, start, _index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    theta, even = memory_of(theta, tensor, TABLE)
    out, even_out = memory_of(out, tensor, TABLE)
    whole = whole & even & even_out
    if TABLE:
        own = tl.load(tl.load(limit + tensor).to(tl.pointer_type(tl.float32)))
    else:
        own = tl.load(limit)
    x = read(theta, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    few = (tl.abs(x) <= own.to(DTYPE).to(tl.float32)).to(tl.uint8)
    write(out, few, spots, block, start, inside, whole, tl.uint8, TABLE, False, BLOCK)


@triton.jit(do_not_specialize=_RUN_TIME)
def energy_kernel(
    theta,
    out,
    indices,
    terms,
    places,
    hints,
    shift,
    numel,
    offset,
    number,
    count,
    k0,
    k1,
    threshold,
    DTYPE: tl.constexpr,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    MADE: tl.constexpr,
    UNROLLED: tl.constexpr,
    TABLE: tl.constexpr,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[program] <- the sum of squares of a block of theta, or (MADE) of sum_j a_j z_j, in
    float64."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    if MADE:
        x = _sum(
            *(tl.zeros([BLOCK], tl.float32), terms, count, index, number, k0, k1),
            *(threshold, 3, 2, UNROLLED, NORMAL, MASKED, BACKEND, BLOCK),
        )
    else:
        theta, even = memory_of(theta, tensor, TABLE)
        x = read(theta, spots, block, start, inside, whole & even, DTYPE, TABLE, INDEXED, BLOCK)
    x = tl.where(inside, x, 0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(x * x))


@triton.jit(do_not_specialize=["programs"])
def total_kernel(parts, out, places, programs, TABLE: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] <- the sum of the parts of the i-th tensor's programs, in order."""
    tensor = tl.program_id(0)
    part, end = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64) + programs
    if TABLE:
        part, end = tl.load(places + 4 * tensor), tl.load(places + 4 * tensor + 4)
    total = tl.zeros([BLOCK], tl.float64)
    while part < end:
        at = part + tl.arange(0, BLOCK)
        total += tl.load(parts + at, mask=at < end, other=0.0)
        part += BLOCK
    tl.store(out + tensor, tl.sum(total))
