"""What stands between tensors and addresses: operands are checked here, and addresses taken here.

A kernel is told where an operand begins, how many elements it has and how wide they are; it cannot
see strides, a subclass or a storage that is gone. So an operand must have values in memory of its
own. How it lies there is free: what is not dense and in row-major order is worked on through a copy
that is, and a result is copied back. Elements that are written must not share memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zoopt.dtypes import DTYPES
from zoopt.kernels.dispatch import is_fake

_PLAIN = (Tensor, torch.nn.Parameter)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise unless it is a dense tensor of a dtype that the kernels have, with values in memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_values(name, tensor)
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known}, got {tensor.dtype}")


def check_values(name: str, tensor: Tensor) -> None:
    """Raise unless it is a dense tensor with values in memory of its own, whatever they are."""
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
    """How many elements lie from the first one to the last one, those between them too."""
    if not tensor.numel():
        return 0
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def check_unshared(name: str, tensor: Tensor) -> None:
    """Raise if elements of the tensor share memory."""
    if not tensor.is_contiguous() and _shares_memory(tensor):
        raise ValueError(
            f"{name} is expanded, so that several of its elements share memory; pass {name}.clone()"
        )


def _shares_memory(tensor: Tensor) -> bool:
    """Whether two elements have one place."""
    reach, certain = 0, True
    axes = [axis for axis in zip(tensor.stride(), tensor.shape, strict=True) if axis[1] != 1]
    for stride, size in sorted(axes):
        if stride == 0:
            return tensor.numel() > 0
        certain &= stride > reach
        reach += stride * (size - 1)
    if certain or not tensor.numel():
        return False
    # Axes interlock, which hardly ever happens: each element's place is made.
    places = torch.arange(reach + 1, device="cpu").as_strided(tensor.shape, tensor.stride())
    return len(set(places.flatten().tolist())) < tensor.numel()


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise unless the values lie in row-major order, one after the other."""
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
    """The values in row-major order, one after the other: a view, or a copy where they do not lie
    so. It has the tensor's shape."""
    return _dense(tensor.detach())


def _dense(values: Tensor) -> Tensor:
    return _resolved(values).contiguous()


def _resolved(values: Tensor) -> Tensor:
    """The values as memory has them: torch may keep their signs, or that they are 0, aside."""
    return values.clone() if values.is_neg() or values._is_zerotensor() else values


@contextlib.contextmanager
def contiguous(tensor: Tensor) -> Iterator[Tensor]:
    """As `dense`; what is written there is the tensor's on leaving."""
    target = tensor.detach()
    values = _dense(target)
    yield values
    if values is not target:
        target.copy_(values)


def check_apart(**written: Tensor | Sequence[Tensor] | None) -> None:
    """Raise if two tensors that are written share memory."""
    named = [
        (name, tensor)
        for name, tensors in written.items()
        for tensor in ([tensors] if isinstance(tensors, Tensor) else tensors or ())
    ]
    pair = _overlap(tuple([_extent(tensor) for _, tensor in named]))
    if pair is not None:
        name, other = (named[i][0] for i in sorted(pair))
        raise ValueError(
            f"{name} and {other} must not share memory, for both are written; pass {other}.clone()"
        )


@functools.lru_cache(maxsize=256)
def _overlap(spans: tuple[tuple[int, int], ...]) -> tuple[int, int] | None:
    """The numbers of two spans of bytes that overlap, if any do."""
    order = sorted((span, i) for i, span in enumerate(spans) if span[0] < span[1])
    for ((_, stop), i), ((start, _), j) in itertools.pairwise(order):
        if start < stop:
            return i, j
    return None


def apart(tensor: Tensor, *written: Tensor | None, same: bool = False) -> Tensor:
    """What is read, detached, or a copy where it shares memory with what is written.

    Args:
        same: the very elements that are written, in their order, need no copy: each is read before
            it is written.
    """
    tensor = _resolved(tensor.detach())
    start, stop = _extent(tensor)
    for target in written:
        if target is None or (same and tensor.is_set_to(target)):
            continue
        first, last = _extent(target)
        if first < stop and start < last:
            return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The address of the first byte, and of the one after the last; of nothing, and of tensors
    without values, which are not anywhere, 0 and 0."""
    if is_fake(tensor) or not tensor.numel():
        return 0, 0
    start = tensor.data_ptr()
    return start, start + _reach(tensor) * tensor.itemsize


def address(tensor: Tensor, *dtypes: torch.dtype) -> int:
    """Where the first element of a dense tensor lies, which is followed by all others.

    Args:
        dtypes: those that the kernel reads.

    Raises:
        TypeError, ValueError: it is not such a tensor, or its memory has been freed or cut.
    """
    if tensor.dtype not in dtypes:
        known = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"a kernel's operand must be of {known}, got {tensor.dtype}")
    if not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(
            f"a kernel's operand must be dense, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; pass operands.dense(tensor)"
        )
    check_values("a kernel's operand", tensor)
    return tensor.data_ptr()
