"""Peak bytes of live tensor storage, exactly, by following every operator's results."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak.

    Storages that exist beforehand are given as `known`: they count as nothing until they die, and
    then as less than nothing.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()
        for tensor in known:
            self._add(tensor)
        self.live = self.peak = 0

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, size).atexit = False

    def _drop(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result


def peak_bytes(function: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """The most bytes alive at once during one call, above what `known` tensors take."""
    with LiveStorages(known) as meter:
        function()
    return meter.peak
