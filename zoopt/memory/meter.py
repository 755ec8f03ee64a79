"""Tracks the bytes of live tensor storage, operator by operator, for real and fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zoopt.kernels.dispatch import is_fake
from zoopt.memory.grouped import run

Category = Literal["parameters", "gradients", "optimizer state", "activations", "workspace"]
CATEGORIES: tuple[Category, ...] = (
    *("parameters", "gradients", "optimizer state"),
    *("activations", "workspace"),
)
_DEVICE = torch.ops.prim.device.default


class Event(NamedTuple):
    """What was alive after an operator had allocated memory.

    Attributes:
        phase, name: the phase, and the operator ("track" and "phase" for the meter's own events).
        live: live bytes in each of CATEGORIES.
    """

    phase: str
    name: str
    live: tuple[int, ...]


#: Runs an operator: (operator, arguments, keyword arguments) -> result.
Run = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


class _Storage(weakref.ref[UntypedStorage]):
    """A tracked storage: its address, its bytes and their category."""

    __slots__ = ("address", "category", "nbytes")
    address: int
    category: Category
    nbytes: int


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks every tensor that an operator creates, until its storage is freed.

    Tensors from the phases `forward ...` and `backward` are activations, whether autograd saves
    them or not. Tensors from other phases are workspace. `track` can assign another category. The
    meter does not see memory that an operator allocates and frees internally, nor what compiled
    kernels keep in caches and registers.

    Attributes:
        live: the current bytes by category.
        peak: the greatest number of bytes so far; `at_peak` has them by category.
        phase: the current phase.
        phases: the peak of each phase, in the order in which the phases first began.
        events: all recorded events, if kept.

    Args:
        keep_events: whether to keep `events`.
        run: runs the operators; by default it calls them.
    """

    def __init__(self, *, keep_events: bool = False, run: Run = run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] | None = [] if keep_events else None
        self.live: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.peak = 0
        self.at_peak: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.phases: dict[str, int] = {}
        self.phase = "load"
        self._made_as: Category = "workspace"
        self._run = run
        self._storages: dict[int, _Storage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled under a dispatch mode, and skipping dynamo costs more than counting.
        return False

    @property
    def total(self) -> int:
        """The current number of live bytes."""
        return sum(self.live.values())

    def track(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Count the tensors' storages in that category from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is None:
                self._follow(storage, category, storage.nbytes())
            elif known.category != category:
                self.live[known.category] -= known.nbytes
                self.live[category] += known.nbytes
                known.category = category
        self.record("track")

    def overlook(self, tensors: Iterable[Tensor]) -> None:
        """Count the tensors' storages as 0 bytes, unless they are tracked already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._follow(storage, "workspace", 0)

    def enter_phase(self, name: str) -> None:
        """Begin a phase, to which new tensors and peaks then belong."""
        self.phase = name
        passes = name.startswith(("forward", "backward"))
        self._made_as = "activations" if passes else "workspace"
        self.record("phase")

    def forget_peaks(self) -> None:
        """Reset the peaks to the current bytes."""
        self.peak = 0
        self.phases.clear()
        if self.events is not None:
            self.events.clear()
        self.record("phase")

    def _follow(self, storage: UntypedStorage, category: Category, nbytes: int) -> None:
        entry = _Storage(storage, self._drop)
        entry.address, entry.category, entry.nbytes = storage._cdata, category, nbytes
        self._storages[entry.address] = entry
        self.live[category] += nbytes

    def _drop(self, entry: _Storage) -> None:
        del self._storages[entry.address]
        self.live[entry.category] -= entry.nbytes

    def record(self, name: str) -> None:
        """Record the live bytes after the operator of that name."""
        live = tuple(self.live.values())
        total = sum(live)
        if self.events is not None:
            self.events.append(Event(self.phase, name, live))
        if total > self.phases.get(self.phase, -1):
            self.phases[self.phase] = total
        if total > self.peak:
            self.peak = total
            self.at_peak = dict(self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and is_fake(args[0]):
            # A fast path for by far the most frequent call: autograd makes it at each operator.
            return args[0].fake_device
        result = self._run(func, args, kwargs or {})
        grown = False
        for value in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._storages:
                    self._follow(storage, self._made_as, storage.nbytes())
                    grown = True
        if grown:
            self.record(func.name())
        return result


class LiveStorages(StorageMeter):  # type: ignore[no-untyped-call]
    """Counts live bytes beyond the storages of `known` tensors.

    When a known tensor is freed, the count falls by its size.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.track(known, "parameters")
        self._known = self.total
        self.forget_peaks()

    @property
    def above(self) -> int:
        """The greatest number of live bytes beyond those of the known tensors."""
        return self.peak - self._known
