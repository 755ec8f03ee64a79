"""What lasts from step to step: facts that are compared, and sequences with what was made for them.

A step over many parameters finds the same ones as the step before. Whoever prepares it asks whether
the facts still hold, in some hundred nanoseconds a parameter, and then uses what is there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from zoopt.groups import Group
from zoopt.kernels.places import places_of

T = TypeVar("T")
#: Parameters that are no subclasses, whose attributes say all about them.
PLAIN = frozenset({torch.nn.Parameter, Tensor})
_METADATA = [operator.attrgetter(name) for name in ("requires_grad", "shape", "device")]


class Facts(NamedTuple):
    """What something was made from: objects that must be the same ones, and values."""

    objects: list[Any]
    values: list[Any]

    def holds(self, before: Facts) -> bool:
        """Whether they are those of before."""
        return (
            len(self.objects) == len(before.objects)
            and all(map(operator.is_, self.objects, before.objects))
            and self.values == before.values
        )


def facts_of(
    groups: Sequence[Group],
    state: Mapping[Tensor, Mapping[str, Any]],
    apart: Collection[str],
    *,
    tensors: bool,
) -> Facts | None:
    """The parameters, where they are, their groups' values, and the tensors of their state; None if
    nobody can tell.

    Args:
        apart: keys of groups that do not count.
        tensors: whether values of groups may be tensors. Of one only the identity counts.
    """
    objects: list[Any] = [*state]
    values: list[Any] = []
    for group in groups:
        params = group["params"]
        if not PLAIN.issuperset(map(type, params)):
            return None
        objects += [group, *params]
        values.append(list(group.get("param_names", ())))
        for key, value in group.items():
            if key in apart:
                continue
            if isinstance(value, Tensor):
                if not tensors:
                    return None  # Its value can change in place.
                objects.append(value)
            elif isinstance(value, list):
                objects += value
                values.append((key, len(value)))
            else:
                values.append((key, value))
        values += [places_of(params), *(list(map(each, params)) for each in _METADATA)]
    kept = [value for entries in state.values() for value in entries.values()]
    if not set(map(type, kept)) <= {Tensor}:
        return None
    values.append(list(map(Tensor.data_ptr, kept)))
    return Facts(objects + kept, values)


class Lasting(tuple[Any, ...]):
    """Objects that are used together again and again.

    Attributes:
        made: what has been made for them.
    """

    made: dict[Hashable, Any]

    def __new__(cls, objects: Sequence[Any]) -> Lasting:
        """A tuple of them."""
        lasting = super().__new__(cls, objects)
        lasting.made = {}
        return lasting


def prepared(objects: Sequence[Any], name: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, made once for objects that last."""
    if not isinstance(objects, Lasting):
        return make()
    if name not in objects.made:
        objects.made[name] = make()
    found: T = objects.made[name]
    return found
