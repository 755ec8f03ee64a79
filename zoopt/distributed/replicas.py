"""Compares checksums of the weights, to verify that all ranks still train the same model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.distributed.exchange import Exchange
from zoopt.distributed.sharding import local, offset

#: How many elements are summed at a time; this many int64 numbers fit in a cache.
_CHUNK = 1 << 16
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """sum_i (2 i + 1) bits_i modulo 2^64, over the elements' bits in row-major order.

    It changes if one element changes, or if two different elements are swapped.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    odd = torch.arange(1, 2 * _CHUNK, 2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        # sum (2 (start + i) + 1) b_i = sum (2 i + 1) b_i + 2 start sum b_i
        total += (chunk * odd[: chunk.numel()]).sum() + chunk.sum() * (2 * start)
    return int(total)


def fingerprint(params: Iterable[tuple[str | int, Tensor]]) -> list[tuple[Any, ...]]:
    """For each parameter: name, dtype, shape, offset of the local part, and its checksum."""
    return [
        (name, str(param.dtype), tuple(param.shape), offset(param), checksum(local(param)))
        for name, param in params
    ]


def compare(
    exchange: Exchange,
    run: Sequence[tuple[str, Any]],
    params: Iterable[tuple[str | int, Tensor]],
) -> None:
    """Raise an error in all ranks unless all have the same run and the same weights.

    Every rank must call it. Each part of a sharded parameter is compared with its replicas.

    Args:
        run: the values that must be equal in all ranks, by name: step, hyperparameters.
        params: the parameters and their names.

    Raises:
        RuntimeError: the message names the first difference and the ranks.
    """
    ranks = exchange.gather((exchange.rank, list(run), fingerprint(params)))
    message = _hyperparameters([(rank, run) for rank, run, _ in ranks])
    message = message or _parameters([(rank, weights) for rank, _, weights in ranks])
    if message is not None:
        raise RuntimeError(message)


def _hyperparameters(rows: Sequence[tuple[int, list[tuple[str, Any]]]]) -> str | None:
    first_rank, first = rows[0]
    for rank, run in rows[1:]:
        for (name, value), (other_name, other) in zip(first, run, strict=False):
            if name != other_name or repr(value) != repr(other):
                return (
                    f"{name} must be the same in all ranks, or they drift apart, got {value!r} in "
                    f"rank {first_rank} and {other!r} in rank {rank}; make the optimizer, its "
                    f"scheduler and its checkpoints alike in all of them"
                )
        if len(run) != len(first):
            return f"all ranks must have the same param groups, ranks {first_rank} and {rank} not"
    return None


def _parameters(rows: Sequence[tuple[int, list[tuple[Any, ...]]]]) -> str | None:
    first_rank, first = rows[0]
    for rank, params in rows[1:]:
        for own, other in zip(first, params, strict=False):
            if own[:3] != other[:3]:
                return (
                    f"all ranks must train the same parameters, got {_shown(own)} in rank "
                    f"{first_rank} and {_shown(other)} in rank {rank}; build one model in all of "
                    f"them, and freeze the same of it"
                )
        if len(params) != len(first):
            return (
                f"all ranks must train the same parameters, got {len(first)} in rank "
                f"{first_rank} and {len(params)} in rank {rank}; build one model in all of them, "
                f"and freeze the same of it"
            )
    for number, (name, *_) in enumerate(first):
        sums: dict[int, tuple[int, int]] = {}
        for rank, params in rows:
            *_, place, total = params[number]
            known = sums.setdefault(place, (rank, total))
            if known[1] != total:
                return (
                    f"the weights must be the same in all ranks, got others for {name!r} in rank "
                    f"{rank} than in rank {known[0]}; load the same checkpoint in all of them, and "
                    f"let nobody but the optimizer write to the weights"
                )
    return None


def _shown(param: tuple[Any, ...]) -> str:
    name, dtype, shape, *_ = param
    return f"{name!r} ({dtype.removeprefix('torch.')} {shape})"
