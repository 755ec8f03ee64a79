"""Operations on whole batches on the GPU: low-rank products are added in one launch for each rank,
and scaling is one launch."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from zoopt.kernels.batch import Batch, addresses
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
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for i, (matrix, a, b) in enumerate(zip(batch.tensors, left, right, strict=True)):
        if matrix.numel():
            # With a single row or column both b and its transpose are contiguous.
            kind = (a.shape[0], a.shape[2], not b.is_contiguous())
            alike.setdefault(kind, []).append(i)
    backend, matrices = backend_name(), batch.addresses
    for (count, rank, transposed), places in alike.items():
        own = [batch.tensors[i] for i in places]
        keys = [batch.keys[i] for i in places]
        rows = tuple(
            [
                (matrix.shape[0], matrix.shape[1], key.offset, key.stream)
                for matrix, key in zip(own, keys, strict=True)
            ]
        )
        table = _tiles(rows, batch.device)
        memories = (
            tuple([matrices[i] for i in places]),
            addresses([left[i] for i in places]),
            addresses([right[i].mT if transposed else right[i] for i in places]),
        )
        vectors = not any(at % 16 for at in memories[0]) and not any(n % 8 for _, n, *_ in rows)
        with torch.cuda.device_of(own[0]):
            products_kernel[(table.programs,)](
                *(_addresses(each, batch.device) for each in memories),
                table.places,
                table.hints,
                table.shift,
                decay,
                count,
                _int32(rounding_draw or 0),
                _int32(batch.key.seed & 0xFFFFFFFF),
                _int32(batch.key.seed >> 32),
                DTYPE=_TYPES[batch.dtype],
                RANK=rank,
                TRANSPOSED=transposed,
                STOCHASTIC=rounding_draw is not None,
                VECTORS=vectors,
                ALIGNED=not any((offset | n) % 8 for _, n, offset, _ in rows),
                BACKEND=backend,
                ROWS=TILE[0],
                COLUMNS=TILE[1],
                K=K,
                num_warps=NUM_WARPS[backend],
                enable_fp_fusion=False,
            )


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
