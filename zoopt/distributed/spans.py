"""How flat tensors are divided over processes, and the exchange between two divisions.

A tensor that is sharded along its first dimension is divided between rows. Codes share a scale in
blocks of elements, which do not end where rows do. For a step each process takes whole blocks, and
the few elements beside a border move to the process that has the rest of their block.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoopt.distributed.sharding import shard_dimensions
from zoopt.kernels.journal import kept, once

#: The first element of each process, and the one after its last.
Spans = tuple[tuple[int, int], ...]


class Place(NamedTuple):
    """The processes over which a parameter is sharded, how many they are, and which this one is."""

    group: Any
    size: int
    rank: int


def place_of(param: Tensor) -> Place:
    """The place of this process among those that have parts of a sharded parameter."""
    mesh = param.device_mesh  # type: ignore[attr-defined]
    dimensions = shard_dimensions(param)
    if not dimensions:
        return Place(None, 1, 0)
    [dimension] = dimensions
    coordinate = mesh.get_coordinate()
    return Place(mesh.get_group(dimension), mesh.size(dimension), coordinate[dimension])


@functools.cache
def row_spans(rows: int, width: int, processes: int) -> Spans:
    """Of a tensor of rows of `width` elements, sharded along its first dimension: each process but
    the last ones has ceil(rows / processes) rows."""
    size = -(-rows // processes)
    starts = [min(number * size, rows) * width for number in range(processes + 1)]
    return tuple(itertools.pairwise(starts))


@functools.cache
def block_spans(spans: Spans, block: int) -> Spans:
    """The spans with each border moved to the end of the block it is in.

    A block of a single element, which can only be the last one, stays with the one before it.
    """
    numel = spans[-1][1]

    def moved(border: int) -> int:
        end = min(-(-border // block) * block, numel)
        return numel if numel - end == 1 else end

    # The first span starts at 0 also where that is in the last block.
    starts = [0, *(moved(stop) for _, stop in spans[:-1]), numel]
    return tuple(itertools.pairwise(starts))


@functools.cache
def entry_spans(spans: Spans, unit: int) -> Spans:
    """The spans of a tensor that has an entry for each `unit` elements."""
    return tuple((-(-start // unit), -(-stop // unit)) for start, stop in spans)


def rearranged(
    tensors: Sequence[Tensor], have: Sequence[Spans], want: Sequence[Spans], place: Place
) -> list[Tensor]:
    """This process's parts of flat tensors that are divided in one way, as another way divides
    them. What both divide alike is returned as it is.

    All processes of the place call it together.

    Args:
        tensors: flat and contiguous.
        have, want: how each is divided, and how it is to be. The latter may overlap.
    """
    me = place.rank
    changed = [i for i in range(len(tensors)) if have[i] != want[i]]
    result = list(tensors)
    if not changed:
        return result
    for i in changed:
        start, stop = want[i][me]
        result[i] = tensors[i].new_empty(stop - start)
    sent: list[Tensor] = []
    given, taken = [0] * place.size, [0] * place.size
    for peer in range(place.size):
        for i in changed:
            piece = _bytes(tensors[i], have[i][me], want[i][peer])
            if peer == me:
                _bytes(result[i], want[i][me], have[i][me]).copy_(piece)
                continue
            sent.append(piece)
            given[peer] += piece.numel()
            taken[peer] += _bytes(result[i], want[i][me], have[i][peer]).numel()
    received = kept(torch.empty, sum(taken), dtype=torch.uint8, device=tensors[0].device)
    outgoing = torch.cat(sent) if sent else received.new_empty(0)
    once(torch.distributed.all_to_all_single, received, outgoing, taken, given, group=place.group)
    start = 0
    for peer in range(place.size):
        for i in changed if peer != me else ():
            piece = _bytes(result[i], want[i][me], have[i][peer])
            piece.copy_(received[start : start + piece.numel()])
            start += piece.numel()
    return result


def _bytes(part: Tensor, span: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """The bytes of the elements of `wanted`, of a part that has those of `span`: a view of them."""
    start, stop = max(span[0], wanted[0]), min(span[1], wanted[1])
    if start >= stop:
        return part.new_empty(0, dtype=torch.uint8)
    return part[start - span[0] : stop - span[0]].view(torch.uint8)
