"""Batches: the tensors that an operation works on in one pass, each with its noise.

This is the one place between tensors and addresses: what a kernel may not be given is refused here,
and what is not in row-major memory goes there through a copy.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from zoopt.dtypes import DTYPES
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.noise.key import NoiseKey


class Batch:
    """Tensors of one dtype on one device, with their keys: the unit of every operation.

    An operation on a batch is one launch on a GPU however many tensors there are, and a loop on the
    CPU; its bits are those of the operation on each tensor alone. A batch holds the tensors
    themselves: they may be moved, cast or resized between two uses, all of them alike.

    Args:
        tensors: dense, float32, bfloat16, float16 or float64, any shapes; no two share memory.
        keys: one a tensor; seed, distribution and density are the same in all.

    Raises:
        TypeError: something that is no plain dense tensor (a wrapper subclass, say).
        ValueError: no tensors, several dtypes or devices, shared memory, keys that do not match.
    """

    __slots__ = ("_checked", "keys", "tensors")

    def __init__(self, tensors: Iterable[Tensor], keys: Iterable[NoiseKey]) -> None:
        self.tensors, self.keys = tuple(tensors), tuple(keys)
        self._checked: list[tuple[int, int, bool, torch.dtype, torch.device]] | None = None
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
        """The elements of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def check(self, name: str = "theta") -> None:
        """Raise unless kernels can take all tensors as they are now. Cheap while none has moved."""
        try:
            places = None
            if not is_fake(self.tensors[0]):
                places = [
                    (t.data_ptr(), t.numel(), t.is_contiguous(), t.dtype, t.device)
                    for t in self.tensors
                ]
        except (AttributeError, NotImplementedError, RuntimeError):
            self._check_each(name)  # No tensors, or without an address: it says so better.
            raise
        if places is not None and places == self._checked:
            return
        self._check_each(name)
        if places is not None:
            _check_apart(name, self.tensors)
        self._checked = places

    def _check_each(self, name: str) -> None:
        for tensor in self.tensors:
            check_tensor(name, tensor)
            check_unshared(name, tensor)
            if tensor.dtype != self.dtype or tensor.device != self.device:
                raise ValueError(
                    f"the tensors of a batch must share dtype and device, got {self.dtype} on "
                    f"{self.device} and {tensor.dtype} on {tensor.device}; make a batch for each"
                )

    def check_beside(self, name: str, others: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Raise unless each of the others can be read beside its tensor: contiguous, of its shape
        and device, and of that dtype."""
        if len(others) != len(self.tensors):
            raise ValueError(
                f"{name} must have one tensor for each of the batch's {len(self.tensors)}, "
                f"got {len(others)}"
            )
        for other, theta in zip(others, self.tensors, strict=True):
            check_tensor(name, other)
            check_like(name, other, theta, dtype)
            if not other.is_contiguous():
                raise ValueError(f"{name} must be contiguous; pass {name}.contiguous()")

    def row_major(self) -> Batch:
        """The batch's values in row-major memory: itself, or with copies."""
        if all(tensor.is_contiguous() for tensor in self.tensors):
            return self
        return Batch([tensor.detach().contiguous() for tensor in self.tensors], self.keys)

    @contextlib.contextmanager
    def contiguous(self) -> Iterator[Batch]:
        """The batch in row-major memory: itself, or with copies that go back on leaving."""
        if all(tensor.is_contiguous() for tensor in self.tensors):
            yield self
            return
        with contextlib.ExitStack() as stack:
            dense = [stack.enter_context(contiguous(tensor)) for tensor in self.tensors]
            yield Batch(dense, self.keys)


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


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise unless it is a plain dense tensor of a dtype that the kernels have."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known}, got {tensor.dtype}")
    if is_fake(tensor):
        return
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} must be a plain tensor, got the wrapper {type(tensor).__name__}, whose memory "
            f"is elsewhere; pass the tensor that it wraps"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the meta device")


def check_unshared(name: str, tensor: Tensor) -> None:
    """Raise if elements of the tensor share memory."""
    if tensor.is_contiguous() or tensor.numel() < 2:
        return
    axes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)  # noqa: B905
    reach = 0
    for stride, size in axes:
        if stride == 0:
            raise ValueError(
                f"{name} is expanded, so that several of its elements share memory; "
                f"pass {name}.clone()"
            )
        if stride <= reach:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, so that "
                f"elements may share memory; pass {name}.clone()"
            )
        reach += stride * (size - 1)


def check_like(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype) -> None:
    """Raise unless the tensor has theta's shape and device and the dtype."""
    if tensor.shape != theta.shape or tensor.dtype != dtype or tensor.device != theta.device:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {tuple(theta.shape)} on {theta.device}, "
            f"got {tensor.dtype}, {tuple(tensor.shape)} on {tensor.device}"
        )
    check_unshared(name, tensor)


def _check_apart(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise if two tensors share memory: one launch writes to all, in no order."""
    spans = sorted(
        (tensor.data_ptr(), tensor.numel() * tensor.itemsize)
        for tensor in tensors
        if tensor.is_contiguous() and tensor.numel()
    )
    for (address, size), (following, _) in itertools.pairwise(spans):
        if following < address + size:
            raise ValueError(
                f"{name} must be tensors that share no memory, got two that do; pass one of them, "
                f"or a clone"
            )


@contextlib.contextmanager
def contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's values in row-major memory; what is written there is the tensor's on leaving.

    Itself, detached, where it is contiguous, else a copy.
    """
    target = tensor.detach()
    dense = target.contiguous()
    yield dense
    if dense is not target:
        target.copy_(dense)
