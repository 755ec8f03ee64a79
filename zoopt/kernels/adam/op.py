"""Adam's operations: moments decoded, averaged, used and encoded again in one pass over them.

Each takes a tensor and its key, or a batch and a sequence of every other operand. On a GPU a batch
is one launch, elsewhere a loop.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from zoopt.checks import check_betas, check_number
from zoopt.dtypes import DTYPES, accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.adam.checks import (
    check_format,
    check_moments,
    check_norms,
    each,
    memories,
    outs_for,
    row_major,
    stored,
    widest,
)
from zoopt.kernels.adam.moments import Moment, Moments
from zoopt.kernels.adam.reference import Numbers
from zoopt.kernels.batch import Batch, as_batch
from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.operands import apart, check_apart, check_read, dense, flat, undisturbed
from zoopt.kernels.places import Placed, Places, places_of


@overload
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
) -> Tensor: ...


@overload
def adam_(
    gradient: Batch,
    first: Sequence[Moment],
    second: Sequence[Moment],
    *,
    betas: tuple[float, float],
    scale: float,
    eps: float,
    moment_draw: int | None = None,
    out: Sequence[Tensor] | None = None,
    norms: Tensor | None = None,
    impl: str | None = None,
) -> Sequence[Tensor]: ...


def adam_(
    gradient: Tensor | Batch,
    first: Moment | Sequence[Moment],
    second: Moment | Sequence[Moment],
    *,
    betas: tuple[float, float],
    scale: float,
    eps: float,
    key: NoiseKey | None = None,
    moment_draw: int | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    norms: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """Update Adam's moments in place, and return the direction that they give:

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g g,    out = (scale m) / (sqrt(v) + eps)

    With scale = sqrt(1 - b2^t) / (1 - b1^t) and eps = sqrt(1 - b2^t) times Adam's, out is Adam's
    mhat / (sqrt(vhat) + eps). It is computed from the moments before they are rounded to their
    format.

    Args:
        gradient: any shape and layout; float32, bfloat16, float16 or float64. Or a batch.
        first, second: moments of as many elements, signed and unsigned, of one format.
        betas: both in [0, 1).
        scale, eps: numbers, as in the formula; eps at least 0.
        key: the noise of the tensor, whose bits round its moments; a batch has its own.
        moment_draw: 32 bits; the draw whose bits round bfloat16 and coded moments stochastically.
            Default: they are rounded to nearest.
        out: contiguous, of gradient's shape, in the accumulator's dtype, or in the gradient's,
            rounded to nearest; it may be the gradient. Default: a new tensor, in the accumulator's.
        norms: contiguous, (2, rows), in the accumulator's dtype, for a gradient of shape (rows, r),
            or for a batch of matrices with one r and `rows` rows in all. It receives the sum of
            squares of each row of out (before rounding) and of the gradient, summed in the
            implementation's own order. Default: they are not computed.
        impl: as for `perturb`.

    Returns:
        out.

    Raises:
        TypeError, ValueError: an argument out of range, or tensors that do not match.
    """
    batch = row_major(gradient, key)
    firsts, seconds = each("first", first, batch), each("second", second, batch)
    check_moments(batch, firsts, signed=True, name="first")
    check_moments(batch, seconds, signed=False, name="second")
    check_format([*firsts, *seconds])
    numbers = _numbers(firsts, betas, scale, eps, moment_draw)
    outs = kept(outs_for, batch, out, firsts[0].accumulator)
    if norms is not None:
        check_norms(norms, batch, firsts[0].accumulator)
    check_apart(out=outs, norms=norms, **stored("first", firsts), **stored("second", seconds))
    backend = dispatch.choose(widest(batch, firsts), impl, "adam")
    if norms is not None and not batch.numel:
        norms.zero_()
    elif dispatch.takes_batches(backend):
        once(backend.adam, batch, firsts, seconds, outs, norms, numbers, moment_draw)
    else:
        _adam_each(backend, batch, firsts, seconds, outs, norms, numbers, moment_draw)
    return outs if isinstance(gradient, Batch) else outs[0]


def _adam_each(
    backend: ModuleType,
    batch: Batch,
    firsts: Sequence[Moment],
    seconds: Sequence[Moment],
    outs: Sequence[Tensor],
    norms: Tensor | None,
    *numbers: Any,
) -> None:
    """A tensor at a time, with its part of the norms."""
    rows = (tensor.shape[0] if tensor.dim() else 1 for tensor in batch.tensors)
    starts = itertools.accumulate(rows, initial=0)
    operands = zip(batch.tensors, batch.keys, firsts, seconds, outs, strict=True)
    for (gradient, key, first, second, out), start in pieces(zip(operands, starts, strict=False)):
        own = norms
        if norms is not None and len(batch) > 1:
            own = kept(norms.new_empty, 2, gradient.shape[0])
        if gradient.numel():
            # The gradient may be exactly a tensor that is written, but not overlap one otherwise.
            g = kept(apart, gradient, out, *memories(first), *memories(second), same=True)
            values, move = numbers
            target = flat(out, backend)
            once(backend.adam, flat(g, backend), first, second, target, values, key, move, own)
        if norms is not None and own is not None and own is not norms:
            norms[:, start : start + len(gradient)] = own


@overload
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
) -> Tensor: ...


@overload
def adamw_(
    theta: Batch,
    gradient: Sequence[Tensor],
    first: Sequence[Moment],
    second: Sequence[Moment],
    *,
    betas: tuple[float, float],
    scale: float,
    eps: float,
    decay: float,
    moment_draw: int | None = None,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Batch: ...


def adamw_(
    theta: Tensor | Batch,
    gradient: Tensor | Sequence[Tensor],
    first: Moment | Sequence[Moment],
    second: Moment | Sequence[Moment],
    *,
    betas: tuple[float, float],
    scale: float,
    eps: float,
    decay: float,
    key: NoiseKey | None = None,
    moment_draw: int | None = None,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Tensor | Batch:
    """theta <- round(decay theta + (scale m) / (sqrt(v) + eps)), with the moments as in `adam_`.

    Args:
        theta: a dense float32, bfloat16, float16 or float64 tensor, or a batch.
        gradient: of theta's shape, in any layout; those of a batch have one dtype.
        scale: as for `adam_`, times -lr to descend.
        decay: multiplies theta, for example 1 - lr weight_decay.
        rounding_draw: 32 bits; the draw whose bits round theta stochastically. Default: to nearest.
        first, second, betas, eps, key, moment_draw, impl: as for `adam_`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `adam_`.
    """
    batch = as_batch(theta, key)
    gradients = each("gradient", gradient, batch)
    firsts, seconds = each("first", first, batch), each("second", second, batch)
    found = _found(batch, gradients, firsts, seconds)
    clear = found is not None and batch.kept.get("adamw") == found
    if not clear:
        clear = _check(batch, gradients, firsts, seconds)
        batch.kept["adamw"] = found if clear else None
    if clear and found is not None:
        gradients = Placed(gradients, found.gradients[0])
    numbers = _numbers(firsts, betas, scale, eps, moment_draw)
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        if batch.dtype == accumulator_dtype(batch.dtype):
            rounding_draw = None
    [decay] = scalars([decay], batch.dtype)
    backend = dispatch.choose(widest(batch, firsts), impl, "adam")
    if gradients[0].dtype == torch.float64:
        gradients = [own.to(firsts[0].accumulator) for own in gradients]
    draws = (moment_draw, rounding_draw)
    with batch.contiguous() as dense_batch:
        values = gradients
        if not clear:
            written = {**stored("first", firsts), **stored("second", seconds)}
            check_apart(theta=dense_batch.tensors, **written)
            places = zip(gradients, dense_batch.tensors, firsts, seconds, strict=True)
            values = [kept(_apart, g, own, *memories(m), *memories(v)) for g, own, m, v in places]
        if dispatch.takes_batches(backend):
            once(backend.adamw, dense_batch, values, firsts, seconds, decay, numbers, *draws)
            return theta
        operands = zip(dense_batch.tensors, values, firsts, seconds, dense_batch.keys, strict=True)
        for own, g, m, v, own_key in pieces(operands):
            if own.numel():
                target, g = flat(own, backend), flat(g, backend)
                backend.adamw(target, g, m, v, decay, numbers, own_key, *draws)
    return theta


class _Found(NamedTuple):
    """Operands as they were found: names of those that have not moved, and the gradients."""

    names: tuple[Hashable, ...]
    gradients: Places
    shapes: list[torch.Size]


def _found(
    batch: Batch,
    gradients: Sequence[Tensor],
    firsts: Sequence[Moment],
    seconds: Sequence[Moment],
) -> _Found | None:
    """What is equal when all operands are as they were; None if that cannot be told."""
    if not (isinstance(firsts, Moments) and isinstance(seconds, Moments)):
        return None
    if set(map(type, gradients)) != {Tensor} or any(map(Tensor.is_neg, gradients)):
        return None
    names = batch.made("name", object), firsts.name, seconds.name
    return _Found(names, places_of(gradients), list(map(_shape, gradients)))


def _check(
    batch: Batch,
    gradients: Sequence[Tensor],
    firsts: Sequence[Moment],
    seconds: Sequence[Moment],
) -> bool:
    """Raise unless the operands match; return whether they are apart from each other, and in
    row-major memory."""
    moments = (*firsts, *seconds)
    memory = [tensor for moment in moments for tensor in memories(moment)]
    clear = undisturbed(*batch.tensors, *gradients, *memory)
    for own, target in zip(gradients, batch.tensors, strict=True):
        if not clear or own.device != target.device or own.dtype not in DTYPES:
            check_read("gradient", own, target)
        if own.shape != target.shape or own.dtype != gradients[0].dtype:
            raise ValueError(
                f"gradient must have theta's shape {tuple(target.shape)} and one dtype in a batch, "
                f"got {tuple(own.shape)}, {own.dtype}"
            )
    check_moments(batch, firsts, signed=True, name="first")
    check_moments(batch, seconds, signed=False, name="second")
    check_format(moments)
    return clear


_shape = operator.attrgetter("shape")


def _apart(gradient: Tensor, *written: Tensor | None) -> Tensor:
    return apart(dense(gradient), *written, same=True)


def _numbers(
    firsts: Sequence[Moment],
    betas: tuple[float, float],
    scale: float,
    eps: float,
    moment_draw: int | None,
) -> Numbers:
    """Check the numbers, and round them to the accumulator's dtype."""
    beta1, beta2 = betas
    floats = type(beta1) is type(beta2) is type(eps) is float
    if not (floats and 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0 and 0.0 <= eps < math.inf):
        check_betas(betas)
        check_number("eps", eps, low=0.0)
    if moment_draw is not None:
        check_unsigned("moment_draw", moment_draw, 32)
    numbers = [beta1, beta2, 1.0 - beta1, 1.0 - beta2, scale, eps]
    return Numbers(*scalars(numbers, firsts[0].accumulator))
