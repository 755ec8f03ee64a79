"""Records a run as it proceeds: the closure's results, and changes made between steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoopt.checks import check_number
from zoopt.trajectory.format import Event, Kind, TrajectoryError, encode, encode_header, read
from zoopt.trajectory.header import describe, names_of, to_json
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.closure import Closure, loss_value

try:
    import fcntl
except ImportError:  # Files are not locked on Windows.
    fcntl = None  # type: ignore[assignment]

#: Group keys that a record has apart, or that cannot change.
_APART = ("params", "param_names", "lr")


class Recorder:
    """Writes a record for each step of an optimizer.

    Args:
        optimizer: of a method whose steps follow from losses alone.
        path, file: the file, open and locked; None: another rank writes it.
        chain: what the checksum of the next record begins from.
        sync_every: seconds after which what was written is forced to the disk; 0: at each step.

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
        #: What the closure has returned since the last record, and how often it was called.
        self._losses: list[Any] = []
        self._calls, self._together = 0, False
        #: Whether they were measured elsewhere.
        self._told = False
        #: A record that the disk has not taken yet, and why no further one can be written.
        self._unwritten: Event | None = None
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
    ) -> Recorder:
        """Begin a file.

        Raises:
            ValueError: the optimizer has taken a step, is one whose runs cannot be recorded, or
                trains what is not the model's.
            FileExistsError: there is such a file.
        """
        check_number("sync_every", sync_every, low=0.0)
        refuse_unrecordable(optimizer)
        header = encode_header(describe(optimizer, names_of(optimizer, model)))
        path = Path(path)
        file = locked(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        recorder = cls(
            optimizer, path, file, int.from_bytes(header[-4:], "little"), float(sync_every)
        )
        recorder._write(header)
        recorder.flush()
        sync_folder(path)
        return recorder

    @classmethod
    def going_on(
        cls, optimizer: ZerothOrderOptimizer, path: str | Path, *, sync_every: float = 1.0
    ) -> Recorder:
        """Go on with a file whose steps the optimizer has taken.

        What stands behind the last step, a record that was cut off or probes that no step has used,
        is removed: the optimizer knows nothing of it.

        Raises:
            TrajectoryError: another process writes to the file, or it has other steps.
        """
        check_number("sync_every", sync_every, low=0.0)
        path = Path(path)
        file = locked(path, os.O_RDWR)
        contents = read(path)
        taken = optimizer.param_groups[0]["step"]
        if contents.steps != taken:
            os.close(file)
            raise TrajectoryError(
                f"the optimizer must have taken the {contents.steps} steps of {path}, got {taken}; "
                f"let zoopt.replay take them"
            )
        end, chain = contents.last_step
        os.ftruncate(file, end)
        return cls(optimizer, path, file, chain, float(sync_every))

    def listen(self, closure: Closure) -> Closure:
        """The closure, with what it returns kept for the record."""
        self._losses, self._calls, self._together, self._told = [], 0, False, False

        def heard() -> Any:
            self._calls += 1
            result = closure()
            self._losses.append(result)
            return result

        return heard

    def listen_together(self) -> Callable[[Sequence[float]], None]:
        """A function that is told the losses which several ranks have agreed on."""
        self._losses, self._calls, self._together, self._told = [], 0, True, False

        def heard(losses: Sequence[float]) -> None:
            self._losses += losses
            self._calls += len(losses)

        return heard

    def told(self, losses: Sequence[float]) -> None:
        """Keep losses that were measured elsewhere for the record of the step that comes."""
        self._losses, self._told = list(losses), True

    def stepped(self, closure: bool) -> None:
        """Record a step, of a closure, of losses measured elsewhere or of what was probed."""
        self._wrote(Kind.STEP if closure else Kind.TOLD if self._told else Kind.APPLY)

    def probed(self) -> None:
        """Record a probe."""
        self._wrote(Kind.PROBE)

    def dropped(self) -> None:
        """Record that what was probed is dropped."""
        self._wrote(Kind.DROP)

    def failed(self, moved: bool) -> None:
        """Record evaluations that an error has ended.

        Args:
            moved: whether parameters were perturbed in place. They are back, up to the rounding of
                the passes, which a replay repeats.
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
        if self._unwritten is None:
            heard = kind in (Kind.STEP, Kind.PROBE, Kind.FAILED, Kind.TOLD)
            losses = tuple(loss_value(loss) for loss in self._losses) if heard else ()
            rates = self._rates()
            changed = () if rates == self._last_rates else rates
            self._unwritten = Event(kind, losses, changed)
            self._last_rates = rates
            self._note()
        self._append(self._unwritten)
        self._unwritten, self._losses, self._calls, self._told = None, [], 0, False

    def before(self) -> None:
        """Record what was changed since the last step, before the next one uses it.

        Raises:
            TrajectoryError: the weights were written by somebody else, groups were added, or the
                recording has ended.
        """
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

    def flush(self) -> None:
        """Force what was written to the disk."""
        if self._file is not None:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """End the recording; the optimizer continues without it."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
        if self._optimizer.recorder is self:
            self._optimizer.recorder = None

    def _append(self, event: Event) -> None:
        record, chain = encode(event, self._chain)
        size = os.fstat(self._file).st_size if self._file is not None else 0
        try:
            self._write(record)
        except OSError:
            # A full disk, say: with half a record in it, the file would be damaged.
            if self._file is not None:
                os.ftruncate(self._file, size)
            raise
        self._chain = chain
        if time.monotonic() - self._synced >= self.sync_every:
            self.flush()

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise TrajectoryError(f"the recording to {self.path} has ended")
        while data:
            data = data[os.write(self._file, data) :]

    def _rates(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self._optimizer.param_groups)

    def _params(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    def _trained(self) -> list[bool]:
        return [param.requires_grad for param in self._params()]

    def _versions(self) -> list[int]:
        """How often each parameter was written, as autograd counts."""
        return [param._version for param in self._params()]

    def _note(self) -> None:
        """Keep groups and counts as they are, to tell what is changed from outside."""
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
    """Whether a group's value is another one; tensors in lists are compared by identity."""
    if value is before:
        return False
    if isinstance(value, list) and isinstance(before, list) and len(value) == len(before):
        return any(_differ(*pair) for pair in zip(value, before, strict=True))
    return bool(value != before)


def refuse_unrecordable(optimizer: ZerothOrderOptimizer) -> None:
    """Raise unless the optimizer's run can be recorded from here on."""
    name = type(optimizer).__name__
    if not optimizer.recordable:
        raise ValueError(
            f"{name} cannot be recorded, because its steps do not follow from the losses that a "
            f"closure returns; record MeZO or another class that takes them"
        )
    if optimizer.param_groups[0]["step"] or optimizer.state or optimizer.has_pending:
        raise ValueError(
            f"a recording must begin before the first step, got {name} at step "
            f"{optimizer.param_groups[0]['step']}; make the optimizer anew and record it then"
        )


def locked(path: Path, flags: int) -> int:
    """Open a file to append to, for one process alone.

    Raises:
        TrajectoryError: another process has it.
    """
    file = os.open(path, flags | os.O_APPEND, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise TrajectoryError(
            f"another process writes to {path}; let it end, or record to another file"
        ) from None
    return file


def sync_folder(path: Path) -> None:
    """Force the file's name to the disk, where folders can be."""
    if os.name != "posix":
        return
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
