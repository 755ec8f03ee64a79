"""Bytes of live tensor storage, followed operator by operator, on real and on fake tensors."""

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
    """What was alive after an operator had made something.

    Attributes:
        phase, name: the phase, and the operator ("track" and "phase" for the meter's own).
        live: bytes of each of CATEGORIES.
    """

    phase: str
    name: str
    live: tuple[int, ...]


#: Runs an operator: the operator, its arguments and keyword arguments -> its result.
Run = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


class _Storage(weakref.ref[UntypedStorage]):
    """A storage that is followed: its address, its bytes and what they count as."""

    __slots__ = ("address", "category", "nbytes")
    address: int
    category: Category
    nbytes: int


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
        run: runs the operators; default, each is called.
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
        # Nothing is compiled under a dispatch mode, and to exclude it takes longer than to count.
        return False

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.live.values())

    def track(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Count the tensors' storages, from now on as of that category."""
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
        """Count nothing for storages that are not yet followed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._follow(storage, "workspace", 0)

    def enter_phase(self, name: str) -> None:
        """Begin a phase: what is made from here on, and peaks, belong to it."""
        self.phase = name
        passes = name.startswith(("forward", "backward"))
        self._made_as = "activations" if passes else "workspace"
        self.record("phase")

    def forget_peaks(self) -> None:
        """Start new peaks from what is alive now."""
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
        """Note what is alive after the operator of that name."""
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
            # The most frequent by far: autograd asks at each of its operators.
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
