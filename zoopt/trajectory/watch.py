"""Notices what is changed between the steps of a recorded run, by others than the optimizer."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoopt.distributed.sharding import is_sharded, local
from zoopt.groups import all_params
from zoopt.trajectory.format import TrajectoryError
from zoopt.trajectory.header import to_json
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer

#: Group keys that are recorded separately or cannot change.
_APART = ("params", "param_names", "lr")
#: How many parameters' elements are compared at each step on the CPU; on other devices, which are
#: not to be waited for, those of all are compared once in so many seconds.
_SAMPLED, _SAMPLE_EVERY = 4, 1.0
_REMEDY = "close the recorder, and record a new optimizer to another file"


class _Seen(NamedTuple):
    """A tensor, and autograd's version counter of it, which increases with every write."""

    tensor: Tensor
    version: int

    @property
    def same(self) -> bool:
        """Whether nobody has written to it since."""
        return _version(self.tensor) == self.version


class Watch:
    """Compares an optimizer's groups, weights and state with what they were after its last step.

    Changes of groups can be recorded. Weights and state that somebody else has written cannot.
    Version counters tell of writes, but not of those through `param.data`. These are looked for
    in single elements, of other parameters and at other places each time.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer, path: Path) -> None:
        self._optimizer, self._path = optimizer, path
        self._sampled, self._number = -_SAMPLE_EVERY, 0
        self._ids = list[int]()
        self.note()

    def note(self) -> None:
        """Remember how everything is now."""
        groups = self._optimizer.param_groups
        self._groups = [
            {key: _seen(value) for key, value in group.items() if key not in _APART}
            for group in groups
        ]
        self._last_versions = self._versions()
        self._trained = self._trains()
        self._state = {
            param: {key: _seen(value) for key, value in own.items()}
            for param, own in self._optimizer.state.items()
            if own
        }
        self._number += 1
        self._chosen = self._choose()
        self._elements = self._sample()

    def changes(self) -> dict[str, Any]:
        """What has changed in the groups, for the file.

        Raises:
            TrajectoryError: groups were added, or weights or state were written.
        """
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups):
            raise TrajectoryError(
                f"param groups cannot be added while {self._path} is recorded; {_REMEDY}"
            )
        if not self.untouched:
            raise TrajectoryError(
                f"the weights were written since the last step that {self._path} holds, by "
                f"somebody else than the optimizer, so the file could not make them again; "
                f"{_REMEDY}"
            )
        state = self._optimizer.state
        for param, own in self._state.items():
            now = state.get(param, {})
            if any(key not in now or _differ(now[key], value) for key, value in own.items()):
                raise TrajectoryError(
                    f"the optimizer's state was changed since the last step that {self._path} "
                    f"holds, so the file could not make the next weights again; {_REMEDY}"
                )
        changes: dict[str, Any] = {}
        for number, (group, before) in enumerate(zip(groups, self._groups, strict=True)):
            for key, value in group.items():
                if key not in _APART and (key not in before or _differ(value, before[key])):
                    changes.setdefault("groups", {}).setdefault(str(number), {})[key] = to_json(
                        value
                    )
        if self._trains() != self._trained:
            changes["trained"] = self._trains()
        return changes

    @property
    def untouched(self) -> bool:
        """Whether nobody was seen to write to the weights."""
        if self._versions() != self._last_versions:
            return False
        return self._elements == self._sample()

    def _find(self) -> None:
        """The parameters, and their parts if they are sharded."""
        params = all_params(self._optimizer.param_groups)
        if (ids := [*map(id, params)]) != self._ids:
            self._ids, self._params = ids, params
            parts = [local(param) for param in params]
            shards = [part for part, param in zip(parts, params, strict=True) if is_sharded(param)]
            self._counted = [*params, *shards]
            self._filled = [part for part in parts if part.numel()]
            self._on_cpu = all(part.device.type == "cpu" for part in parts)

    def _trains(self) -> list[bool]:
        return [param.requires_grad for param in self._params]

    def _versions(self) -> list[int]:
        """The version counter of each parameter. A sharded one has two: its part, which the
        optimizer writes, has its own."""
        self._find()
        return [*map(_version, self._counted)]

    def _choose(self) -> list[Tensor]:
        """The parameters of which an element is compared until the next note."""
        params = self._filled
        if self._on_cpu:
            first = self._number * _SAMPLED % max(1, len(params))
            return [*params, *params][first : first + min(_SAMPLED, len(params))]
        if time.monotonic() - self._sampled < _SAMPLE_EVERY:
            return []
        self._sampled = time.monotonic()
        return params

    def _sample(self) -> list[Any]:
        """The elements that are compared."""
        return [_element(own, self._number) for own in self._chosen]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # Those of inference mode have none.


def _element(tensor: Tensor, number: int) -> Any:
    """One of the tensor's elements, others for other numbers: its bytes, or its value as text. NaN
    is then equal to itself."""
    at, place = number * 0x9E3779B1 % tensor.numel(), list[int]()
    if tensor.is_cpu and tensor.is_contiguous():  # A tenth of the time that indexing takes.
        return ctypes.string_at(tensor.data_ptr() + at * tensor.itemsize, tensor.itemsize)
    for size in reversed(tensor.shape):
        at, i = divmod(at, size)
        place.append(i)
    return repr(tensor.detach()[tuple(reversed(place))].item())


def _seen(value: Any) -> Any:
    """A group's or state's value, with the version counters of its tensors."""
    if isinstance(value, Tensor):
        return _Seen(value, _version(value))
    return [_seen(item) for item in value] if isinstance(value, list | tuple) else value


def _differ(value: Any, before: Any) -> bool:
    """Whether a value has changed since `_seen` has returned `before`."""
    if isinstance(before, _Seen):
        if value is before.tensor:
            return not before.same
        return not (isinstance(value, Tensor) and before.same and _equal(value, before.tensor))
    if isinstance(before, list):
        alike = isinstance(value, list | tuple) and len(value) == len(before)
        return not alike or any(_differ(*pair) for pair in zip(value, before, strict=True))
    return isinstance(value, Tensor) or bool(value is not before and value != before)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())


class Buffers:
    """The buffers of a model, of which a recorded run holds nothing."""

    def __init__(self, model: Any) -> None:
        found: Iterable[tuple[str, Tensor]] = getattr(model, "named_buffers", list)()
        self._seen = [(name, _seen(buffer)) for name, buffer in found]

    def written(self) -> str | None:
        """The name of one that was written since; None if there is none."""
        names: Sequence[str] = [name for name, own in self._seen if not own.same]
        return names[0] if names else None
