"""SM3 on the GPU: Triton, one read of the gradient, one read and one write of theta.

The vectors and matrices of a batch take one launch, or two if the rows of some of them are not
aligned to memory vectors.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise.gpu import (
    _MAX_HINTS,
    _TYPES,
    _addresses,
    _int32,
    backend_name,
    to_device,
)
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.sm3.gpu_kernels import WIDTH, sm3_kernel
from zoopt.kernels.sm3.reference import Bounds, Numbers

#: Columns and rows of a program. A program is one warp, so that the maximum of a row needs no
#: barrier; each thread loads and rounds eight columns together.
BLOCK, ROWS, NUM_WARPS = 256, 32, 1


def sm3(
    theta: Tensor,
    gradient: Tensor,
    rows: Tensor | None,
    bounds: Bounds,
    buffer: Tensor | None,
    numbers: Numbers,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.sm3."""
    m, n = gradient.shape
    # Where a row begins in its Philox block of 8 elements matters to random bits only.
    aligned = rounding_draw is None or (n % 8 == 0 and key.offset % 8 == 0)
    stride = 1 if aligned or rows is not None else 8
    count = ROWS if aligned or rows is None else 1
    programs = _programs(m, n, stride, count, aligned)
    with torch.cuda.device_of(theta):
        sm3_kernel[(programs,)](
            theta,
            gradient,
            rows,
            *(bound.view(torch.int32) for bound in bounds),
            buffer,
            *numbers,
            None,
            None,
            0,
            m,
            n,
            key.offset,
            _int32(key.stream),
            _int32(rounding_draw or 0),
            _int32(key.seed & 0xFFFFFFFF),
            _int32(key.seed >> 32),
            DTYPE=_TYPES[theta.dtype],
            GRADIENT=_TYPES[gradient.dtype],
            TABLE=False,
            VECTORS=False,
            ALIGNED=aligned,
            STRIDE=stride,
            ROWS=count,
            STOCHASTIC=rounding_draw is not None,
            BACKEND=backend_name(),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def _programs(m: int, n: int, stride: int, count: int, aligned: bool) -> int:
    """How many programs an (m, n) matrix takes, each of `count` rows that are `stride` apart."""
    groups: int = triton.cdiv(m, stride * count) * stride
    blocks: int = triton.cdiv(n + (0 if aligned else 7), BLOCK)
    return groups * blocks


class Table(NamedTuple):
    """Which program serves which tensor (see `gpu_kernels`), and how many maxima there are."""

    places: Tensor
    hints: Tensor
    shift: int
    programs: int
    rows: int
    columns: int


@functools.lru_cache(maxsize=256)
def _table(
    shapes: tuple[tuple[int, int, int, int], ...], stride: int, aligned: bool, device: torch.device
) -> Table:
    """The table of matrices of (rows, columns, offset, stream)."""
    places, programs, rows, columns = list[tuple[int, ...]](), 0, 0, 0
    for m, n, offset, number in shapes:
        places.append((programs, m, n, offset, _int32(number), rows, columns, 0))
        programs += _programs(m, n, stride, ROWS, aligned)
        rows, columns = rows + m, columns + n
    places.append((programs, *[0] * (WIDTH - 1)))
    shift = max(0, (max(programs - 1, 0) // _MAX_HINTS).bit_length())
    hints, tensor = [], 0
    for program in range(0, programs, 1 << shift):
        while places[tensor + 1][0] <= program:
            tensor += 1
        hints.append(tensor)
    table = to_device(places, torch.int64, device)
    return Table(table, to_device(hints, torch.int32, device), shift, programs, rows, columns)


@functools.cache
def _unbounded(device: torch.device) -> Tensor:
    """Infinity, (1,): the bound of a vector's only row."""
    return to_device([math.inf], torch.float32, device)


def sm3_batch(
    batch: Batch,
    gradients: Sequence[Tensor],
    accumulators: Sequence[Sequence[Tensor]],
    buffers: Sequence[Tensor] | None,
    numbers: Numbers,
    rounding_draw: int | None,
) -> None:
    """See reference.sm3; for all tensors of a batch, each of one or two axes."""
    parts: dict[bool, list[int]] = {}
    for i, (theta, key) in enumerate(zip(batch.tensors, batch.keys, strict=True)):
        if theta.numel():
            whole = theta.shape[-1] % 16 == 0 and key.offset % 8 == 0
            parts.setdefault(whole, []).append(i)
    for whole, members in pieces(parts.items()):
        _launch(
            whole,
            Batch([batch.tensors[i] for i in members], [batch.keys[i] for i in members]),
            [gradients[i] for i in members],
            [accumulators[i] for i in members],
            None if buffers is None else [buffers[i] for i in members],
            numbers,
            rounding_draw,
        )


def _launch(
    whole: bool,
    batch: Batch,
    gradients: Sequence[Tensor],
    accumulators: Sequence[Sequence[Tensor]],
    buffers: Sequence[Tensor] | None,
    numbers: Numbers,
    rounding_draw: int | None,
) -> None:
    """One launch; `whole` says that all rows begin at vectors of memory."""
    aligned = rounding_draw is None or whole
    stride, device = 1 if aligned else 8, batch.device
    shapes = tuple(
        (theta.numel() // theta.shape[-1], theta.shape[-1], key.offset, key.stream)
        for theta, key in zip(batch.tensors, batch.keys, strict=True)
    )
    table = _table(shapes, stride, aligned, device)
    rows = [vectors[0] if len(vectors) > 1 else _unbounded(device) for vectors in accumulators]
    columns = [vectors[-1] for vectors in accumulators]
    memories = [batch.tensors, gradients, rows, columns, buffers]
    places = [None if tensors is None else batch.addresses_of(tensors) for tensors in memories]
    theta, gradient, row, column, buffer = (
        None if place is None else _addresses(place, device) for place in places
    )
    # Matrices and vectors alike; the maximum of a vector's only row is not used.
    maxima = kept(torch.zeros, table.rows + table.columns, dtype=torch.int32, device=device)
    new_row, new_column = maxima.split([table.rows, table.columns])
    key = batch.key
    options: dict[str, Any] = {
        "DTYPE": _TYPES[batch.dtype],
        "GRADIENT": _TYPES[gradients[0].dtype],
        "VECTORS": whole and not any(p % 16 for place in places if place for p in place),
        "STOCHASTIC": rounding_draw is not None,
        "BACKEND": backend_name(),
    }
    with torch.cuda.device_of(batch.tensors[0]):
        once(
            sm3_kernel[(table.programs,)],
            *(theta, gradient, None, row, column, new_row, new_column, buffer),
            *numbers,
            *(table.places, table.hints, table.shift, 0, 0, 0, 0),
            _int32(rounding_draw or 0),
            _int32(key.seed & 0xFFFFFFFF),
            _int32(key.seed >> 32),
            TABLE=True,
            ALIGNED=aligned,
            STRIDE=stride,
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
            **options,
        )
    found = maxima.view(torch.float32)
    of_rows = found[: table.rows].split([shape[0] for shape in shapes])
    of_columns = found[table.rows :].split([shape[1] for shape in shapes])
    matrices = [i for i, vectors in enumerate(accumulators) if len(vectors) > 1]
    targets = [*columns, *(rows[i] for i in matrices)]
    torch._foreach_copy_(targets, [*of_columns, *(of_rows[i] for i in matrices)])
