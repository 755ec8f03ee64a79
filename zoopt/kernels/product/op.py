"""theta plus a low-rank product, and what of the gradient goes beside it: one pass over theta."""

from __future__ import annotations

from torch import Tensor

from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.batch import check_tensor, check_unshared, contiguous
from zoopt.kernels.noise.key import NoiseKey, check_unsigned


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
        left, right: (m, r) and (n, r), in the accumulator's dtype or in theta's. Where bfloat16
            matrices are multiplied as they are, those of a bfloat16 theta are rounded to it.
        alpha: multiplies their product.
        decay: multiplies theta, 1 - lr weight_decay say.
        gradient: (m, n), any of theta's dtypes.
        channel_scale: (m, 1) or (1, n) or (1, 1), in the accumulator's dtype.
        sign_of: (m, r) and (n, r), the part of the gradient whose complement's signs are added.
        sign_step: what they are multiplied by.
        key: the noise of theta, whose bits round it.
        rounding_draw: 32 bits; the draw whose bits round theta stochastically. Default: to nearest.
        impl: as for `perturb`. Sums of r products are made in the implementation's own order, so
            that results agree to rounding, not in all bits.

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
    pairs = {"left, right": (left, right), "sign_of": sign_of or (None, None)}
    for name, (first, second) in pairs.items():
        if (first is None) != (second is None):
            raise ValueError(f"{name} must both be tensors or both be None")
        if first is not None and second is not None:
            r = first.shape[-1]
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
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        if theta.dtype == accumulator_dtype(theta.dtype):
            rounding_draw = None
    alpha, decay, sign_step = scalars([alpha, decay, sign_step], theta.dtype)
    backend = dispatch.choose(theta, impl, "product")
    with contiguous(theta) as dense:
        backend.add_product(
            dense,
            left,
            right,
            alpha,
            decay,
            gradient,
            channel_scale,
            sign_of,
            sign_step,
            key,
            rounding_draw,
        )
    return theta
