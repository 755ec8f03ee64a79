"""Operations on whole batches on the GPU: low-rank products are added in one launch for each rank,
and scaling is one launch."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from zoopt.kernels.batch import Batch, addresses, name_of
from zoopt.kernels.noise.gpu import (
    _TYPES,
    BLOCK,
    Table,
    _addresses,
    _int32,
    backend_name,
    launch,
    table_of,
)
from zoopt.kernels.product.gpu_kernels_batch import products_kernel
from zoopt.kernels.product.gpu_kernels_scale import scale_kernel

#: Rows and columns of a program's tile, and how many columns of a factor it reads at a time.
TILE, K = (64, 64), 16
NUM_WARPS = {"cuda": 8, "hip": 8, "interpreter": 1}


def add_products(
    batch: Batch,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    decay: float,
    rounding_draw: int | None,
) -> None:
    """See op_batch.add_products_."""
    backend, names = backend_name(), (name_of(left), name_of(right))
    if None in names:
        groups = _groups(batch, left, right)
    else:
        groups = batch.made(("products", *names), lambda: _groups(batch, left, right))
    matrices, lefts, rights = batch.addresses, addresses(left), addresses(right)
    for group in groups:
        own = tuple([matrices[i] for i in group.places])
        with torch.cuda.device_of(batch.tensors[0]):
            products_kernel[(group.table.programs,)](
                _addresses(own, batch.device),
                _addresses(tuple([lefts[i] for i in group.places]), batch.device),
                _addresses(tuple([rights[i] for i in group.places]), batch.device),
                group.table.places,
                group.table.hints,
                group.table.shift,
                decay,
                group.terms,
                _int32(rounding_draw or 0),
                _int32(batch.key.seed & 0xFFFFFFFF),
                _int32(batch.key.seed >> 32),
                DTYPE=_TYPES[batch.dtype],
                RANK=group.rank,
                TRANSPOSED=group.transposed,
                STOCHASTIC=rounding_draw is not None,
                VECTORS=group.vectors and not any(at % 16 for at in own),
                ALIGNED=group.aligned,
                BACKEND=backend,
                ROWS=TILE[0],
                COLUMNS=TILE[1],
                K=K,
                num_warps=NUM_WARPS[backend],
                enable_fp_fusion=False,
            )


class _Group(NamedTuple):
    """Matrices of a launch: which of a batch, and what is the same of all of them.

    Attributes:
        terms, rank, transposed: D and r of their factors, and whether the right ones are.
        vectors: whether their rows are whole vectors of memory.
        aligned: whether these begin where those of the noise do.
    """

    places: list[int]
    terms: int
    rank: int
    transposed: bool
    table: Table
    vectors: bool
    aligned: bool


def _groups(batch: Batch, left: Sequence[Tensor], right: Sequence[Tensor]) -> list[_Group]:
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for i, (matrix, a, b) in enumerate(zip(batch.tensors, left, right, strict=True)):
        if matrix.numel():
            # With a single row or column both b and its transpose are contiguous.
            kind = (a.shape[0], a.shape[2], not b.is_contiguous())
            alike.setdefault(kind, []).append(i)
    groups = []
    for kind, places in alike.items():
        own = [(batch.tensors[i].shape, batch.keys[i]) for i in places]
        rows = tuple([(*shape, key.offset, key.stream) for shape, key in own])
        vectors = not any(n % 8 for _, n, *_ in rows)
        aligned = not any((offset | n) % 8 for _, n, offset, _ in rows)
        groups.append(_Group(places, *kind, _tiles(rows, batch.device), vectors, aligned))
    return groups


@functools.lru_cache(maxsize=256)
def _tiles(rows: tuple[tuple[int, int, int, int], ...], device: torch.device) -> Table:
    """Make the table of matrices (m, n, offset, stream): first tile, m, n, offset, stream."""
    counts = [triton.cdiv(m, TILE[0]) * triton.cdiv(n, TILE[1]) for m, n, *_ in rows]
    places = [(m, n, offset, _int32(number)) for m, n, offset, number in rows]
    return table_of(counts, places, device)


def scale(batch: Batch, factors: Tensor) -> None:
    """See op_scale.scale_."""
    memories = {"theta": batch.tensors}
    launch(scale_kernel, batch, memories, BLOCK, factors=factors, EACH=len(factors) > 1)
