"""Records a run while it proceeds: the closure's results and the changes between steps."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zoopt.checks import check_number
from zoopt.distributed.sharding import is_sharded
from zoopt.groups import all_params
from zoopt.parameters import named_params
from zoopt.trajectory.files import locked, sync, sync_folder
from zoopt.trajectory.format import (
    STEPS,
    TRAINED,
    Event,
    Kind,
    TrajectoryError,
    encode,
    encode_header,
    read,
)
from zoopt.trajectory.header import describe, fingerprint, names_of
from zoopt.trajectory.watch import Buffers, Watch
from zoopt.warn import warn
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.closure import Closure, loss_value


class Recorder:
    """Writes a record for each step of an optimizer.

    Args:
        optimizer: one whose steps depend only on the losses.
        path, file: the file, open and locked; None if another rank writes it.
        chain: the checksum of the previous record, from which the next one continues.
        sync_every: seconds between syncs of the file to disk; 0: sync at each step.
        model: the one whose weights are trained, if it is known.

    Attributes:
        path, sync_every: as given.
    """

    def __init__(
        self,
        optimizer: ZerothOrderOptimizer,
        path: Path,
        file: int | None,
        chain: int,
        sync_every: float,
        model: Any = None,
    ) -> None:
        self.path, self.sync_every = path, sync_every
        self._optimizer = optimizer
        self._file, self._process = file, os.getpid()
        self._size = 0 if file is None else os.fstat(file).st_size
        self._chain, self._synced = chain, time.monotonic()
        #: Where the file is synced, and the last time that it was.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="zoopt-sync")
        self._syncing: Future[None] | None = None
        #: The closure's results since the last record, and the number of calls.
        self._losses: list[Any] = []
        self._calls, self._together = 0, False
        #: Whether these losses were measured elsewhere and passed to `told`.
        self._told = False
        #: Events that are not yet written to disk, or not yet synced; whether the first of them
        #: is written; and why recording has ended.
        self._owed: deque[Event] = deque()
        self._written = False
        self._ended: str | None = None
        self._last_rates = self._rates()
        self._watch, self._buffers = Watch(optimizer, path), Buffers(model)
        #: Whether the weights are those after the last step in the file.
        self._at_step = True

    @classmethod
    def new(
        cls,
        optimizer: ZerothOrderOptimizer,
        model: Any,
        path: str | Path,
        *,
        sync_every: float = 1.0,
        writes: bool = True,
    ) -> Recorder:
        """Start a new file.

        Args:
            writes: whether this process writes it; all that hold parts of sharded parameters must
                call this, for the hash.

        Raises:
            ValueError: the optimizer has already taken a step, cannot be recorded, or trains
                parameters that the model does not have.
            FileExistsError: the file exists.
            OSError: it cannot be written. There is then none.
        """
        check_number("sync_every", sync_every, low=0.0)
        refuse_unrecordable(optimizer)
        path = Path(path)
        if not writes and not any(map(is_sharded, all_params(optimizer.param_groups))):
            return cls(optimizer, path, None, 0, float(sync_every))
        header = encode_header(describe(optimizer, names_of(optimizer, model)))
        if not writes:
            return cls(optimizer, path, None, 0, float(sync_every))
        try:
            file = locked(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError as error:
            raise FileExistsError(
                error.errno,
                "a recording must begin in a new file, got one that exists; call "
                "zoopt.trajectory.resume to go on with it, or record to another",
                str(path),
            ) from None
        chain = int.from_bytes(header[-4:], "little")
        recorder = cls(optimizer, path, file, chain, float(sync_every), model)
        try:
            recorder._write(header)
            recorder.flush()
            sync_folder(path)
        except BaseException:
            os.close(file)
            path.unlink()
            raise
        return recorder

    @classmethod
    def going_on(
        cls,
        optimizer: ZerothOrderOptimizer,
        path: Path,
        file: int,
        *,
        until: int | None = None,
        sync_every: float = 1.0,
        model: Any = None,
    ) -> Recorder:
        """Continue a file whose steps the optimizer has taken: all of them, or those to `until`.

        Everything after the last of these steps is removed: later steps, an incomplete record, or
        probes that no step has used. The optimizer has not seen these.

        Args:
            file: `path`, open and locked.

        Raises:
            TrajectoryError: the optimizer has taken a different number of steps.
        """
        contents = read(path)
        taken = optimizer.param_groups[0]["step"]
        steps = contents.steps if until is None else min(until, contents.steps)
        if steps != taken:
            raise TrajectoryError(
                f"the optimizer must have taken the first {steps} steps of {path}, got {taken}; "
                f"let zoopt.replay take them"
            )
        end, chain = contents.step_ends[steps]
        os.ftruncate(file, end)
        return cls(optimizer, path, file, chain, float(sync_every), model)

    def listen(self, closure: Closure) -> Closure:
        """Wrap the closure so that its results are kept for the record."""
        self._losses, self._calls, self._together, self._told = [], 0, False, False

        def heard() -> Any:
            self._calls += 1
            result = closure()
            self._losses.append(result)
            return result

        return heard

    def listen_together(self) -> Callable[[Sequence[float]], None]:
        """Return a function that receives the losses on which several ranks have agreed."""
        self._losses, self._calls, self._together, self._told = [], 0, True, False

        def heard(losses: Sequence[float]) -> None:
            self._losses += losses
            self._calls += len(losses)

        return heard

    def told(self, losses: Sequence[float]) -> None:
        """Keep losses that were measured elsewhere, for the record of the next step."""
        self._losses, self._told = list(losses), True

    def stepped(self, closure: bool) -> None:
        """Record a step: with a closure, with losses measured elsewhere, or from pending probes."""
        self._wrote(Kind.STEP if closure else Kind.TOLD if self._told else Kind.APPLY)
        self._warn_of_buffers()

    def probed(self) -> None:
        """Record a probe."""
        self._wrote(Kind.PROBE)

    def dropped(self) -> None:
        """Record that pending probes were dropped."""
        self._owe(Kind.DROP)
        self._finish_owed()

    def failed(self, moved: bool) -> None:
        """Record evaluations that an error interrupted.

        Args:
            moved: whether parameters were perturbed in place. They have been restored up to
                rounding, and a replay has to repeat that rounding.
        """
        if not moved or not (self._calls or self._together):
            return
        if self._together or self._calls == len(self._losses):
            self._ended = (
                "an error came in the middle of passes over the weights, which cannot be repeated "
                "to the bit; it holds the run up to there"
            )
            return
        self._wrote(Kind.FAILED)

    def _wrote(self, kind: Kind) -> None:
        # After an error the optimizer calls again, and the event is owed already.
        if not self._owed:
            self._owe(kind)
        self._finish_owed()

    def _owe(self, kind: Kind) -> None:
        """Note an event to be written."""
        heard = kind in (Kind.STEP, Kind.PROBE, Kind.FAILED, Kind.TOLD)
        losses = tuple(loss_value(loss) for loss in self._losses) if heard else ()
        rates = self._rates()
        changed = () if rates == self._last_rates else rates
        self._owed.append(Event(kind, losses, changed))
        self._losses, self._calls, self._told = [], 0, False
        self._last_rates = rates
        self._at_step = kind in STEPS or (self._at_step and kind is Kind.DROP)
        if kind is not Kind.DROP:  # It changes nothing, and others may have since the last note.
            self._watch.note()

    def _finish_owed(self) -> None:
        """Write the events that are owed, in order, each of them once."""
        while self._owed:
            if not self._written:
                self._append(self._owed[0])
                self._written = True
            self._sync()
            self._owed.popleft()
            self._written = False

    def before(self) -> None:
        """Record the changes since the last step, before the next one uses them.

        Raises:
            TrajectoryError: something other than the optimizer wrote to the weights or to its
                state, groups were added, or the recording has ended.
            OSError: an earlier event that could not be written still cannot be.
        """
        self._check_file()
        if self._ended is not None:
            raise TrajectoryError(f"the recording to {self.path} has ended: {self._ended}")
        self._finish_owed()
        self._calls, self._together = 0, False
        changed = self._watch.changes()
        if changed:
            self._append(Event(Kind.CHANGE, change=changed))
            self._watch.note()
            self._sync()

    def flush(self) -> None:
        """Sync the file to disk.

        Raises:
            OSError: this sync or one beside the steps has failed.
        """
        if self._file is not None:
            self._finish_sync()
            sync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """End the recording; the optimizer continues without it.

        A hash of the weights after the last step ends the file, for a replay to be checked by.

        Raises:
            OSError: that hash could not be written, the last sync has failed, or one beside the
                steps. The recording has ended all the same.
        """
        if self._optimizer.recorder is self:
            self._optimizer.recorder = None
        file = self._file
        if file is not None:
            self._thread.shutdown()
            with contextlib.ExitStack() as last:
                last.callback(setattr, self, "_file", None)
                last.callback(os.close, file)
                last.callback(sync, file)
                self._seal()
        self._finish_sync()

    def _seal(self) -> None:
        """Write the hash of the weights, unless they are no longer those of the last step."""
        self._check_file()
        params = all_params(self._optimizer.param_groups)
        if (
            self._ended is None
            and not self._owed
            and self._at_step
            and self._optimizer._unfinished is None
            and self._watch.untouched
            and not any(map(is_sharded, params))
        ):
            self._append(Event(Kind.CHANGE, change={TRAINED: fingerprint(params)}))

    def _check_file(self) -> None:
        """End the recording if others have changed the file, or this is another process."""
        if self._file is None or self._ended is not None:
            return
        if os.getpid() != self._process:
            self._ended = (
                "it is that of the process that this one was forked from; set optimizer.recorder "
                "= None to train here without it"
            )
            return
        now = os.fstat(self._file)
        if not now.st_nlink:
            self._ended = "somebody has deleted or replaced the file; close the recorder"
        elif now.st_size != self._size:
            self._ended = "somebody else has written to the file; close the recorder"

    def _warn_of_buffers(self) -> None:
        """Warn once if forward passes write to what the file does not hold."""
        name = self._buffers.written()
        if name is not None:
            self._buffers = Buffers(None)
            warn(
                f"forward passes change buffers of the model, {name!r} for one, of which "
                f"{self.path} holds nothing: save them apart, or a replayed model evaluates with "
                f"those of its base"
            )

    def _finish_sync(self) -> None:
        """Wait for the sync beside the steps, if there is one, and raise its error once."""
        last, self._syncing = self._syncing, None
        if last is not None:
            last.result()

    def _append(self, event: Event) -> None:
        record, chain = encode(event, self._chain)
        size = self._size
        try:
            self._write(record)
        except OSError:
            # On a full disk, for example, part of the record may be written. Remove it, so that
            # the file is not damaged.
            if self._file is not None:
                os.ftruncate(self._file, size)
                self._size = size
            raise
        self._chain = chain

    def _sync(self) -> None:
        """Sync the file if it is time: beside the next steps, as it takes some 10 ms, or before
        this one returns if each step is to be synced.

        Raises:
            OSError: a sync has failed, this one or the last one.
        """
        if self._file is None:
            return
        if not self.sync_every:
            self.flush()
            return
        last = self._syncing
        if time.monotonic() - self._synced < self.sync_every or not (last is None or last.done()):
            return
        self._synced = time.monotonic()
        self._syncing = self._thread.submit(sync, self._file)
        if last is not None:
            last.result()

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise TrajectoryError(f"the recording to {self.path} has ended")
        while data:
            written = os.write(self._file, data)
            self._size += written
            data = data[written:]

    def _rates(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self._optimizer.param_groups)


def refuse_unrecordable(optimizer: ZerothOrderOptimizer) -> None:
    """Raise unless the optimizer's run can be recorded from now on."""
    name = type(optimizer).__name__
    if not optimizer.recordable:
        raise ValueError(
            f"{name} cannot be recorded, because its steps do not follow from the losses that a "
            f"closure returns; record MeZO or another class that takes them"
        )
    for *_, group, param, own in named_params(optimizer.param_groups):
        if is_sharded(param) and group.get("rank") is not None:
            raise ValueError(
                f"a low-rank run must have whole parameters to be recorded, got {own!r}, which is "
                f"sharded: products of some rows round in another way than those of all; save the "
                f"run by torch.distributed.checkpoint, or record MeZO"
            )
    if optimizer.recorder is not None:
        raise ValueError(
            f"a run must be recorded to one file, got {name}, whose run is recorded already; close "
            f"that recorder first"
        )
    if optimizer.param_groups[0]["step"] or optimizer.state or optimizer.has_pending:
        raise ValueError(
            f"a recording must begin before the first step, got {name} at step "
            f"{optimizer.param_groups[0]['step']}; make the optimizer anew and record it then"
        )
