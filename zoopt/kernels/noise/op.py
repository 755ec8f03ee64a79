"""The operations that leave theta alone.

An operation checks its arguments, chooses an implementation and runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.dtypes import scalars
from zoopt.kernels import dispatch
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.operands import check_like, check_tensor, dense


def perturb(
    theta: Tensor,
    alpha: float,
    *,
    key: NoiseKey,
    draw: int,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """theta + alpha z, rounded to nearest; z = z(seed, stream, draw, offset + index) of the key.

    Args:
        theta: a dense float32, bfloat16, float16 or float64 tensor of any shape.
        alpha: the scale of the direction (rounded to float32, or float64 for float64).
        key: the noise of theta. With a density below 1, elements that the direction does not move
            keep their bits.
        draw: the direction's number, 32 bits.
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
        source, target = dense(theta), out.detach()
        result = target if target.is_contiguous() else torch.empty_like(source)
        backend.weighted_sum(
            source.view(-1), result.view(-1), [coefficient], [draw], 1.0, key, None
        )
        if result is not target:
            target.copy_(result)
    return out


def perturb_rows(
    weight: Tensor,
    rows: Tensor,
    alpha: float,
    *,
    key: NoiseKey,
    draw: int,
    impl: str | None = None,
) -> Tensor:
    """The rows of `perturb(weight, alpha, ...)` that an embedding gathers, and no others.

    Args:
        weight: a dense tensor, (V, d), as for `perturb`.
        rows: integers in [0, V), any shape.
        alpha, key, draw, impl: as for `perturb`.

    Returns:
        A new tensor, (*rows.shape, d), with the bits of `perturb(weight, ...)[rows]`.

    Raises:
        TypeError, ValueError: as for `perturb`, or a weight that is not a matrix.
        IndexError: a row outside [0, V).
    """
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
            dense(weight),
            rows.reshape(-1).long().contiguous(),
            out.view(-1, weight.shape[1]),
            coefficient,
            key,
            draw,
        )
    return out
