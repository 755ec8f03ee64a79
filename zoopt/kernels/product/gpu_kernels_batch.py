"""The compiled kernel that adds products to matrices on the GPU: one program per tile of a matrix.

`places`, int64 (count + 1, 5), has a row for each matrix: its first tile, rows, columns, the
position of its first element, and its stream. `hints` are as in `gpu_blocks` of the noise kernels.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_tile import nearest, stochastic
from zoopt.kernels.product.gpu_kernels import _bits

_RUN_TIME = ["shift", "count", "rounding_draw", "k0", "k1"]


@triton.jit(do_not_specialize=_RUN_TIME)
def products_kernel(
    theta,
    left,
    right,
    places,
    hints,
    shift,
    decay,
    count,
    rounding_draw,
    k0,
    k1,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
):
    """theta <- round(decay theta + sum_d left[d] right[d]^T), with `count` products.

    right[d] is (n, RANK), or (RANK, n) if TRANSPOSED. With VECTORS, matrices are aligned to 16
    bytes and their number of columns is a multiple of 8."""
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(hints + (program >> shift))
    while tl.load(places + 5 * matrix + 5) <= program:
        matrix += 1
    place = places + 5 * matrix
    tile = program - tl.load(place)
    m, n = tl.load(place + 1), tl.load(place + 2)
    first, number = tl.load(place + 3), tl.load(place + 4).to(tl.int32)
    theta = tl.load(theta + matrix).to(tl.pointer_type(DTYPE))
    if VECTORS:
        theta, n = tl.multiple_of(theta, 16), tl.multiple_of(n, 8)
    left = tl.load(left + matrix).to(tl.pointer_type(tl.float32))
    right = tl.load(right + matrix).to(tl.pointer_type(tl.float32))
    across = tl.cdiv(n, COLUMNS)
    rows = (tile // across) * ROWS + tl.arange(0, ROWS)
    leftmost = (tile % across) * COLUMNS
    columns = leftmost + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    d = 0
    while d < count:
        for begin in range(0, RANK, K):
            k = begin + tl.arange(0, K)
            mask = (rows < m)[:, None] & (k < RANK)[None, :]
            a = tl.load(left + rows[:, None] * RANK + k[None, :], mask=mask, other=0.0)
            mask = (columns < n)[:, None] & (k < RANK)[None, :]
            if TRANSPOSED:
                b = tl.load(right + k[None, :] * n + columns[:, None], mask=mask, other=0.0)
            else:
                b = tl.load(right + columns[:, None] * RANK + k[None, :], mask=mask, other=0.0)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        left += m * RANK
        right += n * RANK
        d += 1
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    at = rows[:, None] * n + columns[None, :]
    x = decay * tl.load(theta + at, mask=inside, other=0.0).to(tl.float32) + total
    if STOCHASTIC:
        bits = _bits(
            first, rows, leftmost, n, number, rounding_draw, k0, k1, ALIGNED, ROWS, COLUMNS
        )
        tl.store(theta + at, stochastic(x, bits, DTYPE, BACKEND), mask=inside)
    else:
        tl.store(theta + at, nearest(x, DTYPE, BACKEND), mask=inside)
