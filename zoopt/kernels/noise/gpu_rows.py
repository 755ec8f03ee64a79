"""The operation on the GPU that has a scale for each row, compiled. See `gpu_kernels`."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_blocks import _pointer, block_here, memory_of, read, write
from zoopt.kernels.noise.gpu_tile import added, direction, kept, rounded

_RUN_TIME = ["columns", "alpha", "draw", "shift", "numel", "offset", "number", "k0", "k1"]
_RUN_TIME += ["threshold"]


@triton.jit(do_not_specialize=_RUN_TIME)
def scaled_rows_kernel(
    theta,
    out,
    scales,
    indices,
    columns,
    alpha,
    draw,
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
    EVEN: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_ij <- round(theta_ij + (alpha scales_i) z_ij). `columns` is the length of a row, or in
    memory that of each tensor's if TABLE. If EVEN, groups of eight elements lie within a row."""
    tensor, block, number, start, index, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    theta, even = memory_of(theta, tensor, TABLE)
    out, even_out = memory_of(out, tensor, TABLE)
    whole = whole & even & even_out
    x = read(theta, spots, block, start, inside, whole, DTYPE, TABLE, False, BLOCK)
    if TABLE:
        columns = tl.load(columns + tensor)
    # The row of an element, counted from that of the block's first one, has 32 bits.
    first = start // columns
    beyond = (start - first * columns).to(tl.int32)
    own, _ = memory_of(scales, tensor, TABLE)
    own = _pointer(own, False, tl.float32, TABLE) + first
    if EVEN:
        # Where the first of a group is inside, all are: a division and a load for each group.
        if TABLE:
            numel = tl.load(places + 4 * tensor + 1)
        group = 8 * tl.arange(0, BLOCK // 8)
        rows = (beyond + group) // columns.to(tl.int32)
        scale = tl.load(own + rows, mask=group < tl.minimum(numel - start, BLOCK), other=0.0)
        scale = tl.broadcast_to(tl.expand_dims(scale, 1), [BLOCK // 8, 8])
        scale = tl.reshape(scale, [BLOCK])
    else:
        rows = (beyond + tl.arange(0, BLOCK)) // columns.to(tl.int32)
        scale = tl.load(own + rows, mask=inside, other=0.0)
    one = tl.full([], 1.0, tl.float32)
    z = direction(one, index, number, draw, k0, k1, NORMAL, BACKEND, BLOCK)
    keep = kept(index, number, draw, k0, k1, threshold, MASKED, BLOCK)
    x = added(x, (alpha * scale) * z, keep, MASKED)
    x = rounded(x, index, number, 0, k0, k1, DTYPE, False, BACKEND, BLOCK)
    write(out, x, spots, block, start, inside, whole, DTYPE, TABLE, False, BLOCK)
