"""Bytes of live tensor storage, followed operator by operator, on real and on fake tensors."""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zoopt.memory.grouped import GROUPED_MM, grouped_mm

Category = Literal["parameters", "gradients", "optimizer state", "activations", "workspace"]
CATEGORIES: tuple[Category, ...] = (
    *("parameters", "gradients", "optimizer state"),
    *("activations", "workspace"),
)


class Event(NamedTuple):
    """What was alive after an operator had made something.

    Attributes:
        phase, name: the phase, and the operator ("track" and "phase" for the meter's own).
        live: bytes of each of CATEGORIES.
    """

    phase: str
    name: str
    live: tuple[int, ...]


@dataclasses.dataclass
class _Storage:
    nbytes: int
    category: Category


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every tensor that an operator makes, until its storage dies.

    What is made in the phases `forward ...` and `backward` is an activation (autograd's saved
    tensors and the operators' own results alike), what is made elsewhere is workspace, unless
    `track` says otherwise. Not seen: memory that an operator takes and frees inside itself, and
    what compiled kernels keep in caches and registers.

    Attributes:
        live: bytes by category at this moment.
        peak: the most bytes at one time, and `at_peak`, their categories then.
        phase: the present one.
        phases: the peak of each phase, in the order of their first beginnings.
        events: everything that was recorded, if asked for.

    Args:
        keep_events: whether to keep `events`.
    """

    def __init__(self, *, keep_events: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] | None = [] if keep_events else None
        self.live: collections.Counter[Category] = collections.Counter()
        self.peak = 0
        self.at_peak: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.phases: dict[str, int] = {}
        self.phase = "load"
        self._storages: weakref.WeakKeyDictionary[UntypedStorage, _Storage] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.live.values())

    def track(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Count the tensors' storages, from now on as of that category."""
        for tensor in tensors:
            known = self._storages.get(tensor.untyped_storage())
            if known is None:
                self._add(tensor, category)
            elif known.category != category:
                self.live[known.category] -= known.nbytes
                self.live[category] += known.nbytes
                known.category = category
        self._record("track")

    def enter_phase(self, name: str) -> None:
        """Begin a phase: what is made from here on, and peaks, belong to it."""
        self.phase = name
        self._record("phase")

    def forget_peaks(self) -> None:
        """Start new peaks from what is alive now."""
        self.peak = 0
        self.phases.clear()
        if self.events is not None:
            self.events.clear()
        self._record("phase")

    def _add(self, tensor: Tensor, category: Category) -> None:
        storage = tensor.untyped_storage()
        entry = _Storage(storage.nbytes(), category)
        self._storages[storage] = entry
        self.live[category] += entry.nbytes
        weakref.finalize(storage, self._drop, entry).atexit = False

    def _drop(self, entry: _Storage) -> None:
        self.live[entry.category] -= entry.nbytes

    def _record(self, name: str) -> None:
        total = self.total
        if self.events is not None:
            live = tuple(self.live[category] for category in CATEGORIES)
            self.events.append(Event(self.phase, name, live))
        self.phases[self.phase] = max(self.phases.get(self.phase, 0), total)
        if total > self.peak:
            self.peak = total
            self.at_peak = {category: self.live[category] for category in CATEGORIES}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = grouped_mm if func is GROUPED_MM else func
        result = run(*args, **(kwargs or {}))
        active = self.phase.startswith(("forward", "backward"))
        grown = False
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage() not in self._storages:
                self._add(value, "activations" if active else "workspace")
                grown = True
        if grown:
            self._record(func.name())
        return result


class LiveStorages(StorageMeter):  # type: ignore[no-untyped-call]
    """Counts what is alive above the storages of `known` tensors.

    When one of those dies, the count falls by its size.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.track(known, "parameters")
        self._known = self.total
        self.forget_peaks()

    @property
    def above(self) -> int:
        """The most bytes alive at once, above those that were known."""
        return self.peak - self._known
