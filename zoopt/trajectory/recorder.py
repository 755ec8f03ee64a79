"""Records a run while it proceeds: the closure's results and the changes between steps."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from zoopt.checks import check_number
from zoopt.distributed.sharding import is_sharded, local
from zoopt.groups import all_params
from zoopt.parameters import named_params
from zoopt.trajectory.files import locked, sync_folder
from zoopt.trajectory.format import Event, Kind, TrajectoryError, encode, encode_header, read
from zoopt.trajectory.header import describe, names_of, to_json
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.closure import Closure, loss_value

#: Group keys that are recorded separately or cannot change.
_APART = ("params", "param_names", "lr")


class Recorder:
    """Writes a record for each step of an optimizer.

    Args:
        optimizer: one whose steps depend only on the losses.
        path, file: the file, open and locked; None if another rank writes it.
        chain: the checksum of the previous record, from which the next one continues.
        sync_every: seconds between syncs of the file to disk; 0: sync at each step.

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
    ) -> None:
        self.path, self.sync_every = path, sync_every
        self._optimizer = optimizer
        self._file = file
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
        self._note()

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
        """
        check_number("sync_every", sync_every, low=0.0)
        refuse_unrecordable(optimizer)
        path = Path(path)
        if not writes and not any(map(is_sharded, optimizer._params())):
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
        recorder = cls(
            optimizer, path, file, int.from_bytes(header[-4:], "little"), float(sync_every)
        )
        recorder._write(header)
        recorder.flush()
        sync_folder(path)
        return recorder

    @classmethod
    def going_on(
        cls,
        optimizer: ZerothOrderOptimizer,
        path: str | Path,
        *,
        until: int | None = None,
        sync_every: float = 1.0,
    ) -> Recorder:
        """Continue a file whose steps the optimizer has taken: all of them, or those to `until`.

        Everything after the last of these steps is removed: later steps, an incomplete record, or
        probes that no step has used. The optimizer has not seen these.

        Raises:
            TrajectoryError: another process is writing to the file, or the optimizer has taken a
                different number of steps.
        """
        check_number("sync_every", sync_every, low=0.0)
        path = Path(path)
        file = locked(path, os.O_RDWR)
        contents = read(path)
        taken = optimizer.param_groups[0]["step"]
        steps = contents.steps if until is None else min(until, contents.steps)
        if steps != taken:
            os.close(file)
            raise TrajectoryError(
                f"the optimizer must have taken the first {steps} steps of {path}, got {taken}; "
                f"let zoopt.replay take them"
            )
        end, chain = contents.step_ends[steps]
        os.ftruncate(file, end)
        return cls(optimizer, path, file, chain, float(sync_every))

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
        if kind is not Kind.DROP:  # It changes nothing, and others may have since the last note.
            self._note()

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
            TrajectoryError: something other than the optimizer wrote to the weights, groups were
                added, or the recording has ended.
            OSError: an earlier event that could not be written still cannot be.
        """
        self._finish_owed()
        self._calls, self._together = 0, False
        if self._ended is not None:
            raise TrajectoryError(f"the recording to {self.path} has ended: {self._ended}")
        if self._versions() != self._last_versions:
            raise TrajectoryError(
                f"the weights were written since the last step that {self.path} holds, by somebody "
                f"else than the optimizer, so the file could not make them again; close the "
                f"recorder, and begin another file"
            )
        changed = self._changes()
        if changed:
            self._append(Event(Kind.CHANGE, change=changed))
            self._note()
            self._sync()

    def flush(self) -> None:
        """Sync the file to disk.

        Raises:
            OSError: this sync or one beside the steps has failed.
        """
        if self._file is not None:
            self._finish_sync()
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """End the recording; the optimizer continues without it.

        Raises:
            OSError: the last sync has failed, or one beside the steps, after which the recording
                has ended all the same.
        """
        if self._file is not None:
            self._thread.shutdown()
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
        if self._optimizer.recorder is self:
            self._optimizer.recorder = None
        self._finish_sync()

    def _finish_sync(self) -> None:
        """Wait for the sync beside the steps, if there is one, and raise its error once."""
        last, self._syncing = self._syncing, None
        if last is not None:
            last.result()

    def _append(self, event: Event) -> None:
        record, chain = encode(event, self._chain)
        size = os.fstat(self._file).st_size if self._file is not None else 0
        try:
            self._write(record)
        except OSError:
            # On a full disk, for example, part of the record may be written. Remove it, so that
            # the file is not damaged.
            if self._file is not None:
                os.ftruncate(self._file, size)
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
        self._syncing = self._thread.submit(os.fsync, self._file)
        if last is not None:
            last.result()

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise TrajectoryError(f"the recording to {self.path} has ended")
        while data:
            data = data[os.write(self._file, data) :]

    def _rates(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self._optimizer.param_groups)

    def _params(self) -> list[Tensor]:
        return all_params(self._optimizer.param_groups)

    def _trained(self) -> list[bool]:
        return [param.requires_grad for param in self._params()]

    def _versions(self) -> list[int]:
        """Autograd's version counter of each parameter, which increases with every write. A sharded
        one has two: its part, which the optimizer writes, has its own."""
        versions = [param._version for param in self._params()]
        return versions + [local(param)._version for param in self._params() if is_sharded(param)]

    def _note(self) -> None:
        """Remember groups and version counters, to detect changes made from outside."""
        self._groups = [dict(group) for group in self._optimizer.param_groups]
        self._last_trained, self._last_versions = self._trained(), self._versions()

    def _changes(self) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups):
            raise TrajectoryError(
                f"param groups cannot be added while {self.path} is recorded; close the recorder "
                f"first, and begin another file"
            )
        for number, (group, before) in enumerate(zip(groups, self._groups, strict=True)):
            for key, value in group.items():
                if key not in _APART and (key not in before or _differ(value, before[key])):
                    changes.setdefault("groups", {}).setdefault(str(number), {})[key] = to_json(
                        value
                    )
        trained = self._trained()
        if trained != self._last_trained:
            changes["trained"] = trained
        return changes


def _differ(value: Any, before: Any) -> bool:
    """Whether a group's value has changed. Tensors in lists are compared by identity."""
    if value is before:
        return False
    if isinstance(value, list) and isinstance(before, list) and len(value) == len(before):
        return any(_differ(*pair) for pair in zip(value, before, strict=True))
    return bool(value != before)


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
    if optimizer.param_groups[0]["step"] or optimizer.state or optimizer.has_pending:
        raise ValueError(
            f"a recording must begin before the first step, got {name} at step "
            f"{optimizer.param_groups[0]['step']}; make the optimizer anew and record it then"
        )
