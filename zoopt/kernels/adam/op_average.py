"""Running averages, as in momentum and Lion: one moment, and the direction made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

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
from zoopt.kernels.adam.reference import Average
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
    batch = row_major(gradient, key)
    moments = each("moment", moment, batch)
    check_moments(batch, moments, signed=True, name="moment")
    check_format(moments)
    if moment_draw is not None:
        check_unsigned("moment_draw", moment_draw, 32)
    wide = moments[0].accumulator
    numbers = Average(*scalars([*look, *keep], wide))
    outs = kept(outs_for, batch, out, wide)
    check_apart(out=outs, **stored("moment", moments))
    backend = dispatch.choose(widest(batch, moments), impl, "adam")
    if dispatch.takes_batches(backend):
        if batch.numel:
            once(backend.average, batch, moments, outs, numbers, signs, moment_draw)
        return outs if isinstance(gradient, Batch) else outs[0]
    operands = zip(batch.tensors, moments, outs, batch.keys, strict=True)
    for own, average, target, own_key in pieces(operands):
        if own.numel():
            g = flat(kept(apart, own, target, *memories(average), same=True), backend)
            written = flat(target, backend)
            backend.average(g, average, written, numbers, signs, moment_draw, own_key)
    return outs if isinstance(gradient, Batch) else outs[0]
