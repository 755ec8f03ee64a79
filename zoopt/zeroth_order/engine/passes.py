"""Passes over many parameters that are made together: on a GPU one launch for all that are alike.

Updates and moves are written for one parameter. On a device on which an operation is a launch, they
are queued here, and made as batches once all have been requested.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

from zoopt.kernels import adam_window_, apply_, dispatch, momentum_
from zoopt.kernels.batch import Batch
from zoopt.kernels.descent.op import curve_, descend_, turn_
from zoopt.kernels.noise.key import NoiseKey
from zoopt.zeroth_order.engine.progress import Progress

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "apply": apply_,
    "momentum": momentum_,
    "adam_window": adam_window_,
    "descend": descend_,
    "curve": curve_,
    "turn": turn_,
}


class _Alike:
    """Parameters for which the same operation, with the same numbers, is requested."""

    def __init__(self, operation: Callable[..., Any], options: dict[str, Any]) -> None:
        self.operation, self.options = operation, options
        self.thetas: list[Tensor] = []
        self.keys: list[NoiseKey] = []
        self.indices: list[Tensor] = []
        self.beside: dict[str, list[Any]] = {}
        self.progress: list[Progress] = []
        self.places: set[int] = set()

    def make(self) -> None:
        """Do the operation on all of them."""
        batch = Batch(self.thetas, self.keys, self.indices or None)
        self.operation(batch, **self.beside, **self.options)
        for progress in self.progress:
            progress.finish()


class Passes:
    """A queue of operations, each on one parameter, that change nothing until `make`.

    Attributes:
        requests: how many operations have been queued by `put`.
    """

    requests = 0
    _last: _Alike | None = None

    def __init__(self) -> None:
        self._queue: dict[tuple[int, Hashable, int], _Alike] = {}

    def put(
        self,
        operation: str | Callable[..., Any],
        theta: Tensor,
        key: NoiseKey,
        progress: Progress,
        *,
        indices: Tensor | None = None,
        beside: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> bool:
        """Queue an operation on a parameter, unless it has to be done now, by itself.

        Args:
            operation: a key of `_OPERATIONS`, or a function on a batch.
            progress: that of the pass, which ends when the queue is made.
            indices: the elements on which the operation works; None for all.
            beside: what else belongs to the parameter, by the operation's names: tensors with as
                many elements, or other objects for a function that expects them.
            options: its other arguments.

        Returns:
            Whether it is queued, or has already been done.
        """
        if not (dispatch.launches(theta) and theta.is_contiguous()):
            return False
        if progress.done:
            return True
        beside = beside or {}
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        noise = (key.seed, key.distribution, key.density)
        classes = tuple((own, type(value)) for own, value in beside.items())
        kind = (theta.dtype, theta.device, *noise, indices is None, classes)
        what = (operation, tuple(sorted(options.items())), kind)
        place, turn = theta.data_ptr(), 0
        # Parameters tied by their data are written one after the other.
        while (alike := self._queue.get((progress.stage, what, turn))) and place in alike.places:
            turn += 1
        if alike is None:
            function = _OPERATIONS[operation] if isinstance(operation, str) else operation
            alike = self._queue[progress.stage, what, turn] = _Alike(function, options)
        self.requests, self._last = self.requests + 1, alike
        if theta.numel():
            alike.places.add(place)
        alike.thetas.append(theta)
        alike.keys.append(key)
        if indices is not None:
            alike.indices.append(indices)
        for own, tensor in beside.items():
            alike.beside.setdefault(own, []).append(tensor)
        alike.progress.append(progress)
        return True

    def join(self, theta: Tensor, key: NoiseKey, progress: Progress) -> bool:
        """Queue what was queued last, without anything beside it, on a parameter that is alike,
        unless it has to be queued by itself."""
        alike, place = self._last, theta.data_ptr()
        if alike is None or alike.beside or alike.indices or place in alike.places:
            return False
        if progress.begun or not theta.is_contiguous():
            return False
        if theta.numel():
            alike.places.add(place)
        alike.thetas.append(theta)
        alike.keys.append(key)
        alike.progress.append(progress)
        return True

    def takes(self, theta: Tensor) -> bool:
        """Whether operations on the parameter are worth a place in the queue."""
        return dispatch.launches(theta)

    def made_apart(self) -> None:
        """A piece of a pass is about to be written without the queue."""

    def make(self) -> None:
        """Do what is queued, one batch for all that are alike; operations on one parameter stay in
        order."""
        for name in sorted(self._queue, key=lambda name: name[0]):
            self._queue[name].make()
            del self._queue[name]

    def clear(self) -> None:
        """Forget what is queued."""
        self._queue.clear()
        self._last = None
