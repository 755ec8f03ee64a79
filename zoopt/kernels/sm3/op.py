"""SM3's operation: the update with one accumulator vector an axis, in one pass over theta.

Any shape is worked on as a matrix: the leading axes are its rows, the others its columns. A row's
bound is the least of its axes' accumulators, a row's maximum is reduced to each axis's, and columns
alike: least and greatest values are exact, so that nothing is lost on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zoopt.checks import check_number
from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
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


def sm3_(
    theta: Tensor,
    gradient: Tensor,
    accumulators: Sequence[Tensor],
    *,
    step_size: float,
    beta: float = 0.0,
    eps: float = 0.0,
    decay: float = 1.0,
    buffer: Tensor | None = None,
    momentum: float = 0.0,
    key: NoiseKey,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Update theta, its accumulators A_k (one an axis k) and its momentum buffer in place:

        nu  = min_k A_k + g g                       (beta > 0:  beta min_k A_k + (1 - beta) g g)
        u   = g / (sqrt(nu) + eps), and 0 where that divides by 0
        buffer <- momentum buffer + (1 - momentum) u,  u = buffer         (with a buffer)
        theta  <- round(decay theta + step_size u)
        A_k <- max of nu over all axes but k

    A gradient that is sparse in its rows leaves the other rows of theta, buffer and A_0 as they
    are, with what they have accumulated: A_k <- max(max of the present nu, min(A_k, max of A_0 over
    absent rows)) for k > 0, which is what zero rows of a dense gradient lead to at beta 0.

    A NaN counts as greater than infinity: an accumulator that is NaN bounds nothing, and stays.

    Args:
        theta: a dense float32, bfloat16, float16 or float64 tensor of any shape.
        gradient: of theta's shape, dense, or sparse in its first axis and coalesced.
        accumulators: for each of theta's axes (one for no axes) a vector of its size, in the
            accumulator's dtype; not negative.
        step_size: -lr to descend.
        beta, momentum: in [0, 1).
        eps: at least 0.
        decay: multiplies theta, 1 - lr weight_decay say.
        buffer: contiguous, of theta's shape in the accumulator's dtype. Default: no momentum.
        key: the noise of theta, whose bits round it.
        rounding_draw: 32 bits; the draw whose bits round theta stochastically. Default: to nearest.
        impl: as for `perturb`. All return the same bits (but for the payloads of NaNs).

    Returns:
        theta.

    Raises:
        TypeError, ValueError: an argument out of range, or tensors that do not match.
    """
    check_tensor("theta", theta)
    shape = tuple(theta.shape) or (1,)
    _check(theta, gradient, accumulators, shape, buffer)
    check_number("beta", beta, low=0.0, high=1.0, open_high=True)
    check_number("momentum", momentum, low=0.0, high=1.0, open_high=True)
    check_number("eps", eps, low=0.0)
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        if theta.dtype == accumulator_dtype(theta.dtype):
            rounding_draw = None
    keep, gain = (beta, 1.0 - beta) if beta else (1.0, 1.0)
    numbers = scalars([keep, gain, eps, decay, momentum, 1.0 - momentum, step_size], theta.dtype)
    backend = dispatch.choose(theta, impl, "sm3")
    values, rows, split = gradient.detach(), None, _split(shape)
    if gradient.is_sparse:
        values, rows, split = values.values(), _rows(values), 1
    if values.numel() == 0:
        return theta
    if values.dtype != theta.dtype:
        values = values.to(accumulator_dtype(theta.dtype))
    unbounded = accumulators[0].new_full((1,), math.inf)
    row = _bound(unbounded, accumulators[:split])
    column = _bound(unbounded, accumulators[split:])
    if rows is not None:
        row = row[rows]
    n = column.numel()
    new_row, new_column = torch.zeros_like(row), torch.zeros_like(column)
    with contiguous(theta) as target:
        named = {f"accumulator_{axis}": vector for axis, vector in enumerate(accumulators)}
        check_apart(theta=target, buffer=buffer, **named)
        backend.sm3(
            target.view(-1, n),
            apart(dense(values), target, buffer, same=True).view(-1, n),
            rows,
            row,
            column,
            new_row,
            new_column,
            None if buffer is None else buffer.view(-1, n),
            *numbers,
            key,
            rounding_draw,
        )
    if rows is None:
        _store(accumulators[:split], new_row)
        _store(accumulators[split:], new_column)
    else:
        _store_rows(accumulators, rows, new_row, new_column)
    return theta


def _rows(gradient: Tensor) -> Tensor:
    """The rows of a gradient that is sparse in them: int64, (k,), in order."""
    rows = gradient.indices()[0].contiguous()
    if rows.numel() and not dispatch.is_fake(rows):
        bounds = torch.stack((rows[0] >= 0, (rows.diff() > 0).all(), rows[-1] < len(gradient)))
        if not bounds.all():
            raise IndexError(
                f"gradient must have distinct rows in order, in [0, {len(gradient)}), "
                f"got rows from {int(rows.min())} to {int(rows.max())}; pass gradient.coalesce()"
            )
    return rows


def _split(shape: tuple[int, ...]) -> int:
    """How many leading axes make the rows, so that rows and columns together are the fewest."""
    return min(
        range(len(shape) + 1), key=lambda axis: math.prod(shape[:axis]) + math.prod(shape[axis:])
    )


def _bound(unbounded: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """The least of infinity, (1,), and vectors (a,), (b,) ... at each of a b ... positions."""
    bound = unbounded
    for vector in vectors:
        bound = torch.fmin(bound[:, None], vector).view(-1)
    return bound


def _store(accumulators: Sequence[Tensor], greatest: Tensor) -> None:
    """Each axis's vector (a,), (b,) ... <- the greatest over the other axes: (a b ...,)."""
    greatest = greatest.view([vector.numel() for vector in accumulators])
    for axis, vector in enumerate(accumulators):
        others = [other for other in range(len(accumulators)) if other != axis]
        vector.copy_(greatest.amax(others) if others else greatest)


def _store_rows(
    accumulators: Sequence[Tensor], rows: Tensor, new_row: Tensor, new_column: Tensor
) -> None:
    """As _store, for rows (k,) of the first axis only: new_row (k,), new_column (b c ...,)."""
    first, others = accumulators[0], accumulators[1:]
    absent = first.index_fill(0, rows, 0.0).amax()
    before = [torch.fmin(vector, absent) for vector in others]
    first.index_copy_(0, rows, new_row)
    _store(others, new_column)
    for vector, least in zip(others, before, strict=True):
        torch.maximum(vector, least, out=vector)


def _check(
    theta: Tensor,
    gradient: Tensor,
    accumulators: Sequence[Tensor],
    shape: tuple[int, ...],
    buffer: Tensor | None,
) -> None:
    check_unshared("theta", theta)
    if gradient.is_sparse:
        check_tensor("gradient's values", gradient._values())
    else:
        check_read("gradient", gradient, theta)
    for axis, vector in enumerate(accumulators):
        check_read(f"accumulators[{axis}]", vector, theta)
        check_unshared(f"accumulators[{axis}]", vector)
    if gradient.shape != theta.shape:
        raise ValueError(
            f"gradient must have theta's shape {tuple(theta.shape)}, got {tuple(gradient.shape)}"
        )
    if gradient.is_sparse and (gradient.sparse_dim() != 1 or not gradient.is_coalesced()):
        raise ValueError(
            f"gradient must be sparse in its first axis only, and coalesced, got sparse_dim "
            f"{gradient.sparse_dim()}, is_coalesced() {gradient.is_coalesced()}; pass "
            f"gradient.to_dense() or gradient.coalesce()"
        )
    wide = accumulator_dtype(theta.dtype)
    if [(tuple(vector.shape), vector.dtype) for vector in accumulators] != [
        ((size,), wide) for size in shape
    ]:
        raise ValueError(
            f"accumulators must be {wide} vectors of {shape} elements, "
            f"got {[(vector.dtype, tuple(vector.shape)) for vector in accumulators]}"
        )
    if buffer is not None:
        check_tensor("buffer", buffer)
        check_like("buffer", buffer, theta, wide)
        check_dense("buffer", buffer)
