"""Parts of a pass: what is asked for of one parameter, and parameters that are alike in it.

The parameters of a bucket differ only by their noise and by what lies beside them, and each step
requests the same operations on them. What these operations take is put together once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zoopt.kernels.batch import Batch
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.places import Kept, place_of
from zoopt.lasting import Lasting
from zoopt.zeroth_order.engine.progress import Progress


@dataclasses.dataclass(frozen=True)
class Request:
    """An operation on one parameter.

    Attributes:
        operation: the name of an operation, or a function on a batch.
        theta, key, indices: what it works on (see `Batch`).
        progress: that of the pass.
        beside: what else belongs to the parameter, by the operation's names.
        options: its other arguments.
    """

    operation: str | Callable[..., Any]
    theta: Tensor
    key: NoiseKey
    progress: Progress
    indices: Tensor | None
    beside: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def kind(self) -> Hashable:
        """What requests that one operation serves have in common besides their options."""
        key, theta = self.key, self.theta
        classes = tuple((name, type(value)) for name, value in self.beside.items())
        noise = (key.seed, key.distribution, key.density)
        return theta.dtype, theta.device, *noise, self.indices is None, classes

    @property
    def what(self) -> Hashable:
        """Equal for requests that one operation serves."""
        return self.operation, tuple(sorted(self.options.items())), self.kind

    @property
    def form(self) -> Hashable:
        """What stays the same from step to step, while numbers change."""
        return self.operation, self.progress.stage, *self.beside, self.indices is None


class Part:
    """Parameters of which the same is asked for.

    Attributes:
        places: their addresses. No two are the same.
    """

    def __init__(self, requests: Sequence[Request] = ()) -> None:
        self._thetas: list[Tensor] = []
        self._keys: list[NoiseKey] = []
        self._indices: list[Tensor] = []
        self._beside: dict[str, list[Any]] = {}
        self._batch: Batch | None = None
        self._columns: dict[str, Any] = {}
        self._joined: dict[tuple[int, ...], tuple[Part, Sequence[Part]]] = {}
        self.places: set[int] = set()
        for request in requests:
            self.append(request)

    def __len__(self) -> int:
        return len(self._thetas)

    def append(self, request: Request) -> None:
        """Add a parameter."""
        if request.theta.numel():
            self.places.add(place_of(request.theta))
        self._thetas.append(request.theta)
        self._keys.append(request.key)
        if request.indices is not None:
            self._indices.append(request.indices)
        for name, value in request.beside.items():
            self._beside.setdefault(name, []).append(value)

    def fits(self, first: Request) -> bool:
        """Whether the first one is still the one that is asked for, with the same beside it."""
        own = {name: values[0] for name, values in self._beside.items()}
        return (
            place_of(self._thetas[0]) == place_of(first.theta)
            and self._keys[0] == first.key
            and (not self._indices or self._indices[0] is first.indices)
            and all(_same(own[name], value) for name, value in first.beside.items())
        )

    def with_others(self, others: Sequence[Part]) -> Part:
        """All of these parameters; made once."""
        if not others:
            return self
        name = tuple(map(id, others))
        if name not in self._joined:
            joined = Part()
            for part in (self, *others):
                joined._thetas += part._thetas
                joined._keys += part._keys
                joined._indices += part._indices
                for own, values in part._beside.items():
                    joined._beside.setdefault(own, []).extend(values)
            self._joined[name] = joined, others
        return self._joined[name][0]

    def make(self, operation: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Do the operation on all of them."""
        if self._batch is None:
            self._batch = Batch(self._thetas, self._keys, self._indices or None)
            self._columns = {
                name: Kept(values) if isinstance(values[0], Tensor) else Lasting(values)
                for name, values in self._beside.items()
            }
        operation(self._batch, **self._columns, **options)


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return place_of(before) == place_of(now) and before.numel() == now.numel()
    return before is now


def parts_of(requests: Sequence[Sequence[Request]]) -> list[Part] | None:
    """The parts of a pass over several parameters, each of which has asked for its operations; None
    if they are not asked for the same, or share memory."""
    first, *others = requests
    for own in others:
        if len(own) != len(first) or any(
            a.progress.stage != b.progress.stage or a.what != b.what
            for a, b in zip(first, own, strict=True)
        ):
            return None
    parts = [Part(own) for own in zip(*requests, strict=True)]
    return parts if all(len(part.places) == len(part) for part in parts) else None
