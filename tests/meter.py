"""Peak bytes of live tensor storage, exactly, above what is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from zoopt.memory.meter import StorageMeter


class LiveStorages(StorageMeter):
    """Counts from the storages of `known` tensors on: as nothing while they live, and then as less
    than nothing."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.track(known, "parameters")
        self._known = self.total
        self.forget_peaks()

    @property
    def above(self) -> int:
        """The most bytes alive at once, above those that were known."""
        return self.peak - self._known


def peak_bytes(function: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """The most bytes alive at once during one call, above what `known` tensors take."""
    with LiveStorages(known) as meter:
        function()
    return meter.above
