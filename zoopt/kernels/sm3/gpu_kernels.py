"""SM3 on the GPU, compiled: a program handles one block of columns, over some rows.

The bounds and maxima of its columns stay in registers. Maxima are combined with those of other
programs by atomics on the bit patterns as integers: since nu >= 0, these have the same order as the
values, with NaN above infinity. A maximum does not depend on the order of the atomics.

A batch comes as a table (TABLE): `places` has a row for each tensor, int64 (count + 1, WIDTH): its
first program, rows, columns, the position of its first element, its stream, and where the maxima of
its rows and columns begin in new_row and new_column. `hints` names the tensor of every 2^shift-th
program. Tensors are columns of addresses, as in noise's `gpu_kernels`.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_blocks import _memory
from zoopt.kernels.noise.gpu_tile import rounded

#: Numbers of a tensor in a table.
WIDTH = 8
_WIDTH = tl.constexpr(WIDTH)
_INFINITY = tl.constexpr(0x7F800000)
_RUN_TIME = ["m", "shift", "offset", "number", "rounding_draw", "k0", "k1"]


@triton.jit(do_not_specialize=_RUN_TIME)
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
    places,
    hints,
    shift,
    m,
    n,
    offset,
    number,
    rounding_draw,
    k0,
    k1,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference_sm3.sm3 on ROWS rows, STRIDE apart; accumulators are the bits of float32.

    Unless ALIGNED, the block begins at the start of the Philox block (of 8) that holds the first
    element of its first row. Then STRIDE is 8, so that the other rows begin at the same place in
    their Philox blocks, or ROWS is 1.
    """
    PER_BLOCK: tl.constexpr = 8
    program = tl.program_id(0).to(tl.int64)
    if TABLE:
        tensor = tl.load(hints + (program >> shift)).to(tl.int64)
        while tl.load(places + _WIDTH * (tensor + 1)) <= program:
            tensor += 1
        entry = _WIDTH * tensor
        program -= tl.load(places + entry)
        m, n = tl.load(places + (entry + 1)), tl.load(places + (entry + 2))
        offset = tl.load(places + (entry + 3))
        number = tl.load(places + (entry + 4)).to(tl.int32)
        new_row += tl.load(places + (entry + 5))
        new_column += tl.load(places + (entry + 6))
        if VECTORS:
            n = tl.multiple_of(n, 16)
        theta = _memory(theta, tensor, DTYPE, TABLE, VECTORS)
        gradient = _memory(gradient, tensor, GRADIENT, TABLE, VECTORS)
        row = _memory(row, tensor, tl.int32, TABLE, VECTORS)
        column = _memory(column, tensor, tl.int32, TABLE, VECTORS)
        if buffer is not None:
            buffer = _memory(buffer, tensor, tl.float32, TABLE, VECTORS)
    blocks = (n + (0 if ALIGNED else PER_BLOCK - 1) + BLOCK - 1) // BLOCK
    group, start = program // blocks, program % blocks * BLOCK
    i = group // STRIDE * (STRIDE * ROWS) + group % STRIDE
    stop = tl.minimum(i + STRIDE * ROWS, m)
    if not ALIGNED:
        place = i if rows is None else tl.load(rows + i, mask=i < m, other=0)
        start -= (offset + place * n) % PER_BLOCK
    j = start + tl.arange(0, BLOCK)
    inside = (j < n) if ALIGNED else (j >= 0) & (j < n)
    # A NaN is no bound.
    column_bound = tl.minimum(tl.load(column + j, mask=inside, other=0), _INFINITY)
    greatest = tl.zeros([BLOCK], tl.int32)
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
        x = rounded(x, index, number, rounding_draw, k0, k1, DTYPE, STOCHASTIC, BACKEND, BLOCK)
        tl.store(theta + (at + j), x, mask=inside)
        # Outside the tensor, the bound and g are 0, and so is nu.
        bits = nu.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(new_row + i, tl.max(bits, 0), sem="relaxed")
        greatest = tl.maximum(greatest, bits)
        i += STRIDE
    tl.atomic_max(new_column + j, greatest, mask=inside, sem="relaxed")
