"""The operations on the GPU: Triton, one read and one write of theta, the noise in registers.

Launches pass enable_fp_fusion=False: a product is rounded before it is added, except in the
explicit fused multiply-adds of the noise. A program handles BLOCK elements that begin at a Philox
block, so that a thread's eight neighbouring elements come from one Philox call and are loaded and
stored 128 bits at a time. There is no autotuning: it would apply an update several times.

Positions count from `first`, the start of the Philox block that holds the tensor's first element;
`skipped` elements of that block precede the tensor, none where ALIGNED.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoopt.kernels.dispatch import interpreting
from zoopt.kernels.gpu_tile import direction, rounded
from zoopt.kernels.key import NoiseKey

#: Elements a program, and its warps: 32 elements a thread spread the key schedule's cost.
BLOCK = 4096
NUM_WARPS = {"cuda": 4, "hip": 2, "interpreter": 1}
#: Elements of one row that a program of the embedding kernel handles.
ROW_BLOCK = 1024
#: Blocks of 128 signs or 8 normals begin at multiples of this.
_ALIGNMENT = {"normal": 8, "rademacher": 128}

_RUN_TIME = ["skipped", "stream", "draw", "k0", "k1", "rounding_draw", "count", "d"]


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
    NORMAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out <- theta + alpha z."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i, inside = _where(start, numel, skipped, ALIGNED, BLOCK)
    step = direction(alpha, first + start, stream, draw, k0, k1, NORMAL, BACKEND, BLOCK)
    x = tl.load(theta + i, mask=inside).to(tl.float32) + step
    dtype: tl.constexpr = out.dtype.element_ty
    x = rounded(x, first, stream, draw, k0, k1, dtype, False, BACKEND, BLOCK)
    tl.store(out + i, x, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def apply_kernel(
    theta,
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
    NORMAL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BACKEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """theta <- round(decay theta + sum_j coefficients[j] z(draws[j])), count directions."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i, inside = _where(start, numel, skipped, ALIGNED, BLOCK)
    index = first + start
    x = decay * tl.load(theta + i, mask=inside).to(tl.float32)
    j = 0
    while j < count:
        a, draw = tl.load(coefficients + j), tl.load(draws + j)
        x = x + direction(a, index, stream, draw, k0, k1, NORMAL, BACKEND, BLOCK)
        j += 1
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
    NORMAL: tl.constexpr,
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
        x = x + a * z
        buf = buf + g * z
        j += 1
    tl.store(buffer + i, buf, mask=inside)
    x = x + step_size * buf
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
    NORMAL: tl.constexpr,
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
    x = tl.load(weight + row * d + column, mask=inside).to(tl.float32) + step
    dtype: tl.constexpr = out.dtype.element_ty
    x = rounded(x, first, stream, draw, k0, k1, dtype, False, BACKEND, BLOCK)
    tl.store(out + tl.program_id(0).to(tl.int64) * d + column, x, mask=inside)


def _int32(word: int) -> int:
    """A 32-bit word as the int32 that Triton's argument has."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _spans(key: NoiseKey, numel: int) -> list[tuple[int, int, dict[str, Any]]]:
    """Launches that cover the tensor: element from and to, and the arguments that place them.

    A tensor that starts at a Philox block is cut before its last partial block, so that the mask
    of the main launch never divides a vector.
    """
    alignment = _ALIGNMENT[key.distribution]
    skipped = key.offset % alignment
    cut = numel if skipped else numel - numel % 128
    spans = []
    for start, stop in ((0, cut), (cut, numel)):
        if start < stop:
            place = {
                "numel": stop - start + skipped,
                "first": key.offset - skipped + start,
                "skipped": skipped,
                "ALIGNED": skipped == 0,
            }
            spans.append((start, stop, place))
    return spans


def _noise(key: NoiseKey) -> dict[str, Any]:
    backend = "interpreter" if interpreting() else "hip" if torch.version.hip else "cuda"
    return {
        "stream": _int32(key.stream),
        "k0": _int32(key.seed & 0xFFFFFFFF),
        "k1": _int32(key.seed >> 32),
        "NORMAL": key.distribution == "normal",
        "BACKEND": backend,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS[backend],
        "enable_fp_fusion": False,
    }


def _grid(place: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(place["numel"], BLOCK),)


def weighted_sum(
    theta: Tensor,
    out: Tensor,
    coefficients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.weighted_sum."""
    with torch.cuda.device_of(theta):
        if theta.data_ptr() != out.data_ptr() or (
            len(draws) == 1 and decay == 1.0 and rounding_draw is None
        ):
            [alpha], [draw] = coefficients, draws
            for start, stop, place in _spans(key, theta.numel()):
                perturb_kernel[_grid(place)](
                    theta[start:stop],
                    out[start:stop],
                    alpha,
                    draw=_int32(draw),
                    **place,
                    **_noise(key),
                )
            return
        scalars = torch.tensor(coefficients, dtype=torch.float32).to(theta.device)
        numbers = torch.tensor([_int32(d) for d in draws], dtype=torch.int32).to(theta.device)
        for start, stop, place in _spans(key, theta.numel()):
            apply_kernel[_grid(place)](
                theta[start:stop],
                scalars,
                numbers,
                len(draws),
                decay,
                rounding_draw=_int32(rounding_draw or 0),
                STOCHASTIC=rounding_draw is not None,
                **place,
                **_noise(key),
            )


def momentum_sum(
    theta: Tensor,
    buffer: Tensor,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    momentum: float,
    step_size: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.momentum_sum."""
    with torch.cuda.device_of(theta):
        scalars = torch.tensor([coefficients, gradients], dtype=torch.float32).to(theta.device)
        numbers = torch.tensor([_int32(d) for d in draws], dtype=torch.int32).to(theta.device)
        for start, stop, place in _spans(key, theta.numel()):
            momentum_kernel[_grid(place)](
                theta[start:stop],
                buffer[start:stop],
                scalars[0],
                scalars[1],
                numbers,
                len(draws),
                decay,
                momentum,
                step_size,
                rounding_draw=_int32(rounding_draw or 0),
                STOCHASTIC=rounding_draw is not None,
                **place,
                **_noise(key),
            )


def gather_rows(
    weight: Tensor, rows: Tensor, out: Tensor, alpha: float, key: NoiseKey, draw: int
) -> None:
    """See reference.gather_rows."""
    d = weight.shape[1]
    blocks = triton.cdiv(d + _ALIGNMENT[key.distribution] - 1, ROW_BLOCK)
    with torch.cuda.device_of(weight):
        rows_kernel[(rows.numel(), blocks)](
            weight,
            rows,
            out,
            alpha,
            d,
            key.offset,
            draw=_int32(draw),
            **{**_noise(key), "BLOCK": ROW_BLOCK},
        )
