"""Operations on some entries of each tensor on the GPU, in Triton: one launch for a batch."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from zoopt.kernels.batch import Batch, addresses
from zoopt.kernels.entries.gpu_kernels import (
    adam_entries_kernel,
    cover_entries_kernel,
    sum_entries_kernel,
)
from zoopt.kernels.entries.operands import Cover, Entries, Rates, Sums, corrections
from zoopt.kernels.noise.gpu import (
    _TYPES,
    NUM_WARPS,
    _addresses,
    _distances,
    _int32,
    _table,
    backend_name,
)
from zoopt.kernels.packed import packed

#: An operation takes a whole batch.
BATCHES = True
#: Entries of a program: eight a thread.
BLOCK = 1024

Memories = Mapping[str, Sequence[Tensor | None]]


def adam_entries(
    batch: Batch,
    gradients: Sequence[Tensor],
    entries: Sequence[Entries],
    betas: tuple[float, float],
    rates: Rates,
    rounding_draw: int | None,
) -> None:
    """See reference.adam_entries."""
    first, second = (corrections(beta, batch.device) for beta in betas)
    memories: Memories = {
        "theta": batch.tensors,
        "gradient": gradients,
        "index": [own.positions for own in entries],
        "base": [own.base for own in entries],
        "first": [own.exp_avg for own in entries],
        "second": [own.exp_avg_sq for own in entries],
        "age": [own.age for own in entries],
    }
    _launch(
        adam_entries_kernel,
        batch,
        memories,
        [own.exp_avg.numel() for own in entries],
        limits=[tensor.numel() for tensor in batch.tensors],
        first_corrections=first,
        second_corrections=second,
        **rates.adam._asdict(),
        decay=rates.decay,
        rounding_draw=_int32(rounding_draw or 0),
        k0=_int32(batch.key.seed & 0xFFFFFFFF),
        k1=_int32(batch.key.seed >> 32),
        DTYPE=_TYPES[batch.dtype],
        GRADIENT=_TYPES[gradients[0].dtype],
        STOCHASTIC=rounding_draw is not None,
    )


def sum_entries(batch: Batch, sums: Sequence[Sums]) -> None:
    """See reference.sum_entries."""
    memories: Memories = {
        "gradient": batch.tensors,
        "index": [own.positions for own in sums],
        "total": [own.total for own in sums],
        "squares": [own.squares for own in sums],
    }
    _launch(
        sum_entries_kernel,
        batch,
        memories,
        [own.total.numel() for own in sums],
        limits=[tensor.numel() for tensor in batch.tensors],
        DTYPE=_TYPES[sums[0].total.dtype],
        GRADIENT=_TYPES[batch.dtype],
    )


def cover_entries(batch: Batch, covers: Sequence[Cover], picked: bool) -> None:
    """See reference.cover_entries."""
    counts = [own.positions.numel() for own in covers]
    widths = [own.columns.numel() for own in covers]
    bounds = packed(counts, torch.float32, batch.device)
    for raises in (False, True):
        state = [[own.rows for own in covers], [own.columns for own in covers], bounds]
        if raises:
            state = [[own.view(torch.int32) for own in each] for each in state]
        memories: Memories = {
            "gradient": batch.tensors,
            "index": [own.positions for own in covers],
            **dict(zip(("rows", "columns", "bounds"), state, strict=True)),
        }
        _launch(
            cover_entries_kernel,
            batch,
            memories,
            counts,
            limits=[own.rows.numel() * width for own, width in zip(covers, widths, strict=True)],
            widths=widths,
            GRADIENT=_TYPES[batch.dtype],
            PICKED=picked,
            RAISES=raises,
        )


def _launch(
    kernel: Any, batch: Batch, memories: Memories, counts: Sequence[int], **own: Any
) -> None:
    """Launch a kernel once on so many entries of each tensor of a batch. Lists are numbers of each
    tensor, and memories that are None those that no tensor has."""
    backend, alone = backend_name(), len(batch) == 1
    columns = {
        name: None if tensors[0] is None else [t for t in tensors if t is not None]
        for name, tensors in memories.items()
    }
    rows = tuple(
        (count, key.offset, key.stream) for count, key in zip(counts, batch.keys, strict=True)
    )
    places = {name: None if c is None else addresses(c) for name, c in columns.items()}
    if alone:
        [(numel, offset, number)] = rows
        table: tuple[Any, ...] = (None, None, 0)
        programs = triton.cdiv(numel, BLOCK)
        arguments: dict[str, Any] = {n: None if c is None else c[0] for n, c in columns.items()}
        numbers = {name: value[0] for name, value in own.items() if isinstance(value, list)}
    else:
        numel = offset = number = 0
        made = _table(rows, BLOCK, 1, batch.device)
        table, programs = (made.places, made.hints, made.shift), made.programs
        device = batch.device
        arguments = {n: None if p is None else _addresses(p, device) for n, p in places.items()}
        numbers = {
            name: _distances(tuple(value), device)
            for name, value in own.items()
            if isinstance(value, list)
        }
    if not programs:
        return
    with torch.cuda.device_of(batch.tensors[0]):
        kernel[(programs,)](
            **arguments,
            **dict(zip(("places", "hints", "shift"), table, strict=True)),
            numel=numel,
            offset=offset,
            number=_int32(number),
            **{**own, **numbers},
            TABLE=not alone,
            VECTORS=not any(at % 16 for p in places.values() if p is not None for at in p),
            BACKEND=backend,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS[backend],
            enable_fp_fusion=False,
        )
