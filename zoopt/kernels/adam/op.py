"""Adam's operations: moments decoded, averaged, used and encoded again in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.checks import check_number
from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.adam.moments import Moment
from zoopt.kernels.adam.reference import Numbers
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.operands import (
    apart,
    check_apart,
    check_dense,
    check_like,
    check_read,
    check_tensor,
    check_unshared,
    contiguous,
    dense,
)


def adam_(
    gradient: Tensor,
    first: Moment,
    second: Moment,
    *,
    betas: tuple[float, float],
    scale: float,
    eps: float,
    key: NoiseKey,
    moment_draw: int | None = None,
    out: Tensor | None = None,
    norms: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Update Adam's moments in place, and return the direction that they give:

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g g,    out = (scale m) / (sqrt(v) + eps)

    With scale = sqrt(1 - b2^t) / (1 - b1^t) and eps = sqrt(1 - b2^t) times Adam's, out is Adam's
    mhat / (sqrt(vhat) + eps). It is of the moments before they are rounded to their format.

    Args:
        gradient: dense, any shape; float32, bfloat16, float16 or float64. Read in row-major order.
        first, second: moments of as many elements, signed and unsigned.
        betas: both in [0, 1).
        scale, eps: numbers, as in the formula; eps at least 0.
        key: the noise of the tensor, whose bits round its moments.
        moment_draw: 32 bits; the draw whose bits round bfloat16 and coded moments stochastically.
            Default: they are rounded to nearest.
        out: contiguous, of gradient's shape, in the accumulator's dtype or rounded to nearest in
            the gradient's; it may be the gradient. Default: a new tensor of the accumulator's.
        norms: contiguous, (2, rows) in the accumulator's dtype, for a gradient of shape (rows, r):
            receives the sums of squares of each row of out, before it is rounded, and of the
            gradient, summed in the implementation's own order. Default: they are not computed.
        impl: as for `perturb`.

    Returns:
        out.

    Raises:
        TypeError, ValueError: an argument out of range, or tensors that do not match.
    """
    numbers = _checked(gradient, first, second, betas, scale, eps, moment_draw)
    wide = first.accumulator
    if out is None:
        out = torch.empty(gradient.shape, dtype=wide, device=gradient.device)
    else:
        check_tensor("out", out)
        if (
            out.shape != gradient.shape
            or out.dtype not in (wide, gradient.dtype)
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"out must be a contiguous {wide} or {gradient.dtype} tensor of shape "
                f"{tuple(gradient.shape)}, got {out.dtype} {tuple(out.shape)}"
            )
        check_like("out", out, gradient, out.dtype)
        check_dense("out", out)
    if norms is not None:
        check_tensor("norms", norms)
        if gradient.dim() != 2:
            raise ValueError(f"gradient must be a matrix for norms, got {tuple(gradient.shape)}")
        shape = (2, gradient.shape[0])
        if tuple(norms.shape) != shape or norms.dtype != wide or not norms.is_contiguous():
            raise ValueError(
                f"norms must be a contiguous {wide} tensor of shape {shape}, "
                f"got {norms.dtype} {tuple(norms.shape)}"
            )
        check_read("norms", norms, gradient)
        check_dense("norms", norms)
    backend = dispatch.choose(_widest(gradient, first), impl, "adam")
    if not gradient.numel():
        if norms is not None:
            norms.zero_()
        return out
    written = {"out": out.detach(), "norms": norms, **_stored(first, second)}
    check_apart(**written)
    values = apart(dense(gradient), *written.values(), same=True)
    flat, target = values.view(-1), out.detach().view(-1)
    backend.adam(flat, first, second, target, numbers, key, moment_draw, norms)
    return out


def adamw_(
    theta: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    *,
    betas: tuple[float, float],
    scale: float,
    eps: float,
    decay: float,
    key: NoiseKey,
    moment_draw: int | None = None,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """theta <- round(decay theta + (scale m) / (sqrt(v) + eps)), with the moments as in `adam_`.

    Args:
        theta: a dense float32, bfloat16, float16 or float64 tensor.
        gradient: of theta's shape.
        scale: as for `adam_`, times -lr to descend.
        decay: multiplies theta, 1 - lr weight_decay say.
        rounding_draw: 32 bits; the draw whose bits round theta stochastically. Default: to nearest.
        first, second, betas, eps, key, moment_draw, impl: as for `adam_`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `adam_`.
    """
    check_tensor("theta", theta)
    check_unshared("theta", theta)
    check_read("gradient", gradient, theta)
    if gradient.shape != theta.shape:
        raise ValueError(
            f"gradient must have theta's shape {tuple(theta.shape)}, got {tuple(gradient.shape)}"
        )
    numbers = _checked(gradient, first, second, betas, scale, eps, moment_draw)
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        if theta.dtype == accumulator_dtype(theta.dtype):
            rounding_draw = None
    [decay] = scalars([decay], theta.dtype)
    backend = dispatch.choose(_widest(theta, first), impl, "adam")
    if not theta.numel():
        return theta
    if gradient.dtype == torch.float64:
        gradient = gradient.to(first.accumulator)
    with contiguous(theta) as target:
        written = {"theta": target, **_stored(first, second)}
        check_apart(**written)
        values = apart(dense(gradient), *written.values(), same=True)
        backend.adamw(
            target.view(-1),
            values.view(-1),
            first,
            second,
            decay,
            numbers,
            key,
            moment_draw,
            rounding_draw,
        )
    return theta


def _widest(theta: Tensor, moment: Moment) -> Tensor:
    """The one of float64 of the two, which only the reference has; theta if neither is."""
    return moment.codes if moment.codes.dtype == torch.float64 else theta


def _stored(first: Moment, second: Moment) -> dict[str, Tensor | None]:
    """The tensors that both moments are written to."""
    return {
        "first": first.codes,
        "second": second.codes,
        "first_scale": first.scale,
        "second_scale": second.scale,
    }


def _checked(
    gradient: Tensor,
    first: Moment,
    second: Moment,
    betas: tuple[float, float],
    scale: float,
    eps: float,
    moment_draw: int | None,
) -> Numbers:
    """The numbers as every implementation sees them."""
    check_tensor("gradient", gradient)
    for name, moment, signed in (("first", first, True), ("second", second, False)):
        if moment.numel != gradient.numel() or moment.signed != signed:
            raise ValueError(
                f"{name} must be {'a signed' if signed else 'an unsigned'} moment of "
                f"{gradient.numel()} elements, got {moment.numel}, signed={moment.signed}"
            )
        if moment.codes.device != gradient.device:
            raise ValueError(
                f"{name} must be on the gradient's device {gradient.device}, "
                f"got {moment.codes.device}"
            )
    if first.format != second.format or first.accumulator != second.accumulator:
        raise ValueError(
            "first and second must have one format, "
            f"got {first.format} ({first.codes.dtype}) and {second.format} ({second.codes.dtype})"
        )
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, low=0.0, high=1.0, open_high=True)
    check_number("eps", eps, low=0.0)
    if moment_draw is not None:
        check_unsigned("moment_draw", moment_draw, 32)
    beta1, beta2 = betas
    numbers = [beta1, beta2, 1.0 - beta1, 1.0 - beta2, scale, eps]
    return Numbers(*scalars(numbers, first.accumulator))
