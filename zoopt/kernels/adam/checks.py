"""Checks of the operands of Adam's operations, single ones and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoopt.kernels.adam.moments import Moment
from zoopt.kernels.batch import Batch, as_batch
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.operands import check_dense, check_like, check_read, check_tensor, dense

Item = TypeVar("Item", Tensor, Moment)


def row_major(gradient: Tensor | Batch, key: NoiseKey | None) -> Batch:
    """Gradients, which are only read, as a batch of contiguous tensors."""
    if isinstance(gradient, Batch):
        return as_batch(gradient, key).row_major()
    check_tensor("gradient", gradient)
    return as_batch(dense(gradient), key)


def each(name: str, operand: Item | Sequence[Item], batch: Batch) -> Sequence[Item]:
    """An operand for each of the batch's tensors."""
    several: Sequence[Any] = (operand,) if isinstance(operand, Tensor | Moment) else operand
    if len(several) != len(batch):
        raise ValueError(
            f"{name} must be one for each of the batch's {len(batch)} tensors, got {len(several)}"
        )
    return several


def outs_for(
    batch: Batch, out: Tensor | Sequence[Tensor] | None, wide: torch.dtype
) -> Sequence[Tensor]:
    """Where directions go: new tensors, or those given, which must match."""
    if out is None:
        return [torch.empty_like(tensor, dtype=wide) for tensor in batch.tensors]
    outs = each("out", out, batch)
    for own, gradient in zip(outs, batch.tensors, strict=True):
        check_tensor("out", own)
        if (
            own.shape != gradient.shape
            or own.dtype not in (wide, gradient.dtype)
            or own.dtype != outs[0].dtype
            or not own.is_contiguous()
        ):
            raise ValueError(
                f"out must be a contiguous {wide} or {gradient.dtype} tensor of shape "
                f"{tuple(gradient.shape)}, got {own.dtype} {tuple(own.shape)}"
            )
        check_like("out", own, gradient, own.dtype)
        check_dense("out", own)
    return outs


def check_norms(norms: Tensor, batch: Batch, wide: torch.dtype) -> None:
    """Raise unless norms is (2, rows), with `rows` the rows of all the batch's matrices."""
    check_tensor("norms", norms)
    for gradient in batch.tensors:
        if gradient.dim() != 2 or gradient.shape[1] != batch.tensors[0].shape[1]:
            raise ValueError(
                f"gradient must be a matrix for norms, and a batch's have rows of one length, got "
                f"{tuple(gradient.shape)}"
            )
    shape = (2, sum(len(gradient) for gradient in batch.tensors))
    if tuple(norms.shape) != shape or norms.dtype != wide or not norms.is_contiguous():
        raise ValueError(
            f"norms must be a contiguous {wide} tensor of shape {shape}, "
            f"got {norms.dtype} {tuple(norms.shape)}"
        )
    check_read("norms", norms, batch.tensors[0])
    check_dense("norms", norms)


def check_moments(batch: Batch, moments: Sequence[Moment], *, signed: bool, name: str) -> None:
    """Raise unless each moment matches its tensor, and is signed or unsigned as required."""
    for own, moment in zip(batch.tensors, moments, strict=True):
        if moment.numel != own.numel() or moment.signed != signed:
            raise ValueError(
                f"{name} must be {'a signed' if signed else 'an unsigned'} moment of "
                f"{own.numel()} elements, got {moment.numel}, signed={moment.signed}"
            )
        if moment.codes.device != own.device:
            raise ValueError(
                f"{name} must be on the gradient's device {own.device}, got {moment.codes.device}"
            )


def check_format(moments: Sequence[Moment]) -> None:
    """Raise unless all moments have one format."""
    dtype = moments[0].codes.dtype
    if all(moment.scale is None and moment.codes.dtype == dtype for moment in moments):
        return
    form = moments[0].format
    for moment in moments:
        if moment.format != form or moment.accumulator != moments[0].accumulator:
            raise ValueError(
                "first and second must have one format, "
                f"got {form} ({dtype}) and {moment.format} ({moment.codes.dtype})"
            )


def widest(batch: Batch, moments: Sequence[Moment]) -> Tensor:
    """The tensor that decides the implementation: a float64 one if there is any, which only the
    reference can take."""
    codes = moments[0].codes
    return codes if codes.dtype == torch.float64 else batch.tensors[0]


def memories(moment: Moment) -> tuple[Tensor | None, ...]:
    """The tensors that a moment is written to."""
    return moment.codes, moment.scale


def stored(name: str, moments: Sequence[Moment]) -> dict[str, Sequence[Tensor]]:
    """The tensors that moments are written to."""
    scales = [moment.scale for moment in moments if moment.scale is not None]
    return {name: [moment.codes for moment in moments], f"{name}_scale": scales}
