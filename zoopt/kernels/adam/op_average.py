"""Operations on one moment: averages, as in momentum and Lion; values stored as they are, or read
from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from zoopt.checks import check_number
from zoopt.dtypes import scalars
from zoopt.kernels import dispatch
from zoopt.kernels.adam.checks import (
    check_format,
    check_moments,
    each,
    memories,
    outs_for,
    row_major,
    stored,
    widest,
)
from zoopt.kernels.adam.moments import Moment
from zoopt.kernels.adam.reference import Average, Mode
from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.operands import apart, check_apart, flat


@overload
def average_(
    gradient: Tensor,
    moment: Moment,
    *,
    look: tuple[float, float],
    keep: tuple[float, float],
    signs: bool = False,
    key: NoiseKey,
    moment_draw: int | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def average_(
    gradient: Batch,
    moment: Sequence[Moment],
    *,
    look: tuple[float, float],
    keep: tuple[float, float],
    signs: bool = False,
    moment_draw: int | None = None,
    out: Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> Sequence[Tensor]: ...


def average_(
    gradient: Tensor | Batch,
    moment: Moment | Sequence[Moment],
    *,
    look: tuple[float, float],
    keep: tuple[float, float],
    signs: bool = False,
    key: NoiseKey | None = None,
    moment_draw: int | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """Update a running average in place, and return the direction that it gives:

        out = look[0] m + look[1] g, or its signs,    m <- keep[0] m + keep[1] g

    where both read the old m. Momentum has look = keep = (momentum, 1). Lion takes the signs, with
    look = (b1, 1 - b1) and keep = (b2, 1 - b2). Multiples of a gradient are rounded to its dtype.

    Args:
        gradient, key, moment_draw, out, impl: as for `adam_`.
        moment: signed, of as many elements.
        look, keep: the factors of the moment and the gradient, in the direction and in the moment.
        signs: whether the direction consists of signs; 0 for 0 and for NaN.

    Returns:
        out.

    Raises:
        TypeError, ValueError: as for `adam_`.
    """
    mode: Mode = "signs" if signs else "average"
    return _averaged(gradient, moment, [*look, *keep], mode, key, moment_draw, out, impl)


@overload
def lerp_(
    gradient: Tensor,
    moment: Moment,
    weight: float,
    *,
    key: NoiseKey,
    moment_draw: int | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def lerp_(
    gradient: Batch,
    moment: Sequence[Moment],
    weight: float,
    *,
    moment_draw: int | None = None,
    out: Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> Sequence[Tensor]: ...


def lerp_(
    gradient: Tensor | Batch,
    moment: Moment | Sequence[Moment],
    weight: float,
    *,
    key: NoiseKey | None = None,
    moment_draw: int | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """m <- m + weight (g - m), rounded as torch.lerp does it; returns m before it is stored.

    With w = weight, that is fma(w, g - m, m) for w < 1/2, else fma(w - 1, g - m, g).

    Args:
        gradient, moment, key, moment_draw, out, impl: as for `average_`.
        weight: in [0, 1].

    Returns:
        out.

    Raises:
        TypeError, ValueError: as for `adam_`.
    """
    check_number("weight", weight, low=0.0, high=1.0)
    numbers = [weight, 0.0, 0.0, 0.0]
    return _averaged(gradient, moment, numbers, "lerp", key, moment_draw, out, impl)


def store_(
    values: Tensor | Batch,
    moment: Moment | Sequence[Moment],
    *,
    key: NoiseKey | None = None,
    moment_draw: int | None = None,
    impl: str | None = None,
) -> None:
    """Round values to a moment's format, and keep them there.

    Args:
        values: of as many elements as the moment, in any dtype and shape; or a batch. None are
            negative where the moment is unsigned.
        moment: signed or unsigned.
        key, moment_draw, impl: as for `adam_`.

    Raises:
        TypeError, ValueError: as for `adam_`.
    """
    numbers = [0.0, 0.0, 0.0, 0.0]
    _averaged(values, moment, numbers, "store", key, moment_draw, None, impl)


def load_(
    values: Batch,
    moment: Sequence[Moment],
    *,
    impl: str | None = None,
) -> Batch:
    """values <- what the moments hold, which stay as they are.

    Args:
        values: a batch of contiguous tensors, each of as many elements as its moment.
        moment: signed ones, or unsigned ones.
        impl: as for `adam_`.

    Returns:
        values.

    Raises:
        TypeError, ValueError: as for `adam_`.
    """
    if not all(own.is_contiguous() for own in values.tensors):
        raise ValueError("values must be contiguous; pass values.contiguous()")
    _averaged(values, moment, [0.0, 0.0, 0.0, 0.0], "load", None, None, values.tensors, impl)
    return values


def _averaged(
    gradient: Tensor | Batch,
    moment: Moment | Sequence[Moment],
    numbers: list[float],
    mode: Mode,
    key: NoiseKey | None,
    moment_draw: int | None,
    out: Tensor | Sequence[Tensor] | None,
    impl: str | None,
) -> Tensor | Sequence[Tensor]:
    """Check the operands, and run the implementation."""
    batch = row_major(gradient, key)
    moments = each("moment", moment, batch)
    signed = mode not in ("store", "load") or moments[0].signed
    check_moments(batch, moments, signed=signed, name="moment")
    check_format(moments)
    if moment_draw is not None:
        check_unsigned("moment_draw", moment_draw, 32)
    wide = moments[0].accumulator
    computed = torch.promote_types(wide, batch.dtype) if mode == "lerp" else wide
    rounded = Average(*scalars(numbers, computed))
    outs = batch.tensors if mode == "store" else kept(outs_for, batch, out, wide)
    check_apart(out=outs, **stored("moment", moments))
    backend = dispatch.choose(widest(batch, moments), impl, "adam")
    if dispatch.takes_batches(backend):
        if batch.numel:
            once(backend.average, batch, moments, outs, rounded, mode, moment_draw)
        return outs if isinstance(gradient, Batch) else outs[0]
    operands = zip(batch.tensors, moments, outs, batch.keys, strict=True)
    for own, average, target, own_key in pieces(operands):
        if own.numel():
            g = flat(kept(apart, own, target, *memories(average), same=True), backend)
            written = flat(target, backend)
            backend.average(g, average, written, rounded, mode, moment_draw, own_key)
    return outs if isinstance(gradient, Batch) else outs[0]
