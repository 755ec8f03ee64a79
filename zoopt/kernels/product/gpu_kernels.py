"""The compiled kernel for theta plus a low-rank product on the GPU: one program per tile of theta.

A batch of matrices of one shape is passed as a table (TABLE): each operand is a column of int64
addresses, as in `gpu_blocks` of the noise kernels, and `places` has the position of the first
element and the stream of each matrix.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise import philox
from zoopt.kernels.noise.gpu_blocks import _memory
from zoopt.kernels.noise.gpu_tile import halfwords_at, nearest, philox4x32, stochastic

_ROUNDING = tl.constexpr(philox.PURPOSE_ROUNDING)


@triton.jit
def _product(
    left,
    right,
    rows,
    columns,
    m,
    n,
    RANK: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
):
    """A tile of left right^T, float32 (ROWS, COLUMNS). Both factors are contiguous, (m, RANK) and
    (n, RANK).

    If both have 16 bits (NARROW), matrix units multiply them exactly and sum in float32.
    """
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, RANK, K):
        k = begin + tl.arange(0, K)
        mask = (rows < m)[:, None] & (k < RANK)[None, :]
        a = tl.load(left + rows[:, None] * RANK + k[None, :], mask=mask, other=0.0)
        mask = (columns < n)[:, None] & (k < RANK)[None, :]
        b = tl.load(right + columns[:, None] * RANK + k[None, :], mask=mask, other=0.0)
        if NARROW:
            total = tl.dot(a, tl.trans(b), total)
        else:
            a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return total


@triton.jit
def _bits(
    first,
    rows,
    left,
    n,
    number,
    draw,
    k0,
    k1,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """16 random bits for each element of a tile, uint32 (ROWS, COLUMNS); `left` is its first
    column."""
    if ALIGNED:
        # Eight neighbours share a Philox call, because rows and tiles begin at multiples of eight.
        eighth = left // 8 + tl.arange(0, COLUMNS // 8)
        block = ((first + rows * n) // 8)[:, None] + eighth[None, :]
        c0, c1, c2, c3 = philox4x32(block, number, draw, k0, k1, _ROUNDING)
        w = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [ROWS, COLUMNS // 2])
        return tl.reshape(tl.join(w & 0xFFFF, w >> 16), [ROWS, COLUMNS])
    else:
        index = (first + rows * n)[:, None] + (left + tl.arange(0, COLUMNS))[None, :]
        return halfwords_at(index, number, draw, k0, k1, _ROUNDING)


@triton.jit(do_not_specialize=["number", "rounding_draw", "k0", "k1"])
def product_kernel(
    theta,
    left,
    right,
    gradient,
    channel_scale,
    sign_left,
    sign_right,
    places,
    alpha,
    decay,
    sign_step,
    m,
    n,
    gradient_row,
    gradient_column,
    first,
    number,
    rounding_draw,
    k0,
    k1,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    TABLE: tl.constexpr,
    VECTORS: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    RANK: tl.constexpr,
    SIGN_RANK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    NARROW: tl.constexpr,
    BACKEND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
):
    """reference.add_product; terms whose tensors are None are not compiled.

    LEFT, RIGHT and GRADIENT are the dtypes of these operands; other factors are float32. The
    gradient has strides gradient_row and gradient_column. channel_scale has a number for each row,
    a number for each column, or a single number.
    """
    across = tl.cdiv(n, COLUMNS)
    tile = tl.program_id(0)
    if TABLE:
        tiles = tl.cdiv(m, ROWS) * across
        matrix = tile // tiles
        tile %= tiles
        first = tl.load(places + 2 * matrix)
        number = tl.load(places + (2 * matrix + 1)).to(tl.int32)
        theta = _memory(theta, matrix, DTYPE, TABLE, VECTORS)
        if left is not None:
            left = _memory(left, matrix, LEFT, TABLE, VECTORS)
            right = _memory(right, matrix, RIGHT, TABLE, VECTORS)
        if gradient is not None:
            gradient = _memory(gradient, matrix, GRADIENT, TABLE, VECTORS)
        if channel_scale is not None:
            channel_scale = _memory(channel_scale, matrix, tl.float32, TABLE, False)
        if sign_left is not None:
            sign_left = _memory(sign_left, matrix, tl.float32, TABLE, VECTORS)
            sign_right = _memory(sign_right, matrix, tl.float32, TABLE, VECTORS)
    rows = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    leftmost = (tile % across).to(tl.int64) * COLUMNS
    columns = leftmost + tl.arange(0, COLUMNS)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    at = rows[:, None] * n + columns[None, :]
    x = decay * tl.load(theta + at, mask=inside, other=0.0).to(tl.float32)
    place = rows[:, None] * gradient_row + columns[None, :] * gradient_column
    if sign_left is not None:
        # The gradient is read again below. Its tile would not fit in registers until then.
        up = _product(
            sign_left, sign_right, rows, columns, m, n, SIGN_RANK, False, ROWS, COLUMNS, K
        )
        rest = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) - up
        # This keeps NaN.
        x += sign_step * tl.where(rest > 0.0, 1.0, tl.where(rest < 0.0, -1.0, rest))
    if left is not None:
        x += alpha * _product(left, right, rows, columns, m, n, RANK, NARROW, ROWS, COLUMNS, K)
    if channel_scale is not None:
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        if BY_ROW:
            x += tl.load(channel_scale + rows, mask=rows < m, other=0.0)[:, None] * g
        elif BY_COLUMN:
            x += tl.load(channel_scale + columns, mask=columns < n, other=0.0)[None, :] * g
        else:
            x += tl.load(channel_scale) * g
    if STOCHASTIC:
        bits = _bits(
            first, rows, leftmost, n, number, rounding_draw, k0, k1, ALIGNED, ROWS, COLUMNS
        )
        tl.store(theta + at, stochastic(x, bits, DTYPE, BACKEND), mask=inside)
    else:
        tl.store(theta + at, nearest(x, DTYPE, BACKEND), mask=inside)
