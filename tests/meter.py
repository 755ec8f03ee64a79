"""Peak bytes of live tensor storage, exactly, above what is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from zoopt.memory.meter import LiveStorages


def peak_bytes(function: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """The most bytes alive at once during one call, above what `known` tensors take."""
    with LiveStorages(known) as meter:
        function()
    return meter.above
