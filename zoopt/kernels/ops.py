"""The public operations: check the arguments, choose an implementation, run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from zoopt.kernels import dispatch
from zoopt.kernels.key import Distribution, NoiseKey, Rounding, check_unsigned

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def perturb(
    theta: Tensor,
    alpha: float,
    *,
    seed: int,
    stream: int,
    draw: int,
    offset: int = 0,
    distribution: Distribution = "normal",
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """theta + alpha z, rounded to nearest; z = z(seed, stream, draw, offset + index).

    Args:
        theta: a dense float32, bfloat16, float16 or float64 tensor of any shape.
        alpha: the scale of the direction (rounded to float32, or float64 for float64).
        seed, stream, draw: 64, 32 and 32 bits: the run, the tensor, the direction.
        offset: position of theta's first element in the whole, unsharded tensor.
        distribution: `"normal"` or `"rademacher"`.
        out: where the result goes: `theta` itself for in place, or a tensor of its shape, dtype
            and device that shares no memory with it. Default: a new contiguous tensor.
        impl: `"reference"`, `"numba"`, `"triton"`, or None for the fastest that can run.

    Returns:
        `out`. All implementations return the same bits (but for the payloads of NaNs).

    Raises:
        TypeError: not a tensor, or of an unsupported dtype or layout.
        ValueError: an argument out of range, an `out` that does not match, an `impl` that is not
            available.

    A tensor that is not contiguous is worked on through a contiguous copy.
    """
    key = NoiseKey(seed, stream, offset, distribution)
    _check_tensor("theta", theta)
    check_unsigned("draw", draw, 32)
    backend = dispatch.choose(theta, impl)
    if out is None:
        out = torch.empty_like(theta, memory_format=torch.contiguous_format)
    elif out is not theta:
        _check_tensor("out", out)
        _check_like("out", out, theta, theta.dtype)
    if theta.numel():
        [coefficient] = _scalars([alpha], theta.dtype)
        source, target = theta.detach().contiguous(), out.detach()
        dense = target if target.is_contiguous() else torch.empty_like(source)
        backend.weighted_sum(source.view(-1), dense.view(-1), [coefficient], [draw], 1.0, key, None)
        if dense is not target:
            target.copy_(dense)
    return out


def apply_(
    theta: Tensor,
    coefficients: Sequence[float],
    *,
    seed: int,
    stream: int,
    draws: Sequence[int],
    decay: float = 1.0,
    offset: int = 0,
    distribution: Distribution = "normal",
    rounding: Rounding = "nearest",
    impl: str | None = None,
) -> Tensor:
    """theta <- round(decay theta + sum_j coefficients[j] z(draws[j])), in place.

    One read and one write of theta however many directions are added; the sum runs in float32
    (float64 for float64) in the order of `draws` and is rounded once.

    Args:
        theta: a dense float32, bfloat16, float16 or float64 tensor of any shape.
        coefficients: one number a direction (rounded to float32, or float64 for float64).
        draws: the directions' numbers, 32 bits each.
        decay: multiplies theta, 1 - lr weight_decay say.
        rounding: `"nearest"`, or `"stochastic"`: up or down with the probability that makes the
            expectation exact, by random bits that belong to the last of `draws`. Without effect on
            float32 and float64, which are the accumulator's own type.
        seed, stream, offset, distribution, impl: as for `perturb`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `perturb`; also coefficients and draws of unequal length,
            stochastic rounding without a direction, or a theta whose elements share memory.
    """
    key = NoiseKey(seed, stream, offset, distribution)
    _check_tensor("theta", theta)
    _check_unshared("theta", theta)
    rounding_draw = _check_directions(coefficients, draws, rounding, theta.dtype)
    backend = dispatch.choose(theta, impl)
    if theta.numel():
        numbers = _scalars([*coefficients, decay], theta.dtype)
        target = theta.detach()
        dense = target.contiguous()
        flat = dense.view(-1)
        backend.weighted_sum(flat, flat, numbers[:-1], list(draws), numbers[-1], key, rounding_draw)
        if dense is not target:
            target.copy_(dense)
    return theta


def momentum_(
    theta: Tensor,
    buffer: Tensor,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    *,
    momentum: float,
    step_size: float,
    seed: int,
    stream: int,
    draws: Sequence[int],
    decay: float = 1.0,
    offset: int = 0,
    distribution: Distribution = "normal",
    rounding: Rounding = "nearest",
    impl: str | None = None,
) -> Tensor:
    """One pass over theta and a momentum buffer, in place:

        buffer <- momentum buffer + sum_j gradients[j] z(draws[j])
        theta  <- round(decay theta + sum_j coefficients[j] z(draws[j]) + step_size buffer)

    Args:
        theta: a dense tensor, as for `apply_`.
        buffer: contiguous, of theta's shape and device; float32 (float64 for float64).
        coefficients: one number a direction: what theta itself receives (a restored perturbation).
        gradients: one number a direction: its projected gradient.
        momentum, step_size: numbers, as in the formula.
        seed, stream, draws, decay, offset, distribution, rounding, impl: as for `apply_`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `apply_`, or a buffer that does not match.
    """
    key = NoiseKey(seed, stream, offset, distribution)
    _check_tensor("theta", theta)
    _check_unshared("theta", theta)
    _check_like("buffer", buffer, theta, accumulator_dtype(theta.dtype))
    if not buffer.is_contiguous():
        raise ValueError("buffer must be contiguous; pass buffer.contiguous()")
    rounding_draw = _check_directions(coefficients, draws, rounding, theta.dtype)
    _check_directions(gradients, draws, rounding, theta.dtype)
    backend = dispatch.choose(theta, impl)
    if theta.numel():
        numbers = _scalars([decay, momentum, step_size], theta.dtype)
        target = theta.detach()
        dense = target.contiguous()
        backend.momentum_sum(
            dense.view(-1),
            buffer.detach().view(-1),
            _scalars(coefficients, theta.dtype),
            _scalars(gradients, theta.dtype),
            list(draws),
            *numbers,
            key,
            rounding_draw,
        )
        if dense is not target:
            target.copy_(dense)
    return theta


def perturb_rows(
    weight: Tensor,
    rows: Tensor,
    alpha: float,
    *,
    seed: int,
    stream: int,
    draw: int,
    offset: int = 0,
    distribution: Distribution = "normal",
    impl: str | None = None,
) -> Tensor:
    """The rows of `perturb(weight, alpha, ...)` that an embedding gathers, and no others.

    Args:
        weight: a dense tensor, (V, d), as for `perturb`.
        rows: integers in [0, V), any shape.
        alpha, seed, stream, draw, offset, distribution, impl: as for `perturb`.

    Returns:
        A new tensor, (*rows.shape, d), with the bits of `perturb(weight, ...)[rows]`.

    Raises:
        TypeError, ValueError: as for `perturb`, or a weight that is not a matrix.
        IndexError: a row outside [0, V).
    """
    key = NoiseKey(seed, stream, offset, distribution)
    _check_tensor("weight", weight)
    check_unsigned("draw", draw, 32)
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rows must be int64 or int32, got {rows.dtype}")
    backend = dispatch.choose(weight, impl)
    out = weight.new_empty((*rows.shape, weight.shape[1]))
    if out.numel():
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"rows must lie in [0, {weight.shape[0]}), got values from {low} to {high}"
            )
        [coefficient] = _scalars([alpha], weight.dtype)
        backend.gather_rows(
            weight.detach().contiguous(),
            rows.reshape(-1).long().contiguous(),
            out.view(-1, weight.shape[1]),
            coefficient,
            key,
            draw,
        )
    return out


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulator's dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scalars(values: Sequence[float], dtype: torch.dtype) -> list[float]:
    """The numbers as every implementation sees them: rounded to the accumulator's dtype."""
    if dtype == torch.float64:
        return [float(value) for value in values]
    return torch.tensor(list(values), dtype=torch.float64).float().tolist()


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known}, got {tensor.dtype}")


def _check_unshared(name: str, tensor: Tensor) -> None:
    if any(stride == 0 < size - 1 for size, stride in zip(tensor.shape, tensor.stride())):  # noqa: B905
        raise ValueError(
            f"{name} is expanded, so that several of its elements share memory; pass {name}.clone()"
        )


def _check_like(name: str, tensor: Tensor, theta: Tensor, dtype: torch.dtype) -> None:
    if tensor.shape != theta.shape or tensor.dtype != dtype or tensor.device != theta.device:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {tuple(theta.shape)} on {theta.device}, "
            f"got {tensor.dtype}, {tuple(tensor.shape)} on {tensor.device}"
        )
    _check_unshared(name, tensor)


def _check_directions(
    coefficients: Sequence[float], draws: Sequence[int], rounding: str, dtype: torch.dtype
) -> int | None:
    """The draw whose bits round, or None where rounding is to nearest or not needed."""
    if len(coefficients) != len(draws):
        raise ValueError(
            f"coefficients and draws must have equal lengths, "
            f"got {len(coefficients)} and {len(draws)}"
        )
    for draw in draws:
        check_unsigned("draw", draw, 32)
    if rounding not in get_args(Rounding):
        known = ", ".join(map(repr, get_args(Rounding)))
        raise ValueError(f"rounding must be one of {known}, got {rounding!r}")
    if rounding == "stochastic" and not draws:
        raise ValueError("rounding='stochastic' needs at least one draw, got none")
    exact = dtype == accumulator_dtype(dtype)
    return None if rounding == "nearest" or exact else draws[-1]
