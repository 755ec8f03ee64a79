"""Adam on moments however they are stored, defined: plain PyTorch, as `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels import philox
from zoopt.kernels.key import NoiseKey
from zoopt.kernels.moments import Moment, decode, encode
from zoopt.kernels.reference import round_nearest, round_stochastic


def _halfwords(key: NoiseKey, numel: int, draw: int, purpose: int, device: torch.device) -> Tensor:
    """int64 (numel,) in [0, 65536): the random bits of elements offset ... offset + numel - 1."""
    index = torch.arange(key.offset, key.offset + numel, device=device)
    return philox.halfwords(index, seed=key.seed, stream=key.stream, draw=draw, purpose=purpose)


def _quotient(
    gradient: Tensor,
    first: Moment,
    second: Moment,
    beta1: float,
    beta2: float,
    scale: float,
    eps: float,
    complements: tuple[float, float],
    key: NoiseKey,
    moment_draw: int | None,
) -> Tensor:
    """Update both moments and return (scale m) / (sqrt(v) + eps): (k,), before m, v are stored."""
    g = gradient.to(first.accumulator)
    m = decode(first) * beta1 + g * complements[0]
    v = decode(second) * beta2 + g * g * complements[1]
    bits = None
    if moment_draw is not None:
        bits = _halfwords(key, g.numel(), moment_draw, philox.PURPOSE_MOMENTS, g.device)
    encode(m, first, bits)
    encode(v, second, bits)
    # As in `reference.adam_window`: float64's roots, rounded, are float32's correct ones.
    root = v.double().sqrt().to(v.dtype)
    return m * scale / (root + eps)


def adam(
    gradient: Tensor,
    first: Moment,
    second: Moment,
    out: Tensor,
    beta1: float,
    beta2: float,
    scale: float,
    eps: float,
    complements: tuple[float, float],
    key: NoiseKey,
    moment_draw: int | None,
) -> None:
    """m <- beta1 m + complements[0] g, v <- beta2 v + complements[1] g g, and out (k,) receives
    (scale m) / (sqrt(v) + eps) of the moments as they are before they are stored."""
    out.copy_(
        _quotient(gradient, first, second, beta1, beta2, scale, eps, complements, key, moment_draw)
    )


def adamw(
    theta: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    decay: float,
    beta1: float,
    beta2: float,
    scale: float,
    eps: float,
    complements: tuple[float, float],
    key: NoiseKey,
    moment_draw: int | None,
    rounding_draw: int | None,
) -> None:
    """theta (k,) <- round(decay theta + (scale m) / (sqrt(v) + eps)), the moments as in `adam`."""
    step = _quotient(
        gradient, first, second, beta1, beta2, scale, eps, complements, key, moment_draw
    )
    acc = theta.to(torch.promote_types(theta.dtype, step.dtype)) * decay + step
    if rounding_draw is None:
        theta.copy_(round_nearest(acc, theta.dtype))
        return
    bits = _halfwords(key, acc.numel(), rounding_draw, philox.PURPOSE_ROUNDING, acc.device)
    theta.copy_(round_stochastic(acc, theta.dtype, bits))
