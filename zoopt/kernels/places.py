"""Where tensors are: found anew at each use, and compared with what was found before.

A step works on the same tensors as the one before, but a tensor can be moved, cast or resized in
between. What has been checked or made for many tensors is kept as long as their places are equal.
Each question is asked of all tensors by one `map`, which takes 40 ns a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from zoopt.kernels.dispatch import is_fake

T = TypeVar("T")
_dtype = operator.attrgetter("dtype")
#: Addresses, numbers of elements, dtypes, and strides where not all tensors are contiguous.
Places = tuple[tuple[int, ...], list[int], list[Any], list[Any] | None]


def place_of(tensor: Tensor) -> int:
    """Equal for tensors whose data are one."""
    return id(tensor) if is_fake(tensor) else tensor.data_ptr()


def places_of(tensors: Sequence[Tensor]) -> Places:
    """Where tensors are, and what they hold there. (An address is of one device only.)"""
    contiguous = all(map(Tensor.is_contiguous, tensors))
    return (
        tuple(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.numel, tensors)),
        list(map(_dtype, tensors)),
        None if contiguous else list(map(Tensor.stride, tensors)),
    )


class Kept(tuple[Tensor, ...]):
    """Tensors that are used beside those of a batch again and again, such as state.

    What has been made or checked for them is kept while they stay where they are.
    """

    _places: Places | None = None
    _made: dict[Any, Any] | None = None

    def made(self) -> dict[Any, Any]:
        """What has been made for them where they are now; empty if one has moved."""
        places = places_of(self)
        if self._made is None or places != self._places:
            self._places, self._made = places, {}
        return self._made

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once for them where `made` has last found them: for what runs
        after that."""
        made = self.made() if self._made is None else self._made
        if name not in made:
            made[name] = make()
        found: T = made[name]
        return found


class Placed(tuple[Tensor, ...]):
    """Contiguous tensors whose addresses have just been found."""

    def __new__(cls, tensors: Sequence[Tensor], addresses: tuple[int, ...]) -> Placed:
        """A tuple of them."""
        self = super().__new__(cls, tensors)
        self.addresses = addresses
        return self

    addresses: tuple[int, ...]
