"""The operations on the GPU: Triton, one read and one write of theta, the noise in registers.

Launches pass enable_fp_fusion=False: a product is rounded before it is added, except in the
explicit fused multiply-adds of the noise. A program handles BLOCK elements that begin at a Philox
block, so that a thread's eight neighbouring elements come from one Philox call and are loaded and
stored 128 bits at a time. There is no autotuning: it would apply an update several times.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoopt.kernels.batch import Batch, addresses
from zoopt.kernels.dispatch import interpreting
from zoopt.kernels.noise.gpu_kernels import (
    momentum_kernel,
    numbers_kernel,
    rows_kernel,
    sum_kernel,
    window_kernel,
)
from zoopt.kernels.noise.gpu_rows import scaled_rows_kernel
from zoopt.kernels.noise.gpu_writes import writes_kernel
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.writes import Script
from zoopt.kernels.places import Kept

#: An operation takes a whole batch.
BATCHES = True
#: Elements a program without and with a mask, and its warps: 32 elements a thread spread the key
#: schedule's cost, and with a mask 16 are all that fit in registers.
BLOCK = {False: 4096, True: 2048}
NUM_WARPS = {"cuda": 4, "hip": 2, "interpreter": 1}
#: Left to itself, ptxas spills a few words to fit in so many registers or fewer, where it need not:
#: with a mask, and in these cases without one, by operation, distribution, dtype and whether it
#: rounds by random bits.
_MASKED = 128
_REGISTERS = {
    ("sum", "normal", torch.float32, False): 72,
    ("sum", "normal", torch.bfloat16, True): 72,
    ("writes", "normal", torch.float32, False): 128,
    ("scaled", "normal", torch.float16, True): 80,
    ("rows", "normal", torch.bfloat16, False): 72,
    ("rows", "normal", torch.float16, False): 72,
    ("rows", "rademacher", torch.bfloat16, False): 72,
}
#: Elements a program of the Adam kernel without and with a mask: all that fit in registers.
ADAM_BLOCK = {False: 2048, True: 1024}
#: Elements of one row that a program of the embedding kernel handles.
ROW_BLOCK = 1024
#: Blocks of 128 signs or 8 normals begin at multiples of this.
_ALIGNMENT = {"normal": 8, "rademacher": 128}
#: So many directions are unrolled, their numbers passed by value; those of more go to memory.
UNROLLED = 4
#: Numbers that one launch brings there.
_PAGE = (16, 64, 128)
#: A table's hints are as many at most: 64 KiB, whatever the model.
_MAX_HINTS = 1 << 14
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Table(NamedTuple):
    """Which program of a launch serves which tensor of a batch (see `gpu_blocks`)."""

    places: Tensor
    hints: Tensor
    shift: int
    programs: int


def _int32(word: int) -> int:
    """A 32-bit word as the int32 that Triton's argument has."""
    return word - (1 << 32) if word >= 1 << 31 else word


def backend_name() -> str:
    """What the kernels run on."""
    return "interpreter" if interpreting() else "hip" if torch.version.hip else "cuda"


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in the device's memory: the one place from which anything is copied there."""
    return torch.tensor(values, dtype=dtype).to(device)


def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses on the device, int64, for a launch on its current stream. Those of parts of one
    buffer are copied there once: another buffer of such parts is so many bytes further on."""
    stream = _stream(device)
    return (
        _shifted(addresses, device) if stream is None else _addresses_on(stream, addresses, device)
    )


def _stream(device: torch.device) -> int | None:
    """The stream whose addresses a launch reads; None if they cannot be kept.

    They are computed on the current stream, so each stream has its own: another one could read them
    too early. What a CUDA graph captures is computed by its replays, and is of no use outside.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    if interpreting():
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream


@functools.lru_cache(maxsize=1024)
def _addresses_on(stream: int, addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return _shifted(addresses, device)


def _shifted(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    base = addresses[0]
    return _distances(tuple([address - base for address in addresses]), device) + base


@functools.lru_cache(maxsize=1024)
def _distances(distances: tuple[int, ...], device: torch.device) -> Tensor:
    """Distances or lengths on the device, int64."""
    return to_device(distances, torch.int64, device)


@functools.lru_cache(maxsize=1024)
def _table(
    rows: tuple[tuple[int, int, int], ...], block: int, alignment: int, device: torch.device
) -> Table:
    """The table of tensors of (elements, offset, stream); the same ones are copied there once."""
    counts = [
        triton.cdiv(numel + offset % alignment, block) if numel else 0 for numel, offset, _ in rows
    ]
    return table_of(
        counts, [(numel, offset, _int32(number)) for numel, offset, number in rows], device
    )


def table_of(counts: Sequence[int], rows: Sequence[tuple[int, ...]], device: torch.device) -> Table:
    """The table of tensors that so many programs serve each, and what else a kernel is to know of
    them."""
    first = [0, *itertools.accumulate(counts)]
    programs = first[-1]
    places = [(begin, *row) for begin, row in zip(first, rows, strict=False)]
    places.append((programs, *[0] * len(rows[0])))
    shift = max(0, (max(programs - 1, 0) // _MAX_HINTS).bit_length())
    hints, tensor = [], 0
    for program in range(0, programs, 1 << shift):
        while first[tensor + 1] <= program:
            tensor += 1
        hints.append(tensor)
    return Table(
        to_device(places, torch.int64, device),
        to_device(hints, torch.int32, device),
        shift,
        programs,
    )


def place_of(batch: Batch, blocks: Mapping[bool, int]) -> tuple[dict[str, Any], int]:
    """Where a batch's blocks lie, as a kernel's arguments, and how many there are."""
    alignment = _ALIGNMENT[batch.key.distribution]
    block = blocks[batch.key.threshold is not None]
    if len(batch) == 1:
        [numel], [key] = batch.counts, batch.keys
        place: dict[str, Any] = {
            "places": None,
            "hints": None,
            "shift": 0,
            "numel": numel,
            "offset": key.offset,
            "number": _int32(key.stream),
        }
        return place, triton.cdiv(numel + key.offset % alignment, block) if numel else 0

    def made() -> tuple[dict[str, Any], int]:
        rows = zip(batch.counts, batch.keys, strict=True)
        found = tuple([(numel, key.offset, key.stream) for numel, key in rows])
        table = _table(found, block, alignment, batch.device)
        place = {"places": table.places, "hints": table.hints, "shift": table.shift}
        return {**place, "numel": 0, "offset": 0, "number": 0}, table.programs

    return batch.made(("place", block, alignment), made)


def on_device(batch: Batch, tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of the batch's own tensors, or of contiguous ones beside them, as `_addresses`;
    looked up once while they stay where they are."""
    stream = _stream(batch.device)
    own = tensors is batch.tensors
    if stream is None or not (own or isinstance(tensors, Kept)):
        return _addresses(batch.addresses if own else addresses(tensors), batch.device)
    name = ("on device", stream)
    if not isinstance(tensors, Kept):
        return batch.made(name, lambda: _addresses(batch.addresses, batch.device), placed=True)
    return tensors.once(name, lambda: _addresses(addresses(tensors), batch.device))


def launch(
    kernel: Any,
    batch: Batch,
    memories: Mapping[str, Sequence[Tensor] | None],
    blocks: Mapping[bool, int],
    operation: str = "",
    /,
    **own: Any,
) -> None:
    """Launch a kernel once on all tensors of a batch; `memories` are its theta, out and so on, and
    `operation` is its name in `_REGISTERS`, if it has one."""
    key, backend = batch.key, backend_name()
    alignment, alone = _ALIGNMENT[key.distribution], len(batch) == 1
    place, programs = place_of(batch, blocks)
    if not programs:
        return
    arguments: dict[str, Any] = {}
    for name, tensors in {**memories, "indices": batch.indices}.items():
        if tensors is None or alone:
            arguments[name] = None if tensors is None else tensors[0]
        else:
            arguments[name] = on_device(batch, tensors)
    aligned = batch.made(
        ("aligned", alignment), lambda: not any(own.offset % alignment for own in batch.keys)
    )
    with torch.cuda.device_of(batch.tensors[0]):
        kernel[(programs,)](
            **arguments,
            **place,
            **own,
            k0=_int32(key.seed & 0xFFFFFFFF),
            k1=_int32(key.seed >> 32),
            threshold=key.threshold or 0,
            DTYPE=_TYPES[batch.dtype],
            NORMAL=key.distribution == "normal",
            MASKED=key.threshold is not None,
            TABLE=not alone,
            INDEXED=batch.indices is not None,
            ALIGNED=aligned,
            BACKEND=backend,
            BLOCK=blocks[key.threshold is not None],
            num_warps=NUM_WARPS[backend],
            enable_fp_fusion=False,
            **_limit(batch, operation, bool(own.get("STOCHASTIC"))),
        )


def _limit(batch: Batch, operation: str, stochastic: bool) -> dict[str, int]:
    """The option that limits a launch's registers; none where that is left to the compiler."""
    if backend_name() != "cuda":
        return {}
    registers: int | None = _MASKED
    if batch.key.threshold is None:
        own = (operation, batch.key.distribution, batch.dtype, stochastic)
        registers = _REGISTERS.get(own)
    return {} if registers is None else {"maxnreg": registers}


def _numbers(draws: Sequence[int], *columns: Sequence[float]) -> tuple[float, ...]:
    """Each direction's numbers in a row: its draw's two halves, and one of each column."""
    return tuple(
        float(number)
        for draw, *row in zip(draws, *columns, strict=True)
        for number in (draw >> 16, draw & 0xFFFF, *row)
    )


def _in_memory(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as float32 in the device's memory. Launches pass them by value and write them there,
    so there is no copy from the host and no wait."""
    page = next((size for size in _PAGE if size >= len(numbers)), _PAGE[-1])
    count = triton.cdiv(len(numbers), page)
    out = torch.empty(count, page, dtype=torch.float32, device=device)
    padded = [*numbers, *[0.0] * (count * page - len(numbers))]
    for i in range(count):
        own = tuple(padded[i * page : (i + 1) * page])
        numbers_kernel[(1,)](out[i], own, COUNT=page, num_warps=1)
    return out


def terms_of(batch: Batch, draws: Sequence[int], *columns: Sequence[float]) -> dict[str, Any]:
    """Directions as a kernel's arguments: a few by value, more in memory."""
    numbers = _numbers(draws, *columns)
    if not draws:
        return {"terms": None, "UNROLLED": 0, "count": 0}
    if len(draws) <= UNROLLED:
        return {"terms": numbers, "UNROLLED": len(draws), "count": 0}
    with torch.cuda.device_of(batch.tensors[0]):
        terms = _in_memory(numbers, batch.device)
    return {"terms": terms, "UNROLLED": 0, "count": len(draws)}


def rounds(rounding_draw: int | None) -> dict[str, Any]:
    """How theta is rounded, as a kernel's arguments."""
    return {
        "rounding_draw": _int32(rounding_draw or 0),
        "STOCHASTIC": rounding_draw is not None,
    }


def weighted_sum(
    batch: Batch,
    outs: Sequence[Tensor],
    addends: Sequence[Tensor] | None,
    coefficients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    rounding_draw: int | None,
) -> None:
    """See reference.weighted_sum."""
    memories = {"theta": batch.tensors, "out": outs, "addend": addends}
    options = {**terms_of(batch, draws, coefficients), **rounds(rounding_draw)}
    # A batch's kernel needs less than a single tensor's, whose addresses are not looked up.
    usual = len(draws) == 1 and len(batch) > 1 and addends is None
    numbers = {"decay": decay, "DECAYS": decay != 1.0}
    name = "sum" if usual else ""
    launch(sum_kernel, batch, memories, BLOCK, name, **numbers, **options)


def scaled_rows(
    batch: Batch,
    outs: Sequence[Tensor],
    scales: Sequence[Tensor],
    alpha: float,
    draw: int,
) -> None:
    """See reference.scaled_rows."""
    lengths = [
        numel // max(1, own.numel()) for numel, own in zip(batch.counts, scales, strict=True)
    ]
    columns = lengths[0] if len(batch) == 1 else _distances(tuple(lengths), batch.device)
    memories = {"theta": batch.tensors, "out": outs, "scales": scales}
    even = not any(length % 8 for length in lengths)
    even = even and not any(key.offset % 8 for key in batch.keys)
    numbers = {"columns": columns, "alpha": alpha, "draw": _int32(draw), "EVEN": even}
    launch(scaled_rows_kernel, batch, memories, BLOCK, "rows", **numbers)


def momentum_sum(
    batch: Batch,
    buffers: Sequence[Tensor],
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    momentum: float,
    step_size: float,
    rounding_draw: int | None,
) -> None:
    """See reference.momentum_sum."""
    memories = {"theta": batch.tensors, "buffer": buffers}
    options = {**terms_of(batch, draws, coefficients, gradients), **rounds(rounding_draw)}
    numbers = {"decay": decay, "momentum": momentum, "step_size": step_size}
    blocks = BLOCK
    if batch.dtype == torch.float16 and rounding_draw is not None:
        blocks = {**BLOCK, False: 2048}  # All that fit in registers.
    launch(momentum_kernel, batch, memories, blocks, **numbers, **options)


def adam_window(
    batch: Batch,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    closes: Sequence[bool],
    draws: Sequence[int],
    decay: float,
    step_size: float,
    eps: float,
    rounding_draw: int | None,
) -> None:
    """See reference.adam_window."""
    columns = (coefficients, gradients, first, second, closes)
    with torch.cuda.device_of(batch.tensors[0]):
        terms = _in_memory(_numbers(draws, *columns), batch.device)
    numbers = {"count": len(draws), "decay": decay, "step_size": step_size, "eps": eps}
    memories = {"theta": batch.tensors}
    launch(
        window_kernel, batch, memories, ADAM_BLOCK, terms=terms, **numbers, **rounds(rounding_draw)
    )


def write_each(batch: Batch, buffers: None, script: Script) -> None:
    """See reference.write_each; there are no buffers."""
    with torch.cuda.device_of(batch.tensors[0]):
        terms = _in_memory(script.numbers, batch.device)
    blocks = ADAM_BLOCK if script.estimates else BLOCK
    numbers = {"terms": terms, "count": len(script.writes), "ESTIMATES": script.estimates}
    name = "" if script.estimates else "writes"
    launch(writes_kernel, batch, {"theta": batch.tensors}, blocks, name, **numbers)


def gather_rows(
    weight: Tensor, rows: Tensor, out: Tensor, alpha: float, key: NoiseKey, draw: int
) -> None:
    """See reference.gather_rows."""
    d, backend, alignment = weight.shape[1], backend_name(), _ALIGNMENT[key.distribution]
    aligned = not (d % alignment or key.offset % alignment)
    blocks = triton.cdiv(d if aligned else d + alignment - 1, ROW_BLOCK)
    with torch.cuda.device_of(weight):
        rows_kernel[(rows.numel(), blocks)](
            weight,
            rows,
            out,
            alpha,
            d,
            key.offset,
            _int32(key.stream),
            _int32(draw),
            _int32(key.seed & 0xFFFFFFFF),
            _int32(key.seed >> 32),
            key.threshold or 0,
            NORMAL=key.distribution == "normal",
            MASKED=key.threshold is not None,
            ALIGNED=aligned,
            BACKEND=backend,
            BLOCK=ROW_BLOCK,
            num_warps=NUM_WARPS[backend],
            enable_fp_fusion=False,
        )
