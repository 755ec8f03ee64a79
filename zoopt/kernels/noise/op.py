"""The operations that leave theta alone, and the checks of arguments that all operations share.

An operation checks its arguments, chooses an implementation and runs it.
"""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch
from torch import Tensor

from zoopt.kernels import dispatch
from zoopt.kernels.noise.key import Distribution, NoiseKey, check_unsigned

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
    density: float = 1.0,
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
        density: the fraction of elements that the direction moves, at random and anew for each
            draw; in [2^-17, 1], rounded to a multiple of 2^-16. The others keep their bits.
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
    key = NoiseKey(seed, stream, offset, distribution, density)
    check_tensor("theta", theta)
    check_unsigned("draw", draw, 32)
    backend = dispatch.choose(theta, impl)
    if out is None:
        out = torch.empty_like(theta, memory_format=torch.contiguous_format)
    elif out is not theta:
        check_tensor("out", out)
        check_like("out", out, theta, theta.dtype)
    if theta.numel():
        [coefficient] = scalars([alpha], theta.dtype)
        source, target = theta.detach().contiguous(), out.detach()
        dense = target if target.is_contiguous() else torch.empty_like(source)
        backend.weighted_sum(source.view(-1), dense.view(-1), [coefficient], [draw], 1.0, key, None)
        if dense is not target:
            target.copy_(dense)
    return out


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
    density: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """The rows of `perturb(weight, alpha, ...)` that an embedding gathers, and no others.

    Args:
        weight: a dense tensor, (V, d), as for `perturb`.
        rows: integers in [0, V), any shape.
        alpha, seed, stream, draw, offset, distribution, density, impl: as for `perturb`.

    Returns:
        A new tensor, (*rows.shape, d), with the bits of `perturb(weight, ...)[rows]`.

    Raises:
        TypeError, ValueError: as for `perturb`, or a weight that is not a matrix.
        IndexError: a row outside [0, V).
    """
    key = NoiseKey(seed, stream, offset, distribution, density)
    check_tensor("weight", weight)
    check_unsigned("draw", draw, 32)
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rows must be int64 or int32, got {rows.dtype}")
    backend = dispatch.choose(weight, impl)
    out = weight.new_empty((*rows.shape, weight.shape[1]))
    if out.numel() and not dispatch.is_fake(rows):
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"rows must lie in [0, {weight.shape[0]}), got values from {low} to {high}"
            )
    if out.numel():
        [coefficient] = scalars([alpha], weight.dtype)
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


def scalars(values: Sequence[float], dtype: torch.dtype) -> list[float]:
    """The numbers as every implementation sees them: rounded to the accumulator's dtype."""
    if dtype == torch.float64:
        return [float(value) for value in values]
    return array.array("f", values).tolist()


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
