"""theta plus a low-rank product and terms of the gradient, in one pass over theta."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.operands import (
    apart,
    check_read,
    check_tensor,
    check_unshared,
    contiguous,
)


def add_product_(
    theta: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    alpha: float = 1.0,
    decay: float = 1.0,
    gradient: Tensor | None = None,
    channel_scale: Tensor | None = None,
    sign_of: tuple[Tensor, Tensor] | None = None,
    sign_step: float = 0.0,
    key: NoiseKey,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """theta <- round(decay theta + alpha left right^T + channel_scale gradient + sign_step S),
    in place,

    with S = sign(gradient - sign_of[0] sign_of[1]^T). Terms whose tensors are None are absent.

    Args:
        theta: (m, n), a dense float32, bfloat16, float16 or float64 tensor.
        left, right: (m, r) and (n, r), in the accumulator's dtype or in theta's. Where matrices
            of theta's 16 bits are multiplied as they are (bfloat16 on some processors, both on a
            GPU), they are rounded to it.
        alpha: the product's factor.
        decay: theta's factor, for example 1 - lr weight_decay.
        gradient: (m, n), any of theta's dtypes.
        channel_scale: (m, 1) or (1, n) or (1, 1), in the accumulator's dtype.
        sign_of: (m, r) and (n, r), the part of the gradient whose complement's signs are added.
        sign_step: the signs' factor.
        key: the noise of theta, whose bits round it.
        rounding_draw: 32 bits; the draw whose bits round theta stochastically. Default: to nearest.
        impl: as for `perturb`. Each implementation sums r products in its own order, so results
            agree up to rounding, not in all bits.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: an argument out of range, or tensors that do not match.
    """
    check_tensor("theta", theta)
    check_unshared("theta", theta)
    if theta.dim() != 2:
        raise ValueError(f"theta must be a matrix, got shape {tuple(theta.shape)}")
    m, n = theta.shape
    read = {"gradient": gradient, "channel_scale": channel_scale, "left": left, "right": right}
    read |= {"sign_of": sign_of[0], "sign_of's second": sign_of[1]} if sign_of else {}
    for name, tensor in read.items():
        if tensor is not None:
            check_read(name, tensor, theta)
    pairs = {"left, right": (left, right), "sign_of": sign_of or (None, None)}
    for name, (first, second) in pairs.items():
        if (first is None) != (second is None):
            raise ValueError(f"{name} must both be tensors or both be None")
        if first is not None and second is not None:
            r = first.shape[-1] if first.dim() else 0
            if first.shape != (m, r) or second.shape != (n, r):
                raise ValueError(
                    f"{name} must have shapes ({m}, r) and ({n}, r), got {tuple(first.shape)} "
                    f"and {tuple(second.shape)}"
                )
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
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        if theta.dtype == accumulator_dtype(theta.dtype):
            rounding_draw = None
    alpha, decay, sign_step = scalars([alpha, decay, sign_step], theta.dtype)
    backend = dispatch.choose(theta, impl, "product")
    with contiguous(theta) as target, _precise(theta):
        # The product may be added in parts, so no operand may change in between.
        backend.add_product(
            target,
            None if left is None else apart(left, target),
            None if right is None else apart(right, target),
            alpha,
            decay,
            None if gradient is None else apart(gradient, target, same=True),
            None if channel_scale is None else apart(channel_scale, target),
            None if sign_of is None else tuple(apart(factor, target) for factor in sign_of),
            sign_step,
            key,
            rounding_draw,
        )
    return theta


def squares(gradient: Tensor, axis: int, *, impl: str | None = None) -> Tensor:
    """The sums of squares of a matrix's rows (axis 1) or columns (axis 0), in the accumulator's
    dtype and the implementation's own order: (m,) or (n,). On a GPU the matrix is read once.

    Raises:
        TypeError, ValueError: not a dense matrix, or another axis.
    """
    check_tensor("gradient", gradient)
    if gradient.dim() != 2 or axis not in (0, 1):
        raise ValueError(
            f"gradient must be a matrix and axis 0 or 1, got {tuple(gradient.shape)} and {axis!r}"
        )
    backend = dispatch.choose(gradient, impl, "product")
    found: Tensor = backend.squares(gradient.detach(), axis, accumulator_dtype(gradient.dtype))
    return found


def _precise(theta: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Without autocast: products keep the dtypes of their operands in every mode."""
    device = theta.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
