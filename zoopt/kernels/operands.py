"""Checks the operands of kernels, and takes their addresses.

A kernel receives the address of an operand, the number of its elements and their width. It cannot
see strides, a tensor subclass, or a storage that has been freed. So every operand must hold values
in its own memory. Its layout is free: a tensor that is not dense and row-major is replaced by a
copy that is, and results are copied back. Elements that are written must not share memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from zoopt.dtypes import DTYPES
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.journal import kept, once

_PLAIN = (Tensor, torch.nn.Parameter)
_STRIDED, _KNOWN = torch.strided, frozenset(DTYPES)


def settled(tensor: Tensor) -> int:
    """The address of a tensor that needs no closer look: a plain one, with values in memory of its
    own, in row-major order and as they are. 0 for any other, and for one without elements.

    What the checks below find out one by one takes half a microsecond here, a step's common case.
    """
    if (
        type(tensor) in _PLAIN
        and tensor.layout is _STRIDED
        and not tensor.is_nested
        and tensor.is_contiguous()
        and not tensor.is_neg()
    ):
        size, before = tensor.nbytes, tensor.storage_offset()
        if before:
            before *= tensor.itemsize
        if size and before + size <= tensor.untyped_storage().nbytes():
            # Tensors without values, on the meta device say or torch's lazy zeros, are at 0.
            return tensor.data_ptr()
    return 0


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise unless it is a dense tensor of a dtype that the kernels have, with values in memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype in _KNOWN and settled(tensor):
        return
    check_values(name, tensor)
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known}, got {tensor.dtype}")


def check_values(name: str, tensor: Tensor) -> None:
    """Raise unless it is a dense tensor, of any dtype, with values in its own memory."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got layout {layout}")
    kind = type(tensor)
    if kind not in _PLAIN:
        if is_fake(tensor):
            return
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(
                f"{name} must be a plain tensor, got the subclass {kind.__name__}, whose values "
                f"kernels cannot reach; pass the tensors that it wraps, or leave it out"
            )
    if tensor.is_meta:
        raise ValueError(
            f"{name} must have values, got a tensor on the meta device; use to_empty() and load "
            f"weights first"
        )
    stored = tensor.untyped_storage().nbytes()
    if (tensor.storage_offset() + _reach(tensor)) * tensor.itemsize > stored:
        raise ValueError(
            f"{name} must have memory for all of its {tensor.numel()} elements; its storage has "
            f"been freed or cut to {stored} bytes"
        )


def _reach(tensor: Tensor) -> int:
    """How many elements of memory the tensor spans, from its first element to its last."""
    if not tensor.numel():
        return 0
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def is_row_major(tensor: Tensor) -> bool:
    """Whether memory has the values one after the other, in order and as they are."""
    return bool(settled(tensor)) or not (
        not tensor.is_contiguous() or tensor.is_neg() or tensor._is_zerotensor()
    )


def check_unshared(name: str, tensor: Tensor) -> None:
    """Raise if elements of the tensor share memory."""
    if not tensor.is_contiguous() and _shares_memory(tensor):
        raise ValueError(
            f"{name} is expanded, so that several of its elements share memory; pass {name}.clone()"
        )


def _shares_memory(tensor: Tensor) -> bool:
    """Whether two elements share an address."""
    reach, certain = 0, True
    axes = [axis for axis in zip(tensor.stride(), tensor.shape, strict=True) if axis[1] != 1]
    for stride, size in sorted(axes):
        if stride == 0:
            return tensor.numel() > 0
        certain &= stride > reach
        reach += stride * (size - 1)
    if certain or not tensor.numel():
        return False
    # The axes interlock, which is rare: list the address of every element.
    places = torch.arange(reach + 1, device="cpu").as_strided(tensor.shape, tensor.stride())
    return len(set(places.flatten().tolist())) < tensor.numel()


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise unless the values are contiguous in row-major order."""
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(f"{name} must be contiguous; pass {name}.clone()")


def check_like(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype) -> None:
    """Raise unless the tensor has theta's shape and device and the dtype."""
    if tensor.shape != theta.shape or tensor.dtype != dtype or tensor.device != theta.device:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {tuple(theta.shape)} on {theta.device}, "
            f"got {tensor.dtype}, {tuple(tensor.shape)} on {tensor.device}"
        )
    check_unshared(name, tensor)


def check_read(name: str, tensor: Tensor, theta: Tensor) -> None:
    """Raise unless a kernel can read the tensor beside theta."""
    check_tensor(name, tensor)
    if tensor.device != theta.device:
        raise ValueError(
            f"{name} must be on {theta.device} as the other operands, got {tensor.device}; "
            f"pass {name}.to({str(theta.device)!r})"
        )


def dense(tensor: Tensor) -> Tensor:
    """The values contiguous in row-major order: the tensor detached, or a copy if it is laid out
    otherwise. The shape stays."""
    return _dense(detached(tensor))


def _dense(values: Tensor) -> Tensor:
    return values if settled(values) else _resolved(values).contiguous()


def _resolved(values: Tensor) -> Tensor:
    """A tensor whose memory holds the values: torch may apply a sign, or zeros, lazily."""
    return values.clone() if values.is_neg() or values._is_zerotensor() else values


def detached(tensor: Tensor) -> Tensor:
    """The tensor outside autograd: itself, where it is not inside, for a view costs more."""
    return tensor.detach() if tensor.requires_grad else tensor


def flat(tensor: Tensor, backend: ModuleType) -> Tensor:
    """A contiguous tensor outside autograd as an implementation takes it: flat, or as it is where
    the implementation reads no shape."""
    return tensor if getattr(backend, "SHAPELESS", False) else tensor.detach().view(-1)


@contextlib.contextmanager
def contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """As `dense`, but what is written to the result is copied to the tensor on leaving."""
    target = tensor.detach()
    values = kept(_dense, target)
    yield values
    if values is not target:
        once(target.copy_, values)


def check_apart(**written: Tensor | Sequence[Tensor] | None) -> None:
    """Raise if two tensors that are written share memory."""
    named = [
        (name, tensor)
        for name, tensors in written.items()
        for tensor in ([tensors] if isinstance(tensors, Tensor) else tensors or ())
    ]
    pair = _overlap(tuple([extent(tensor) for _, tensor in named]))
    if pair is not None:
        name, other = (named[i][0] for i in sorted(pair))
        raise ValueError(
            f"{name} and {other} must not share memory, for both are written; pass {other}.clone()"
        )


def undisturbed(*tensors: Tensor | None) -> bool:
    """Whether all are settled, and no two share memory: nothing to copy, and nothing to refuse but
    shapes, dtypes and devices."""
    spans = []
    for tensor in tensors:
        if tensor is not None:
            start = settled(tensor)
            if not start:
                return False
            spans.append((start, start + tensor.nbytes))
    return _overlap(tuple(spans)) is None


@functools.lru_cache(maxsize=256)
def _overlap(spans: tuple[tuple[int, int], ...]) -> tuple[int, int] | None:
    """The numbers of two spans of bytes that overlap, if any do."""
    order = sorted((span, i) for i, span in enumerate(spans) if span[0] < span[1])
    for ((_, stop), i), ((start, _), j) in itertools.pairwise(order):
        if start < stop:
            return i, j
    return None


def apart(tensor: Tensor, *written: Tensor | None, same: bool = False) -> Tensor:
    """A tensor to read from, detached; a copy if it shares memory with a tensor that is written.

    Args:
        same: allow it to be exactly one of the written tensors, without a copy: each element is
            read before it is written.
    """
    tensor = detached(tensor)
    start = settled(tensor)
    if start:
        stop = start + tensor.nbytes
    else:
        tensor = _resolved(tensor)
        start, stop = extent(tensor)
    for target in written:
        if target is None:
            continue
        first, last = extent(target)
        if first < stop and start < last and not (same and tensor.is_set_to(target)):
            return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def extent(tensor: Tensor) -> tuple[int, int]:
    """The address of the first byte, and of the byte after the last; (0, 0) for empty and fake
    tensors, which have no address."""
    if is_fake(tensor) or not tensor.numel():
        return 0, 0
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    return start, start + _reach(tensor) * tensor.itemsize


def address(tensor: Tensor, *dtypes: torch.dtype) -> int:
    """The address of a contiguous tensor's first element.

    Args:
        dtypes: those that the kernel reads.

    Raises:
        TypeError, ValueError: another dtype, a tensor that is not contiguous, or memory that has
            been freed or cut.
    """
    if tensor.dtype in dtypes:
        place = settled(tensor)
        if place:
            return place
    else:
        known = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"a kernel's operand must be of {known}, got {tensor.dtype}")
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(
            f"a kernel's operand must be dense, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; pass operands.dense(tensor)"
        )
    check_values("a kernel's operand", tensor)
    return tensor.data_ptr()
