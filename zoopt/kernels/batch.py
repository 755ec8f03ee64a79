"""Batches: the tensors that an operation works on in one pass, each with its noise."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoopt.dtypes import DTYPES
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.operands import (
    address,
    check_like,
    check_tensor,
    check_unshared,
    check_values,
    contiguous,
    dense,
    is_row_major,
    settled,
)
from zoopt.kernels.packed import Layout, Packed
from zoopt.kernels.places import Kept, Placed, Places, places_of

T = TypeVar("T")


class Batch:
    """Tensors of one dtype on one device, with their keys: the unit of every operation.

    On a GPU an operation on a batch is one launch, however many tensors there are; on the CPU it is
    a loop. The bits are those of the operation on each tensor alone. A batch holds the tensors
    themselves. Between two uses they may be moved, cast or resized, if all of them are alike again.

    Args:
        tensors: dense, float32, bfloat16, float16 or float64, any shapes; no two share memory,
            unless they are only read.
        keys: one a tensor; seed, distribution and density are the same in all.
        indices: one a tensor, where an operation is to work on some elements only: distinct flat
            indices of the tensor, int64 (k,), contiguous, on its device. The i-th of them has the
            noise's i-th number, and what lies beside the tensor has k elements.
        reads: whether the batch is only for operations that do not write to the tensors.

    Raises:
        TypeError: something that is no plain dense tensor (a wrapper subclass, say).
        ValueError: no tensors, several dtypes or devices, shared memory, keys or indices that do
            not match.
    """

    __slots__ = (
        "_checked",
        "_made",
        "_placed",
        "_row_major",
        "indices",
        "kept",
        "keys",
        "reads",
        "tensors",
    )

    def __init__(
        self,
        tensors: Iterable[Tensor],
        keys: Iterable[NoiseKey],
        indices: Iterable[Tensor] | None = None,
        *,
        reads: bool = False,
    ) -> None:
        self.tensors, self.keys, self.reads = tuple(tensors), tuple(keys), reads
        self.indices = None if indices is None else tuple(indices)
        #: What is used beside the tensors again and again, by names of whoever uses it.
        self.kept: dict[str, Any] = {}
        self._checked: Places | None = None
        self._made: dict[Hashable, Any] = {}
        self._placed: dict[Hashable, Any] = {}
        self._row_major = False
        alone = len(self.tensors) == len(self.keys) == 1 and indices is None
        if alone and self._takes(self.tensors[0]):
            return
        if not self.tensors or len(self.tensors) != len(self.keys):
            raise ValueError(
                f"a batch must have at least one tensor, and a key for each, got "
                f"{len(self.tensors)} tensors and {len(self.keys)} keys"
            )
        own = self.key
        for key in self.keys:
            if (key.seed, key.distribution, key.density) != (
                own.seed,
                own.distribution,
                own.density,
            ):
                raise ValueError(
                    f"the keys of a batch must share seed, distribution and density, "
                    f"got {own} and {key}"
                )
        self.check()
        if self.indices is not None:
            self._check_indices(self.indices)

    def _takes(self, tensor: Tensor) -> bool:
        """Whether the only tensor is one that `check` would find nothing to say about."""
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            return False
        if not settled(tensor):
            return False
        self._row_major = True
        return True

    @property
    def key(self) -> NoiseKey:
        """The first tensor's: its seed, distribution and density are those of all."""
        return self.keys[0]

    @property
    def dtype(self) -> torch.dtype:
        """That of all tensors."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """That of all tensors."""
        return self.tensors[0].device

    @property
    def numel(self) -> int:
        """The elements that are worked on, of all tensors."""
        return sum(self.counts)

    @property
    def counts(self) -> list[int]:
        """The elements that are worked on, of each tensor."""
        return [each.numel() for each in self.indices or self.tensors]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors are, in row-major memory, as the check before the operation found."""
        if self._checked is None or not self._row_major:
            return tuple([address(tensor, tensor.dtype) for tensor in self.tensors])
        return self._checked[0][: len(self.tensors)]

    def made(self, name: Hashable, make: Callable[[], T], *, placed: bool = False) -> T:
        """What `make` returns, made once for the tensors as the last check has found them.

        Args:
            placed: whether it depends on where they are.
        """
        if self._checked is None:
            return make()
        made = self._placed if placed else self._made
        if name not in made:
            made[name] = make()
        found: T = made[name]
        return found

    def on(self, tensors: Packed) -> Batch:
        """A batch like this one of other tensors, of the same shapes, dtype and device. (Of none,
        it is what batches like this one can be made from.)"""
        other = Batch.__new__(Batch)
        other.tensors, other.keys, other.indices = tuple(tensors), self.keys, None
        other.kept, other.reads, other._row_major = {}, self.reads, True
        other._checked = None if self._checked is None else (tensors.addresses, *self._checked[1:])
        other._made, other._placed = self._made, {}
        return other

    def addresses_of(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """The addresses of the batch's own tensors, or of contiguous ones beside them."""
        return self.addresses if tensors is self.tensors else addresses(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def check(self, name: str = "theta") -> None:
        """Raise unless kernels can take all tensors as they are now. Cheap while none has moved."""
        if len(self.tensors) == 1 and self._takes(self.tensors[0]):
            self._checked = None
            return
        try:
            places = None
            if not is_fake(self.tensors[0]):
                places = places_of(
                    self.tensors if not self.indices else self.tensors + self.indices
                )
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            self._check_each(name)  # No tensors, or without an address: it says so better.
            raise
        if places is not None and places == self._checked:
            return
        dtype, device = self.dtype, self.device
        row_major = dtype in DTYPES and all(
            t.dtype == dtype and settled(t) and t.device == device for t in self.tensors
        )
        if not row_major:
            self._check_each(name)
            row_major = all(is_row_major(tensor) for tensor in self.tensors)
        written_together = places is not None and len(self) > 1 and not self.reads
        if written_together and not share_no_memory(self.tensors):
            raise ValueError(
                f"{name} must be tensors that share no memory, got two that do; pass one of them, "
                f"or a clone"
            )
        self._checked, self._row_major = places, row_major
        self._made, self._placed = {}, {}

    def _check_each(self, name: str) -> None:
        for tensor in self.tensors:
            check_tensor(name, tensor)
            check_unshared(name, tensor)
            if tensor.dtype != self.dtype or tensor.device != self.device:
                raise ValueError(
                    f"the tensors of a batch must share dtype and device, got {self.dtype} on "
                    f"{self.device} and {tensor.dtype} on {tensor.device}; make a batch for each"
                )

    def _check_indices(self, indices: Sequence[Tensor]) -> None:
        if len(indices) != len(self.tensors):
            raise ValueError(
                f"indices must have one tensor for each of the batch's {len(self.tensors)}, got "
                f"{len(indices)}"
            )
        for own in indices:
            if own.dtype != torch.int64 or own.dim() != 1 or own.device != self.device:
                raise ValueError(
                    f"indices must be int64 tensors of one dimension on {self.device}, got "
                    f"{own.dtype}, {tuple(own.shape)} on {own.device}"
                )
            if not own.is_contiguous():
                raise ValueError("indices must be contiguous; pass indices.contiguous()")

    def check_beside(self, name: str, others: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Raise unless each of the others can be read beside what is worked on of its tensor:
        contiguous, of its shape and device, and of that dtype."""
        if isinstance(others, Packed) and others.like is self.tensors and dtype == self.dtype:
            return
        made = others.made() if isinstance(others, Kept) else None
        checked = (self.tensors, self._checked, dtype)
        if made is not None and self._checked is not None and _same(made.get("checked"), checked):
            return
        if len(others) != len(self.tensors):
            raise ValueError(
                f"{name} must have one tensor for each of the batch's {len(self.tensors)}, "
                f"got {len(others)}"
            )
        check = check_tensor if dtype in DTYPES else check_values
        for other, theta in zip(others, self.indices or self.tensors, strict=True):
            check(name, other)
            check_like(name, other, theta, dtype)
            if not other.is_contiguous():
                raise ValueError(f"{name} must be contiguous; pass {name}.contiguous()")
        if made is not None:
            made["checked"] = checked

    def row_major(self) -> Batch:
        """The batch's values in row-major memory: itself, or with copies."""
        if self._row_major:
            return self
        return Batch([dense(tensor) for tensor in self.tensors], self.keys, self.indices)

    def contiguous(self) -> contextlib.AbstractContextManager[Batch]:
        """The batch in row-major memory: itself, or with copies that go back on leaving."""
        return contextlib.nullcontext(self) if self._row_major else self._copies()

    @contextlib.contextmanager
    def _copies(self) -> Iterator[Batch]:
        with contextlib.ExitStack() as stack:
            values = [stack.enter_context(contiguous(tensor)) for tensor in self.tensors]
            yield Batch(values, self.keys, self.indices)


def _same(before: Sequence[Any] | None, now: Sequence[Any]) -> bool:
    """Whether both have the same objects."""
    return before is not None and all(map(operator.is_, before, now))


def name_of(tensors: Sequence[Tensor]) -> Hashable:
    """Equal for tensors that have nothing new about them but their addresses; None if that is not
    known."""
    if isinstance(tensors, Packed):
        return None if tensors.name is None else (tensors.name, tensors[0].dtype)
    return tensors.made().setdefault("name", object()) if isinstance(tensors, Kept) else None


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The addresses of contiguous tensors."""
    if isinstance(tensors, Packed | Placed):
        return tensors.addresses
    if isinstance(tensors, Kept):
        return tensors.once("addresses", lambda: tuple(map(address_of, tensors)))
    return tuple(map(address_of, tensors))


def address_of(tensor: Tensor) -> int:
    """The address of a contiguous tensor, or of one whose transpose is."""
    return address(tensor if tensor.is_contiguous() else tensor.mT, tensor.dtype)


def packed_like(batch: Batch) -> Packed:
    """New tensors of the shapes of a batch of contiguous ones, in one buffer."""

    def layout() -> Layout:
        return Layout([tuple(tensor.shape) for tensor in batch.tensors], batch.dtype.itemsize)

    made = Packed.new(batch.made("layout", layout), batch.dtype, batch.device)
    made.like = batch.tensors
    return made


def as_batch(theta: Tensor | Batch, key: NoiseKey | None) -> Batch:
    """A tensor and its key as a batch of one; a batch, which has its keys, as it is."""
    if not isinstance(theta, Batch):
        if key is None:
            raise TypeError("key must be a NoiseKey, got None; a tensor has no noise of its own")
        return Batch((theta,), (key,))
    if key is not None:
        raise TypeError(f"key must be left out with a batch, which has its own, got {key!r}")
    theta.check()
    return theta


def share_no_memory(tensors: Iterable[Tensor]) -> bool:
    """Whether no two tensors share memory: one launch writes to all, in no order."""
    filled = sorted((tensor for tensor in tensors if tensor.numel()), key=Tensor.data_ptr)
    begun: list[tuple[int, Tensor]] = []
    for tensor in filled:
        start = tensor.data_ptr()
        begun = [(end, other) for end, other in begun if end > start]
        if any(_meet(other, tensor) for _, other in begun):
            return False
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        begun.append((start + (last + 1) * tensor.itemsize, tensor))
    return True


def _meet(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors in one piece of memory have bytes in common."""
    if first.is_contiguous() and second.is_contiguous():
        return True
    return bool(torch.isin(_bytes(first), _bytes(second)).any())


def _bytes(tensor: Tensor) -> Tensor:
    """The addresses of all of a tensor's bytes, int64."""
    at = torch.tensor([tensor.data_ptr()], device="cpu")
    steps = [
        (n, stride * tensor.itemsize)
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    for n, step in (*steps, (tensor.itemsize, 1)):
        at = (at.unsqueeze(1) + torch.arange(n, device="cpu") * step).flatten()
    return at
