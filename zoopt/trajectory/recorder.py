"""Records a run while it goes on: what the closure returned, and what was changed between steps."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any

from zoopt.checks import check_number
from zoopt.parameters import named_params
from zoopt.trajectory.format import Event, Kind, TrajectoryError, encode, encode_header, read
from zoopt.trajectory.header import describe, names_of, to_json
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.closure import Closure, loss_value

#: Group keys that a record has apart, or that cannot change.
_APART = ("params", "param_names", "lr")


class Recorder:
    """Writes a record for each step of an optimizer.

    Args:
        optimizer: of a method whose steps follow from losses alone.
        model: the module whose parameters it trains; its names go into the file.
        path: a new file.
        sync_every: seconds after which what was written is forced to the disk; 0: at each step.

    Attributes:
        path: the file's.

    Raises:
        ValueError: the optimizer has taken a step, or is one whose runs cannot be recorded.
        TrajectoryError: another process writes to the file.
        FileExistsError: there is such a file.
    """

    def __init__(
        self,
        optimizer: ZerothOrderOptimizer,
        model: Any,
        path: str | Path,
        *,
        sync_every: float = 1.0,
    ) -> None:
        check_number("sync_every", sync_every, low=0.0)
        self.path, self.sync_every = Path(path), float(sync_every)
        self._optimizer = optimizer
        self._losses: list[Any] = []
        refuse_unrecordable(optimizer)
        header = encode_header(describe(optimizer, names_of(optimizer, model)))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self._begin(os.open(self.path, flags, 0o644), int.from_bytes(header[-4:], "little"))
        self._write(header)
        self.flush()
        _sync_folder(self.path)

    @classmethod
    def going_on(
        cls, optimizer: ZerothOrderOptimizer, path: str | Path, *, sync_every: float = 1.0
    ) -> Recorder:
        """Go on with a file whose steps the optimizer has taken; a torn record is cut off."""
        recorder = cls.__new__(cls)
        recorder.path, recorder.sync_every = Path(path), float(sync_every)
        recorder._optimizer, recorder._losses = optimizer, []
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        recorder._begin(file, 0)
        contents = read(path)
        taken = optimizer.param_groups[0]["step"]
        if contents.steps != taken:
            recorder.close()
            raise TrajectoryError(
                f"the optimizer must have taken the {contents.steps} steps of {path}, got {taken}; "
                f"let zoopt.replay take them"
            )
        os.ftruncate(file, contents.size)
        recorder._chain = contents.chain
        return recorder

    def _begin(self, file: int, chain: int) -> None:
        self._file: int | None = file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            self._file = None
            raise TrajectoryError(
                f"another process writes to {self.path}; let it end, or record to another file"
            ) from None
        self._chain, self._synced = chain, time.monotonic()
        self._note_groups()

    def listen(self, closure: Closure) -> Closure:
        """The closure, with what it returns kept for the record."""
        self._losses = []

        def heard() -> Any:
            result = closure()
            self._losses.append(result)
            return result

        return heard

    def stepped(self, closure: bool) -> None:
        """Record a step, of a closure or of what was probed."""
        self._wrote(Kind.STEP if closure else Kind.APPLY)

    def probed(self) -> None:
        """Record a probe."""
        self._wrote(Kind.PROBE)

    def dropped(self) -> None:
        """Record that what was probed is dropped."""
        self._wrote(Kind.DROP)

    def _wrote(self, kind: Kind) -> None:
        losses = tuple(loss_value(loss) for loss in self._losses)
        self._append(Event(kind, losses, self._changed_rates()))
        self._losses = []
        self._last_rates = self._rates()
        self._note_groups()

    def before(self) -> None:
        """Record what was changed since the last step, before the next one uses it."""
        changed = self._changes()
        if changed:
            self._append(Event(Kind.CHANGE, change=changed))

    def flush(self) -> None:
        """Force what was written to the disk."""
        if self._file is not None:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """End the recording; the optimizer goes on without."""
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

    def _changed_rates(self) -> tuple[float, ...]:
        rates = self._rates()
        return () if rates == self._last_rates else rates

    def _trained(self) -> list[bool]:
        return [p.requires_grad for _, _, p, _ in named_params(self._optimizer.param_groups)]

    def _note_groups(self) -> None:
        """Keep the groups as they are, to tell what is changed from outside."""
        self._groups = [dict(group) for group in self._optimizer.param_groups]
        self._last_trained = self._trained()
        if not hasattr(self, "_last_rates"):
            self._last_rates = self._rates()

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


def _sync_folder(path: Path) -> None:
    """Force the file's name to the disk."""
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
