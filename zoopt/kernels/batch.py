"""Tensors on their way to the kernels: what may go there, and in which memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from zoopt.dtypes import DTYPES


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise unless it is a dense tensor of a dtype that the kernels have."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known}, got {tensor.dtype}")


def check_unshared(name: str, tensor: Tensor) -> None:
    """Raise if elements of the tensor share memory."""
    if tensor.is_contiguous():
        return
    if any(stride == 0 < size - 1 for size, stride in zip(tensor.shape, tensor.stride())):  # noqa: B905
        raise ValueError(
            f"{name} is expanded, so that several of its elements share memory; pass {name}.clone()"
        )


def check_like(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype) -> None:
    """Raise unless the tensor has theta's shape and device and the dtype."""
    if tensor.shape != theta.shape or tensor.dtype != dtype or tensor.device != theta.device:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {tuple(theta.shape)} on {theta.device}, "
            f"got {tensor.dtype}, {tuple(tensor.shape)} on {tensor.device}"
        )
    check_unshared(name, tensor)


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
