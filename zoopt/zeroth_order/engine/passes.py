"""Passes over many parameters that are made together: on a GPU one launch for all that are alike.

Updates and moves are written for one parameter. On a device whose operations are launches, their
kernels are queued here, and made as batches when all have been asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from zoopt.kernels import adam_window_, apply_, dispatch, momentum_
from zoopt.kernels.batch import Batch
from zoopt.kernels.noise.key import NoiseKey
from zoopt.zeroth_order.engine.progress import Progress

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "apply": apply_,
    "momentum": momentum_,
    "adam_window": adam_window_,
}


class _Alike:
    """Parameters for which one operation with the same numbers is asked."""

    def __init__(
        self, operation: Callable[..., Any], numbers: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.operation, self.numbers, self.options = operation, numbers, options
        self.thetas: list[Tensor] = []
        self.keys: list[NoiseKey] = []
        self.beside: list[tuple[Tensor, ...]] = []
        self.progress: list[Progress] = []


class Passes:
    """A queue of kernels, each over a parameter, that change nothing until `make`."""

    def __init__(self) -> None:
        self._queue: dict[Hashable, _Alike] = {}

    def put(
        self,
        operation: str,
        theta: Tensor,
        key: NoiseKey,
        progress: Progress,
        *numbers: Sequence[float],
        beside: tuple[Tensor, ...] = (),
        **options: Any,
    ) -> bool:
        """Queue an operation on a parameter, unless it is to be made now, alone.

        Args:
            operation: `"apply"`, `"momentum"` or `"adam_window"`.
            progress: that of the pass, which is over when the queue has been made.
            numbers: a sequence an argument, one number a direction.
            beside: tensors of theta's size that the operation works on.
            options: its other arguments.

        Returns:
            Whether it is queued, or has been made before.
        """
        if not (dispatch.launches(theta) and theta.is_contiguous()):
            return False
        if progress.done:
            return True
        numbers = tuple(map(tuple, numbers))
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        kind = (theta.dtype, theta.device, key.seed, key.distribution, key.density)
        name = (operation, numbers, tuple(sorted(options.items())), kind)
        if name not in self._queue:
            self._queue[name] = _Alike(_OPERATIONS[operation], numbers, options)
        alike = self._queue[name]
        alike.thetas.append(theta)
        alike.keys.append(key)
        alike.beside.append(beside)
        alike.progress.append(progress)
        return True

    def make(self) -> None:
        """Make what is queued: one batch for all that are alike."""
        for kind in list(self._queue):
            alike = self._queue[kind]
            batch = Batch(alike.thetas, alike.keys)
            beside = zip(*alike.beside, strict=True) if alike.beside[0] else ()
            alike.operation(batch, *beside, *alike.numbers, **alike.options)
            for progress in alike.progress:
                progress.finish()
            del self._queue[kind]

    def clear(self) -> None:
        """Forget what is queued."""
        self._queue.clear()
