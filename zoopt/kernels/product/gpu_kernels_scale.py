"""The compiled kernel that multiplies each tensor of a batch by a number in memory."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_blocks import block_here, memory_of, read, write
from zoopt.kernels.noise.gpu_tile import nearest

_RUN_TIME = ["shift", "numel", "offset", "number", "k0", "k1", "threshold"]


@triton.jit(do_not_specialize=_RUN_TIME)
def scale_kernel(
    theta,
    indices,
    factors,
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
    EACH: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """theta <- round(factor theta); if EACH, tensors have a factor each, else one for all."""
    tensor, block, number, start, _, inside, whole, spots = block_here(
        *(places, hints, shift, numel, offset, number, indices),
        *(NORMAL, TABLE, ALIGNED, BLOCK),
    )
    factor = tl.load(factors + tensor) if EACH else tl.load(factors)
    theta, even = memory_of(theta, tensor, TABLE)
    whole = whole & even
    x = read(theta, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
    x = nearest(factor * x, DTYPE, BACKEND)
    write(theta, x, spots, block, start, inside, whole, DTYPE, TABLE, INDEXED, BLOCK)
