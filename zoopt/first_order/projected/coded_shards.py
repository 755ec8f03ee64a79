"""Coded moments of a parameter that is sharded: each process updates whole blocks of codes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from zoopt.distributed.spans import block_spans, entry_spans, place_of, rearranged, row_spans
from zoopt.kernels.journal import kept, once

State = dict[str, Tensor]


class Cut(NamedTuple):
    """A process's part of flat tensors, from the beginning of a block of codes to the end of one.

    Attributes:
        reads, writes: its elements of the tensors that `whole_blocks` was called with.
        state: the state, with its codes and scales.
        first: the position of its first element in the whole tensor.
    """

    reads: list[Tensor]
    writes: list[Tensor]
    state: State
    first: int


@contextlib.contextmanager
def whole_blocks(
    param: Tensor,
    shape: tuple[int, ...],
    state: State,
    units: Mapping[str, int],
    *,
    reads: Sequence[Tensor] = (),
    writes: Sequence[Tensor] = (),
) -> Iterator[Cut]:
    """Cut tensors and their coded moments between blocks instead of rows; what has been written
    goes back on leaving. Where borders of rows are borders of blocks, nothing moves.

    Args:
        param: the sharded parameter.
        shape: of the whole tensor that has the moments; it has the parameter's rows.
        state: this process's part of it, each entry sharded along its first dimension.
        units: from `coded_units`.
        reads, writes: this process's rows of tensors of that shape, contiguous.
    """
    place = place_of(param)
    rows = row_spans(shape[0], math.prod(shape[1:]), place.size)
    cut = block_spans(rows, max(units.values()))
    numel, values = rows[-1][1], [tensor.reshape(-1) for tensor in (*reads, *writes)]
    have, want = [rows] * len(values), [cut] * len(values)
    for name, unit in units.items():
        entries = state[name]
        values.append(entries.view(-1))
        # Codes of 8 bits have the tensor's shape; the others are flat.
        flat = row_spans(-(-numel // unit), 1, place.size)
        have.append(rows if unit == 1 else flat)
        want.append(entry_spans(cut, unit))
    moved = kept(rearranged, values, have, want, place)
    between = len(reads) + len(writes)
    coded = dict(zip(units, moved[between:], strict=True))
    yield Cut(
        moved[: len(reads)], moved[len(reads) : between], {**state, **coded}, cut[place.rank][0]
    )
    back = kept(rearranged, moved[len(reads) :], want[len(reads) :], have[len(reads) :], place)
    for i, after in enumerate(back, len(reads)):
        if have[i] != want[i]:
            once(values[i].copy_, after)
