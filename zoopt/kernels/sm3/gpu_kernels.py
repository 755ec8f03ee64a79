"""SM3 on the GPU, compiled: a program takes one block of columns down some rows.

Its columns' bounds and maxima stay in registers; maxima meet those of other programs by atomics, on
the bits as integers, for nu >= 0: the bits of such floats are in the floats' order, NaN above
infinity, and the order of the atomics leaves no trace.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_tile import rounded


@triton.jit(do_not_specialize=["m", "offset", "number", "rounding_draw", "k0", "k1"])
def sm3_kernel(
    theta,
    gradient,
    rows,
    row,
    column,
    new_row,
    new_column,
    buffer,
    keep,
    gain,
    eps,
    decay,
    momentum,
    complement,
    step_size,
    m,
    n,
    offset,
    number,
    rounding_draw,
    k0,
    k1,
    ALIGNED: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference_sm3.sm3 on ROWS rows, STRIDE apart; accumulators are the bits of float32.

    Unless ALIGNED, the block begins at the Philox block (of 8) that its first row's element is in,
    and its other rows' elements lie alike in theirs: STRIDE is 8 then, or ROWS 1.
    """
    PER_BLOCK: tl.constexpr = 8
    blocks = (n + (0 if ALIGNED else PER_BLOCK - 1) + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    group, start = program // blocks, program % blocks * BLOCK
    i = group // STRIDE * (STRIDE * ROWS) + group % STRIDE
    stop = tl.minimum(i + STRIDE * ROWS, m)
    if not ALIGNED:
        place = i if rows is None else tl.load(rows + i, mask=i < m, other=0)
        start -= (offset + place * n) % PER_BLOCK
    j = start + tl.arange(0, BLOCK)
    inside = (j < n) if ALIGNED else (j >= 0) & (j < n)
    column_bound = tl.load(column + j, mask=inside, other=0)
    greatest = tl.zeros([BLOCK], tl.int32)
    dtype: tl.constexpr = theta.dtype.element_ty
    while i < stop:
        place = i if rows is None else tl.load(rows + i)
        at = place * n
        g = tl.load(gradient + (i * n + j), mask=inside, other=0.0).to(tl.float32)
        x = decay * tl.load(theta + (at + j), mask=inside, other=0.0).to(tl.float32)
        bound = tl.minimum(tl.load(row + i), column_bound).to(tl.float32, bitcast=True)
        nu = keep * bound + gain * (g * g)
        denominator = tl.sqrt_rn(nu) + eps
        zero = denominator == 0.0
        u = tl.div_rn(tl.where(zero, 0.0, g), tl.where(zero, 1.0, denominator))
        if buffer is not None:
            old = tl.load(buffer + (at + j), mask=inside, other=0.0)
            u = momentum * old + complement * u
            tl.store(buffer + (at + j), u, mask=inside)
        x = x + step_size * u
        index = offset + at + start
        x = rounded(x, index, number, rounding_draw, k0, k1, dtype, STOCHASTIC, BACKEND, BLOCK)
        tl.store(theta + (at + j), x, mask=inside)
        # Outside, the bound and g are 0, and nu with them.
        bits = nu.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(new_row + i, tl.max(bits, 0), sem="relaxed")
        greatest = tl.maximum(greatest, bits)
        i += STRIDE
    tl.atomic_max(new_column + j, greatest, mask=inside, sem="relaxed")
