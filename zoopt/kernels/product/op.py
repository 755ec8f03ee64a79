"""Adds a low-rank product and terms of the gradient to theta, in one pass over theta."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch, as_batch
from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.operands import apart, check_read, check_tensor

Factors = tuple[Tensor, Tensor]


@overload
def add_product_(
    theta: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    alpha: float = 1.0,
    decay: float = 1.0,
    gradient: Tensor | None = None,
    channel_scale: Tensor | None = None,
    sign_of: Factors | None = None,
    sign_step: float = 0.0,
    key: NoiseKey,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def add_product_(
    theta: Batch,
    left: Sequence[Tensor] | None,
    right: Sequence[Tensor] | None,
    *,
    alpha: float = 1.0,
    decay: float = 1.0,
    gradient: Sequence[Tensor] | None = None,
    channel_scale: Sequence[Tensor] | None = None,
    sign_of: Sequence[Factors] | None = None,
    sign_step: float = 0.0,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Batch: ...


def add_product_(
    theta: Tensor | Batch,
    left: Tensor | Sequence[Tensor] | None,
    right: Tensor | Sequence[Tensor] | None,
    *,
    alpha: float = 1.0,
    decay: float = 1.0,
    gradient: Tensor | Sequence[Tensor] | None = None,
    channel_scale: Tensor | Sequence[Tensor] | None = None,
    sign_of: Factors | Sequence[Factors] | None = None,
    sign_step: float = 0.0,
    key: NoiseKey | None = None,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Tensor | Batch:
    """theta <- round(decay theta + alpha left right^T + channel_scale gradient + sign_step S),
    in place,

    with S = sign(gradient - sign_of[0] sign_of[1]^T). Terms whose tensors are None are absent.

    Args:
        theta: (m, n), a dense float32, bfloat16, float16 or float64 tensor; or a batch of such
            matrices, all of one shape. The other operands are then sequences with one tensor for
            each matrix, all of one dtype.
        left, right: (m, r) and (n, r), in the accumulator's dtype or in theta's. They are rounded
            to a 16-bit dtype of theta where the hardware multiplies such matrices directly
            (bfloat16 on some processors, bfloat16 and float16 on a GPU).
        alpha: the product's factor.
        decay: theta's factor, for example 1 - lr weight_decay.
        gradient: (m, n), any of theta's dtypes.
        channel_scale: (m, 1) or (1, n) or (1, 1), in the accumulator's dtype.
        sign_of: (m, r) and (n, r), factors of the part that is subtracted before the sign is taken.
        sign_step: the signs' factor.
        key: theta's noise key, whose random bits round theta; a batch has its own keys.
        rounding_draw: 32 bits; the draw of the bits for stochastic rounding. Default: round to
            nearest.
        impl: as for `perturb`. Each implementation sums r products in its own order, so results
            agree up to rounding, not bit for bit.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: an argument is out of range, or tensors do not match.
    """
    batch = as_batch(theta, key)
    shape = batch.tensors[0].shape
    if len(shape) != 2:
        raise ValueError(f"theta must be a matrix, got shape {tuple(shape)}")
    operands: list[Any] = [(left, right, gradient, channel_scale, sign_of)]
    if isinstance(theta, Batch):
        operands = _each(batch, left, right, gradient, channel_scale, sign_of)
    for own, beside in zip(batch.tensors, operands, strict=True):
        _check(own, *beside)
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        if batch.dtype == accumulator_dtype(batch.dtype):
            rounding_draw = None
    alpha, decay, sign_step = scalars([alpha, decay, sign_step], batch.dtype)
    backend = dispatch.choose(batch.tensors[0], impl, "product")
    with batch.contiguous() as target, _precise(batch.tensors[0]):
        # The product may be added in parts, so operands that share memory with theta are copied.
        operands = [
            kept(_apart, own, *beside) for own, beside in zip(target.tensors, operands, strict=True)
        ]
        if dispatch.takes_batches(backend):
            lefts, rights, gradients, scales, signs = (
                None if part[0] is None else part for part in zip(*operands, strict=True)
            )
            once(
                backend.add_product,
                *(target, lefts, rights, alpha, decay, gradients, scales, signs, sign_step),
                rounding_draw,
            )
            return theta
        each = zip(target.tensors, target.keys, operands, strict=True)
        for own, own_key, (first, second, g, scale, signs_of) in pieces(each):
            if own.numel():
                backend.add_product(
                    *(own, first, second, alpha, decay, g, scale, signs_of, sign_step),
                    *(own_key, rounding_draw),
                )
    return theta


#: left, right, gradient, channel_scale and sign_of for one matrix.
Operands = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Factors | None]


def _each(batch: Batch, *operands: Any) -> list[Any]:
    """The operands of each matrix of a batch, all of one dtype and shape."""
    if len(batch) == 1 and all(operand is None or len(operand) == 1 for operand in operands):
        return [tuple([None if operand is None else operand[0] for operand in operands])]
    shapes = {tuple(own.shape) for own in batch.tensors}
    if len(shapes) > 1:
        raise ValueError(f"the matrices of a batch must have one shape, got {sorted(shapes)}")
    names = ("left", "right", "gradient", "channel_scale", "sign_of")
    columns: list[Sequence[Any]] = []
    for name, operand in zip(names, operands, strict=True):
        if operand is None:
            columns.append([None] * len(batch))
            continue
        if len(operand) != len(batch):
            raise ValueError(
                f"{name} must be one for each of the batch's {len(batch)} tensors, "
                f"got {len(operand)}"
            )
        columns.append(operand)
        parts = [own if name == "sign_of" else (own,) for own in operand]
        found = {tuple((t.dtype, tuple(t.shape)) for t in part) for part in parts}
        if len(found) > 1:
            raise ValueError(
                f"{name} must be of one dtype and shape in a batch, got {sorted(map(str, found))}"
            )
    return list(zip(*columns, strict=True))


def _apart(
    theta: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    gradient: Tensor | None,
    channel_scale: Tensor | None,
    sign_of: Factors | None,
) -> Operands:
    return (
        None if left is None else apart(left, theta),
        None if right is None else apart(right, theta),
        None if gradient is None else apart(gradient, theta, same=True),
        None if channel_scale is None else apart(channel_scale, theta),
        None if sign_of is None else (apart(sign_of[0], theta), apart(sign_of[1], theta)),
    )


def _check(
    theta: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    gradient: Tensor | None,
    channel_scale: Tensor | None,
    sign_of: Factors | None,
) -> None:
    """Raise unless these operands match theta (m, n)."""
    m, n = theta.shape
    for name, tensor in (
        ("gradient", gradient),
        ("channel_scale", channel_scale),
        ("left", left),
        ("right", right),
        *((("sign_of", sign_of[0]), ("sign_of's second", sign_of[1])) if sign_of else ()),
    ):
        if tensor is not None:
            check_read(name, tensor, theta)
    _check_pair("left, right", left, right, m, n)
    if sign_of is not None:
        _check_pair("sign_of", *sign_of, m, n)
    if (channel_scale is not None or sign_of is not None) and (
        gradient is None or gradient.shape != theta.shape
    ):
        raise ValueError(f"gradient must have theta's shape ({m}, {n})")
    if channel_scale is not None and tuple(channel_scale.shape) not in ((m, 1), (1, n), (1, 1)):
        raise ValueError(
            f"channel_scale must have shape ({m}, 1), (1, {n}) or (1, 1), "
            f"got {tuple(channel_scale.shape)}"
        )
    wide = accumulator_dtype(theta.dtype)
    if channel_scale is not None and channel_scale.dtype != wide:
        raise TypeError(f"channel_scale must be of {wide}, got {channel_scale.dtype}")


def _check_pair(name: str, first: Tensor | None, second: Tensor | None, m: int, n: int) -> None:
    if (first is None) != (second is None):
        raise ValueError(f"{name} must both be tensors or both be None")
    if first is not None and second is not None:
        r = first.shape[-1] if first.dim() else 0
        if first.shape != (m, r) or second.shape != (n, r):
            raise ValueError(
                f"{name} must have shapes ({m}, r) and ({n}, r), got {tuple(first.shape)} "
                f"and {tuple(second.shape)}"
            )


def squares(gradient: Tensor | Sequence[Tensor], axis: int, *, impl: str | None = None) -> Tensor:
    """The sums of squares of a matrix's rows (axis 1) or columns (axis 0): (m,) or (n,).

    The result has the accumulator's dtype. Each implementation sums in its own order. On a GPU the
    matrix is read once. For several matrices of one shape the result is (count, m) or (count, n).

    Raises:
        TypeError, ValueError: not a dense matrix, matrices of different shapes, or another axis.
    """
    gradients = (gradient,) if isinstance(gradient, Tensor) else gradient
    for own in gradients:
        check_tensor("gradient", own)
        if own.dim() != 2 or own.shape != gradients[0].shape or axis not in (0, 1):
            raise ValueError(
                f"gradient must be a matrix and axis 0 or 1, or matrices of one shape, got "
                f"{tuple(own.shape)} and {axis!r}"
            )
    first = gradients[0]
    backend, wide = dispatch.choose(first, impl, "product"), accumulator_dtype(first.dtype)
    values = [own.detach() for own in gradients]
    if dispatch.takes_batches(backend):
        found: Tensor = backend.squares(values, axis, wide)
    elif len(values) == 1:
        found = backend.squares(values[0], axis, wide).unsqueeze(0)
    else:
        found = torch.stack([backend.squares(own, axis, wide) for own in values])
    return found[0] if isinstance(gradient, Tensor) else found


def _precise(theta: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Disable autocast, so that products keep the dtypes of their operands."""
    device = theta.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
