"""Completes passes over the weights that were interrupted.

An exception can come before a kernel has written, or after it has written but before this is noted.
Removing a displacement twice, or never, would leave the weights off by a whole zo_eps z. A pass is
therefore noted before it begins. After an interruption, the values themselves show how far it came.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoopt.interrupts import uninterrupted
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.operands import contiguous

if TYPE_CHECKING:
    from zoopt.zeroth_order.engine.passes import Passes
    from zoopt.zeroth_order.engine.sites import Site

#: Bytes at the beginning of a piece by which it is known whether the piece has been written.
_SAMPLE_BYTES = 1 << 12


class Progress:
    """How far a pass over one parameter has come. The same pass, made again, continues from there.

    A pass consists of pieces, and one kernel writes a piece; changes of state that belong to it are
    held back until it has written.

    Args:
        passes: where kernels may be queued, to be made together with others.
        stage: those of a later stage are made after all of an earlier one.
    """

    def __init__(self, passes: Passes | None = None, stage: int = 0) -> None:
        self.passes = passes
        self.stage = stage
        self._done = 0
        self._mark: tuple[int, bytes] | None = None
        self._state: list[tuple[Tensor, Tensor]] = []
        self._dense: Tensor | None = None
        self._next: Progress | None = None

    @property
    def begun(self) -> bool:
        """Whether anything may have been written."""
        return self._done > 0 or self._mark is not None

    @property
    def done(self) -> bool:
        """Whether a pass that is one piece has been made."""
        return self._done > 0

    def finish(self) -> None:
        """The pass, one piece, has been made, whether or not it was begun here."""
        self._done, self._mark = 1, None

    @property
    def next(self) -> Progress:
        """The progress of a second pass, which follows this one."""
        if self._next is None:
            self._next = Progress(self.passes, self.stage + 1)
        return self._next

    def begin(self, number: int, piece: Tensor) -> bool:
        """Whether the piece is to be written; pieces are numbered from 0, in order."""
        if number < self._done:
            return False
        if self.passes is not None:
            self.passes.made_apart()
        if self._mark is not None:  # the pass broke off here
            return self._mark == _sample(piece)
        self._mark = _sample(piece)
        return True

    def hold(self, *state: tuple[Tensor, Tensor]) -> None:
        """Give state (first of a pair) its new values (second) once the piece is written.

        Values that are held already stay: the state that they were made of may have changed since.
        """
        self._state = self._state or list(state)

    def end(self, number: int) -> None:
        """The piece has been written."""
        if number < self._done:
            return
        for target, values in self._state:
            target.copy_(values)
        self._state = []
        self._done, self._mark = number + 1, None

    @contextlib.contextmanager
    def dense(self, param: Tensor) -> Iterator[Tensor]:
        """The parameter in row-major memory; what is written there is the parameter's on leaving.

        A copy, where it is not itself, outlives a pass that breaks off.
        """
        if self._dense is None:
            if param.is_contiguous():
                yield param.detach()
                return
            self._dense = param.detach().contiguous()
        yield self._dense
        param.detach().copy_(self._dense)

    @contextlib.contextmanager
    def indexed(
        self,
        param: Tensor,
        indices: Tensor,
        positions: Tensor | None = None,
        count: int | None = None,
    ) -> Iterator[Tensor]:
        """The elements at flat indices, in a copy; what is written there is the parameter's.

        Args:
            positions, count: the elements' positions in the copy, of which there are `count`; the
                others are 0, and what is written there is nobody's. Default: all, in order.
        """
        if self._dense is None:
            self._dense = param.detach().reshape(-1)[indices]
            if positions is not None:
                few = self._dense
                self._dense = few.new_zeros(count or 0)
                self._dense[positions] = few
        yield self._dense
        with contiguous(param) as dense:
            dense.view(-1)[indices] = self._dense if positions is None else self._dense[positions]


class BucketProgress:
    """How far a pass over the parameters of a bucket has come.

    Args:
        sites: the parameters.
        passes: as for `Progress`.

    Attributes:
        together: whether they are alike in it: then the first one's progress is that of all.
    """

    together = False

    def __init__(self, sites: Sequence[Site], passes: Passes | None = None) -> None:
        self._sites, self._passes = sites, passes
        self._own: dict[int, Progress] = {}

    def __getitem__(self, number: int) -> Progress:
        if number not in self._own:
            self._own[number] = Progress(self._passes)
        return self._own[number]

    def others(self) -> Iterator[tuple[Site, Progress]]:
        """All but the first, with their progress."""
        return ((site, self[number]) for number, site in enumerate(self._sites) if number)

    @property
    def begun(self) -> bool:
        """Whether anything may have been written."""
        return any(own.begun for own in self._own.values())

    def part(self) -> None:
        """From now on each parameter has its own progress, and has come as far as all had."""
        if not self.together:
            return
        self.together = False
        for _, own in self.others():
            first: Progress | None = self[0]
            while first is not None and first.done:
                own.finish()
                first, own = first._next, own.next

    def finish(self, run: Callable[[Site, Progress], None]) -> None:
        """Make what is left of a pass of one piece, without a queue."""
        self.part()
        self._passes = None
        for own in self._own.values():
            own.passes = None
        for number, site in enumerate(self._sites):
            run(site, self[number])


def _sample(piece: Tensor) -> tuple[int, bytes]:
    """What a write changes: autograd's count of writes, and, on the CPU, the first values."""
    values = b""
    if piece.is_cpu and not is_fake(piece) and piece.numel():
        values = ctypes.string_at(piece.data_ptr(), min(piece.nbytes, _SAMPLE_BYTES))
    return 0 if piece.is_inference() else piece._version, values


def count_write(*params: Tensor) -> None:
    """Let autograd see that parameters have been written: a graph that needs one as it was is
    refused a backward pass."""
    inference = map(Tensor.is_inference, params)
    torch.autograd.graph.increment_version(
        list(params) if not any(inference) else [p for p in params if not p.is_inference()]
    )


class Commit:
    """The changes of a step, as tasks in order. Once begun, they are completed.

    Args:
        tasks: each can be called again after an interruption or its end, and then only does what
            is left.

    Attributes:
        begun: whether a task has begun.
    """

    def __init__(self, tasks: Iterable[Callable[[], None]]) -> None:
        self._tasks = collections.deque(tasks)
        self.begun = False

    def run(self) -> None:
        """Do the remaining tasks. After an error, try once more, and then raise the error.

        Signals wait meanwhile. An error therefore comes from a task itself, for example from a lack
        of memory.
        """
        with uninterrupted():
            self.begun = True
            try:
                self._make()
            except BaseException:
                with contextlib.suppress(BaseException):
                    self._make()
                raise

    @property
    def finished(self) -> bool:
        """Whether all of it has been made."""
        return not self._tasks

    def _make(self) -> None:
        while self._tasks:
            self._tasks[0]()
            self._tasks.popleft()
