"""SM3's operation: the update with one accumulator vector an axis, in one pass over theta.

A tensor of any shape is treated as a matrix: the leading axes form its rows, the others its
columns. The bound of a row is the minimum of its axes' accumulators, and the maximum of a row is
reduced to each of these axes; the same holds for columns. Minima and maxima are exact, so nothing
is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from zoopt.checks import check_number
from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch, as_batch
from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.operands import (
    apart,
    check_apart,
    dense,
    detached,
)
from zoopt.kernels.sm3.checks import check_operands, rows_of
from zoopt.kernels.sm3.reference import Bounds, Numbers


@overload
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
) -> Tensor: ...


@overload
def sm3_(
    theta: Batch,
    gradient: Sequence[Tensor],
    accumulators: Sequence[Sequence[Tensor]],
    *,
    step_size: float,
    beta: float = 0.0,
    eps: float = 0.0,
    decay: float = 1.0,
    buffer: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Batch: ...


def sm3_(
    theta: Tensor | Batch,
    gradient: Tensor | Sequence[Tensor],
    accumulators: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    *,
    step_size: float,
    beta: float = 0.0,
    eps: float = 0.0,
    decay: float = 1.0,
    buffer: Tensor | Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    key: NoiseKey | None = None,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Tensor | Batch:
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
        theta: a dense float32, bfloat16, float16 or float64 tensor of any shape, or a batch, with a
            sequence of every other operand. On a GPU its vectors and matrices with dense gradients
            are one launch, or two where some have rows of a number that 16 does not divide.
        gradient: of theta's shape, dense, or sparse in its first axis and coalesced.
        accumulators: for each of theta's axes (one for no axes) a vector of its size, in the
            accumulator's dtype; not negative.
        step_size: -lr to descend.
        beta, momentum: in [0, 1).
        eps: at least 0.
        decay: multiplies theta, 1 - lr weight_decay say.
        buffer: contiguous, of theta's shape in the accumulator's dtype. Default: no momentum.
        key: the noise of theta, whose bits round it; a batch has its own.
        rounding_draw: 32 bits; the draw whose bits round theta stochastically. Default: to nearest.
        impl: as for `perturb`. All return the same bits (except the payloads of NaNs).

    Returns:
        theta.

    Raises:
        TypeError, ValueError: an argument out of range, or tensors that do not match.
    """
    batch = as_batch(theta, key)
    if isinstance(theta, Batch):
        gradients: Any = gradient
        vectors: Any = accumulators
        buffers: Any = buffer
    else:
        gradients, vectors = (gradient,), (accumulators,)
        buffers = None if buffer is None else (buffer,)
    each = {"gradient": gradients, "accumulators": vectors, "buffer": buffers}
    for name, several in each.items():
        if several is not None and len(several) != len(batch):
            raise ValueError(
                f"{name} must be one for each of the batch's {len(batch)} tensors, "
                f"got {len(several)}"
            )
    owns = [None] * len(batch) if buffers is None else buffers
    operands = [Operands(*own) for own in zip(batch.tensors, gradients, vectors, owns, strict=True)]
    for own in operands:
        check_operands(*own, tuple(own.theta.shape) or (1,))
    check_number("beta", beta, low=0.0, high=1.0, open_high=True)
    check_number("momentum", momentum, low=0.0, high=1.0, open_high=True)
    check_number("eps", eps, low=0.0)
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        if batch.dtype == accumulator_dtype(batch.dtype):
            rounding_draw = None
    keep, gain = (beta, 1.0 - beta) if beta else (1.0, 1.0)
    numbers = Numbers(
        *scalars([keep, gain, eps, decay, momentum, 1.0 - momentum, step_size], batch.dtype)
    )
    backend = dispatch.choose(batch.tensors[0], impl, "sm3")
    rows = [rows_of(own.gradient) if own.gradient.is_sparse else None for own in operands]
    with batch.contiguous() as target:
        check_apart(
            theta=target.tensors,
            buffer=buffers,
            accumulators=[vector for own in operands for vector in own.accumulators],
        )
        ready = [
            Operands(own, *kept(_read, own, gradient, accumulators, buffer))
            for own, (_, gradient, accumulators, buffer) in zip(
                target.tensors, operands, strict=True
            )
        ]
        together = [i for i, own in enumerate(ready) if _is_plain(own, rows[i], ready[0])]
        if hasattr(backend, "sm3_batch") and together:
            once(
                backend.sm3_batch,
                Batch([target.tensors[i] for i in together], [target.keys[i] for i in together]),
                [ready[i].gradient for i in together],
                [ready[i].accumulators for i in together],
                None if buffers is None else [buffers[i] for i in together],
                numbers,
                rounding_draw,
            )
        else:
            together = []
        for i in pieces(sorted(set(range(len(batch))) - set(together))):
            _alone(backend, ready[i], rows[i], numbers, target.keys[i], rounding_draw)
    return theta


class Operands(NamedTuple):
    """The operands of one tensor, as `sm3_` takes them."""

    theta: Tensor
    gradient: Tensor
    accumulators: Sequence[Tensor]
    buffer: Tensor | None


def _read(
    theta: Tensor, gradient: Tensor, accumulators: Sequence[Tensor], buffer: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
    """The other operands: the gradient's values in theta's dtype or the accumulator's, in row-major
    memory that is not written, unless it is theta's own, element by element."""
    values = gradient.detach().values() if gradient.is_sparse else gradient
    if values.dtype != theta.dtype:
        values = values.to(accumulator_dtype(theta.dtype))
    return apart(dense(values), theta, buffer, same=True), accumulators, buffer


def _is_plain(own: Operands, rows: Tensor | None, first: Operands) -> bool:
    """Whether it can be in a batch: a vector or a matrix, whose dense gradient has the dtype of the
    first one's."""
    return (
        rows is None
        and own.theta.dim() in (1, 2)
        and own.gradient.dtype == first.gradient.dtype
        and all(vector.is_contiguous() and not vector.is_neg() for vector in own.accumulators)
    )


def _alone(
    backend: ModuleType,
    own: Operands,
    rows: Tensor | None,
    numbers: Numbers,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """A tensor of any shape, contiguous, with the values of its gradient's rows."""
    theta, values, accumulators, buffer = own
    if values.numel() == 0:
        return
    split = _split(tuple(theta.shape) or (1,)) if rows is None else 1
    bounds = kept(_bounds, accumulators, split, rows)
    n = bounds.column.numel()
    least = [] if rows is None else kept(_least, accumulators, rows)
    once(
        backend.sm3,
        _matrix(theta, n),
        _matrix(values, n),
        rows,
        bounds,
        None if buffer is None else buffer.view(-1, n),
        numbers,
        key,
        rounding_draw,
    )
    if rows is None:
        _store(accumulators[:split], bounds.new_row)
        _store(accumulators[split:], bounds.new_column)
    else:
        once(accumulators[0].index_copy_, 0, rows, bounds.new_row)
        _store(accumulators[1:], bounds.new_column)
        for vector, own_least in zip(accumulators[1:], least, strict=True):
            torch.maximum(vector, own_least, out=vector)


def _matrix(tensor: Tensor, n: int) -> Tensor:
    """A contiguous tensor as a matrix of n columns: itself, where it is one."""
    tensor = detached(tensor)
    return tensor if tensor.dim() == 2 and tensor.shape[1] == n else tensor.view(-1, n)


def _split(shape: tuple[int, ...]) -> int:
    """How many leading axes form the rows: the split with the fewest rows and columns together."""
    return min(
        range(len(shape) + 1), key=lambda axis: math.prod(shape[:axis]) + math.prod(shape[axis:])
    )


def _bounds(accumulators: Sequence[Tensor], split: int, rows: Tensor | None) -> Bounds:
    """The bounds of the leading axes, up to `split`, and of the others; of these rows, or all."""
    unbounded = accumulators[0].new_full((1,), math.inf)
    row = _bound(unbounded, accumulators[:split])
    column = _bound(unbounded, accumulators[split:])
    if rows is not None:
        row = row[rows]
    return Bounds(row, column, torch.zeros_like(row), torch.zeros_like(column))


def _bound(unbounded: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """The minimum of infinity, (1,), and vectors (a,), (b,) ... at each of a b ... positions."""
    if len(vectors) == 1:
        return torch.fmin(unbounded, vectors[0])
    bound = unbounded
    for vector in vectors:
        bound = torch.fmin(bound[:, None], vector).view(-1)
    return bound


def _store(accumulators: Sequence[Tensor], greatest: Tensor) -> None:
    """Each axis's vector (a,), (b,) ... <- maxima of `greatest` (a b ...,) over the other axes."""
    if len(accumulators) == 1:
        accumulators[0].copy_(greatest)
        return
    greatest = greatest.view([vector.numel() for vector in accumulators])
    for axis, vector in enumerate(accumulators):
        others = [other for other in range(len(accumulators)) if other != axis]
        vector.copy_(greatest.amax(others) if others else greatest)


def _least(accumulators: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """What the accumulators of all axes but the first keep of the rows that are not in `rows`."""
    absent = accumulators[0].index_fill(0, rows, 0.0).amax()
    return [torch.fmin(vector, absent) for vector in accumulators[1:]]
