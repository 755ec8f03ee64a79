"""The operations on the GPU, compiled: one program a block of elements.

Positions count from `first`, the start of the Philox block that holds the tensor's first element;
`skipped` elements of that block precede the tensor, none where ALIGNED. `threshold` is the mask's
where MASKED; elsewhere nothing of a mask is compiled.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from zoopt.kernels.noise.gpu_tile import added, direction, kept, rounded

_RUN_TIME = [*("skipped", "stream", "draw", "k0", "k1", "threshold", "rounding_draw", "count", "d")]


@triton.jit
def _where(start, numel, skipped, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets into the tensor, int64 (BLOCK,), and whether they lie inside it."""
    i = start + tl.arange(0, BLOCK)
    if ALIGNED:
        return i, i < numel
    else:
        return i - skipped, (i < numel) & (i >= skipped)


@triton.jit(do_not_specialize=_RUN_TIME)
def perturb_kernel(
    theta,
    out,
    alpha,
    numel,
    first,
    skipped,
    stream,
    draw,
    k0,
    k1,
    threshold,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out <- theta + alpha z."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i, inside = _where(start, numel, skipped, ALIGNED, BLOCK)
    step = direction(alpha, first + start, stream, draw, k0, k1, NORMAL, BACKEND, BLOCK)
    keep = kept(first + start, stream, draw, k0, k1, threshold, MASKED, BLOCK)
    x = added(tl.load(theta + i, mask=inside).to(tl.float32), step, keep, MASKED)
    dtype: tl.constexpr = out.dtype.element_ty
    x = rounded(x, first, stream, draw, k0, k1, dtype, False, BACKEND, BLOCK)
    tl.store(out + i, x, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def apply_kernel(
    theta,
    addend,
    coefficients,
    draws,
    count,
    decay,
    numel,
    first,
    skipped,
    stream,
    rounding_draw,
    k0,
    k1,
    threshold,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """theta <- round(decay theta + sum_j coefficients[j] z(draws[j]) + addend), count directions.

    The addend is None if there is nothing to add last.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i, inside = _where(start, numel, skipped, ALIGNED, BLOCK)
    index = first + start
    x = decay * tl.load(theta + i, mask=inside).to(tl.float32)
    j = 0
    while j < count:
        a, draw = tl.load(coefficients + j), tl.load(draws + j)
        step = direction(a, index, stream, draw, k0, k1, NORMAL, BACKEND, BLOCK)
        keep = kept(index, stream, draw, k0, k1, threshold, MASKED, BLOCK)
        x = added(x, step, keep, MASKED)
        j += 1
    if addend is not None:
        x = x + tl.load(addend + i, mask=inside)
    dtype: tl.constexpr = theta.dtype.element_ty
    x = rounded(x, index, stream, rounding_draw, k0, k1, dtype, STOCHASTIC, BACKEND, BLOCK)
    tl.store(theta + i, x, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def momentum_kernel(
    theta,
    buffer,
    coefficients,
    gradients,
    draws,
    count,
    decay,
    momentum,
    step_size,
    numel,
    first,
    skipped,
    stream,
    rounding_draw,
    k0,
    k1,
    threshold,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """buffer <- momentum buffer + sum_j gradients[j] z_j, and with the new buffer
    theta <- round(decay theta + sum_j coefficients[j] z_j + step_size buffer)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i, inside = _where(start, numel, skipped, ALIGNED, BLOCK)
    index = first + start
    x = decay * tl.load(theta + i, mask=inside).to(tl.float32)
    buf = momentum * tl.load(buffer + i, mask=inside)
    one = tl.full([], 1.0, tl.float32)
    j = 0
    while j < count:
        a, g, draw = tl.load(coefficients + j), tl.load(gradients + j), tl.load(draws + j)
        z = direction(one, index, stream, draw, k0, k1, NORMAL, BACKEND, BLOCK)
        keep = kept(index, stream, draw, k0, k1, threshold, MASKED, BLOCK)
        x = added(x, a * z, keep, MASKED)
        buf = added(buf, g * z, keep, MASKED)
        j += 1
    tl.store(buffer + i, buf, mask=inside)
    x = x + step_size * buf
    dtype: tl.constexpr = theta.dtype.element_ty
    x = rounded(x, index, stream, rounding_draw, k0, k1, dtype, STOCHASTIC, BACKEND, BLOCK)
    tl.store(theta + i, x, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def adam_kernel(
    theta,
    coefficients,
    gradients,
    first_weights,
    second_weights,
    closes,
    draws,
    count,
    decay,
    step_size,
    eps,
    numel,
    first,
    skipped,
    stream,
    rounding_draw,
    k0,
    k1,
    threshold,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """reference.adam_window, the moments in registers."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i, inside = _where(start, numel, skipped, ALIGNED, BLOCK)
    index = first + start
    x = decay * tl.load(theta + i, mask=inside).to(tl.float32)
    ghat = tl.zeros([BLOCK], tl.float32)
    m, v = ghat, ghat
    one = tl.full([], 1.0, tl.float32)
    j = 0
    while j < count:
        a, g, draw = tl.load(coefficients + j), tl.load(gradients + j), tl.load(draws + j)
        z = direction(one, index, stream, draw, k0, k1, NORMAL, BACKEND, BLOCK)
        keep = kept(index, stream, draw, k0, k1, threshold, MASKED, BLOCK)
        x = added(x, a * z, keep, MASKED)
        ghat = added(ghat, g * z, keep, MASKED)
        if tl.load(closes + j) != 0:
            m = m + tl.load(first_weights + j) * ghat
            v = v + tl.load(second_weights + j) * (ghat * ghat)
            ghat = tl.zeros([BLOCK], tl.float32)
        j += 1
    x = x + tl.div_rn(step_size * m, tl.sqrt_rn(v) + eps)
    dtype: tl.constexpr = theta.dtype.element_ty
    x = rounded(x, index, stream, rounding_draw, k0, k1, dtype, STOCHASTIC, BACKEND, BLOCK)
    tl.store(theta + i, x, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def rows_kernel(
    weight,
    rows,
    out,
    alpha,
    d,
    offset,
    stream,
    draw,
    k0,
    k1,
    threshold,
    NORMAL: tl.constexpr,
    MASKED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] <- weight[rows[i]] + alpha z, a program for each i and block of the row's noise."""
    PER_BLOCK: tl.constexpr = 8 if NORMAL else 128
    row = tl.load(rows + tl.program_id(0))
    begin = offset + row * d
    start = tl.program_id(1) * BLOCK
    first = begin // PER_BLOCK * PER_BLOCK
    column, inside = _where(start, d + (begin - first), begin - first, False, BLOCK)
    step = direction(alpha, first + start, stream, draw, k0, k1, NORMAL, BACKEND, BLOCK)
    keep = kept(first + start, stream, draw, k0, k1, threshold, MASKED, BLOCK)
    x = added(tl.load(weight + row * d + column, mask=inside).to(tl.float32), step, keep, MASKED)
    dtype: tl.constexpr = out.dtype.element_ty
    x = rounded(x, first, stream, draw, k0, k1, dtype, False, BACKEND, BLOCK)
    tl.store(out + tl.program_id(0).to(tl.int64) * d + column, x, mask=inside)
