"""Adam on the GPU: Triton, one read and one write of theta and of the stored moments.

Launches are as in noise's `gpu`: one for a batch, without fused multiply-adds or autotuning. A
program handles whole blocks of codes.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoopt.kernels.adam.gpu_average import average_kernel
from zoopt.kernels.adam.gpu_kernels import moments_kernel
from zoopt.kernels.adam.gpu_moments import EVEN_ELEMENTS
from zoopt.kernels.adam.moments import BLOCK as CODE_BLOCK
from zoopt.kernels.adam.moments import Moment, Moments
from zoopt.kernels.adam.reference import Average, Mode, Numbers
from zoopt.kernels.batch import Batch, addresses
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.gpu import _TYPES, _addresses, _int32, _table, backend_name, on_device
from zoopt.kernels.places import Kept

#: An operation takes a whole batch.
BATCHES = True
#: Elements that are in registers at a time, and blocks of them that a program does one after the
#: other: it finds its tensor once.
BLOCK, BLOCKS = 1024, 8
#: Eight elements a thread: 128 bits of 16-bit numbers, 64 of int8 codes, 32 of int4 codes.
NUM_WARPS = {"cuda": 4, "hip": 2, "interpreter": 1}
#: Left to itself, ptxas saves registers at the price of one or two instructions an element. With so
#: many, four programs fit on a multiprocessor, and hide the latency of memory from each other.
_REGISTERS: dict[str, dict[str, int]] = {"cuda": {"maxnreg": 128}}
#: Elements of a block of codes of any format.
_UNIT = max(CODE_BLOCK.values())
_CODES = {torch.int8: tl.int8, torch.uint8: tl.uint8}


def adam(
    batch: Batch,
    first: Sequence[Moment],
    second: Sequence[Moment],
    outs: Sequence[Tensor],
    norms: Tensor | None,
    numbers: Numbers,
    moment_draw: int | None,
) -> None:
    """See reference.adam."""
    own = (None, batch, batch.tensors, outs, first, second, 0.0, numbers, moment_draw, None)
    if norms is None:
        _moments(*own)
        return
    # Each group lies within one row, so only a few numbers a row are left to sum.
    group = math.gcd(batch.tensors[0].shape[1], _UNIT)
    sums = kept(torch.empty, 2, batch.numel // group, dtype=torch.float32, device=batch.device)
    counts = [tensor.numel() // group for tensor in batch.tensors]
    firsts = tuple(itertools.accumulate(counts[:-1], initial=0))
    groups = _addresses(firsts, batch.device) if len(batch) > 1 else None
    once(_moments, *own, group, (*sums, groups))
    torch.sum(sums.view(2, norms.shape[1], -1), -1, out=norms)


def adamw(
    batch: Batch,
    gradients: Sequence[Tensor],
    first: Sequence[Moment],
    second: Sequence[Moment],
    decay: float,
    numbers: Numbers,
    moment_draw: int | None,
    rounding_draw: int | None,
) -> None:
    """See reference.adamw."""
    _moments(
        *(batch.tensors, batch, gradients, None, first, second),
        *(decay, numbers, moment_draw, rounding_draw),
    )


def _moments(
    theta: Sequence[Tensor] | None,
    batch: Batch,
    gradients: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    first: Sequence[Moment],
    second: Sequence[Moment],
    decay: float,
    numbers: Numbers,
    moment_draw: int | None,
    rounding_draw: int | None,
    group: int = 0,
    sums: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> None:
    memories = {
        "theta": theta,
        "gradient": gradients,
        "out": outs,
        **_stored("first", first),
        **_stored("second", second),
    }
    written = outs if theta is None else theta
    assert written is not None
    _launch(
        moments_kernel,
        batch,
        memories,
        decay=decay,
        **numbers._asdict(),
        **dict(zip(("direction_sums", "gradient_sums", "groups"), sums, strict=True)),
        moment_draw=_int32(moment_draw or 0),
        rounding_draw=_int32(rounding_draw or 0),
        DTYPE=_TYPES[written[0].dtype],
        GRADIENT=_TYPES[gradients[0].dtype],
        **_formats(first[0], moment_draw),
        SECOND=_type(second[0]),
        STOCHASTIC=rounding_draw is not None,
        GROUP=group,
    )


def average(
    batch: Batch,
    moments: Sequence[Moment],
    outs: Sequence[Tensor],
    numbers: Average,
    mode: Mode,
    moment_draw: int | None,
) -> None:
    """See reference.average."""
    _launch(
        average_kernel,
        batch,
        {
            "gradient": None if mode == "load" else batch.tensors,
            "out": None if mode == "store" else outs,
            **_stored("", moments),
        },
        **numbers._asdict(),
        moment_draw=_int32(moment_draw or 0),
        DTYPE=_TYPES[outs[0].dtype],
        GRADIENT=_TYPES[batch.dtype],
        **_formats(moments[0], moment_draw),
        MODE=mode,
        SIGNED=moments[0].signed,
    )


def _stored(name: str, moments: Sequence[Moment]) -> dict[str, Sequence[Tensor] | None]:
    """The tensors of moments of one format, as a kernel's memories."""
    prefix = f"{name}_" if name else ""
    if isinstance(moments, Moments):
        return {f"{prefix}codes": moments.codes, f"{prefix}scale": moments.scales}
    scales = [moment.scale for moment in moments if moment.scale is not None]
    return {
        f"{prefix}codes": [moment.codes for moment in moments],
        f"{prefix}scale": scales or None,
    }


def _formats(moment: Moment, moment_draw: int | None) -> dict[str, Any]:
    return {
        "FIRST": _type(moment),
        "FORMAT": moment.format,
        "CODED": moment_draw is not None and moment.format != "float32",
    }


def _type(moment: Moment) -> Any:
    return {**_TYPES, **_CODES}[moment.codes.dtype]


def _launch(
    kernel: Any, batch: Batch, memories: Mapping[str, Sequence[Tensor] | None], **own: Any
) -> None:
    """Launch a kernel once on all tensors of a batch; `memories` are its other operands."""
    backend, key, alone = backend_name(), batch.key, len(batch) == 1
    rows, aligned, even = batch.made("rows", lambda: _rows(batch))
    given = [tensors for tensors in memories.values() if tensors is not None]
    vectors = all(_are_vectors(batch, tensors) for tensors in given)
    columns: list[Any]
    if alone:
        [(numel, offset, number)] = rows
        table: tuple[Any, ...] = (None, None, 0)
        programs = triton.cdiv(numel, BLOCKS * BLOCK)
        columns = [None if t is None else t[0] for t in memories.values()]
    else:
        numel = offset = number = 0
        # Blocks are aligned to those of codes, not to Philox's.
        made = batch.made(
            ("table", BLOCKS * BLOCK), lambda: _table(rows, BLOCKS * BLOCK, 1, batch.device)
        )
        table, programs = (made.places, made.hints, made.shift), made.programs
        columns = [None if t is None else on_device(batch, t) for t in memories.values()]
    if not programs:
        return
    with torch.cuda.device_of(batch.tensors[0]):
        kernel[(programs,)](
            *columns,
            *table,
            numel,
            offset,
            _int32(number),
            **own,
            k0=_int32(key.seed & 0xFFFFFFFF),
            k1=_int32(key.seed >> 32),
            TABLE=not alone,
            VECTORS=vectors,
            ALIGNED=aligned,
            EVEN=even,
            BACKEND=backend,
            BLOCKS=BLOCKS,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS[backend],
            enable_fp_fusion=False,
            **_REGISTERS.get(backend, {}),
        )


def _rows(batch: Batch) -> tuple[tuple[tuple[int, int, int], ...], bool, bool]:
    """Elements, offset and stream of each tensor; whether offsets are those of Philox blocks, and
    the numbers of elements even."""
    pairs = zip(batch.tensors, batch.keys, strict=True)
    rows = tuple([(tensor.numel(), key.offset, key.stream) for tensor, key in pairs])
    aligned = not any(offset % 8 for _, offset, _ in rows)
    return rows, aligned, not any(numel % EVEN_ELEMENTS for numel, *_ in rows)


def _are_vectors(batch: Batch, tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors begin at vectors of memory."""
    if isinstance(tensors, Kept):
        return tensors.once("vectors", lambda: not any(at % 16 for at in addresses(tensors)))
    return not any(place % 16 for place in batch.addresses_of(tensors))
