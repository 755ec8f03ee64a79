"""Adam on stored moments, defined in plain PyTorch; it works in chunks, to bound temporaries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoopt.kernels.adam.moments import Moment, decode, encode
from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.reference import CHUNK, round_nearest, round_stochastic


class Numbers(NamedTuple):
    """Adam's numbers, rounded to the accumulator's dtype: complement1 is 1 - beta1 and so on."""

    beta1: float
    beta2: float
    complement1: float
    complement2: float
    scale: float
    eps: float


#: What becomes of an average: itself, its signs, or torch.lerp's; or values take its place, or it
#: is only read.
Mode = Literal["average", "signs", "lerp", "store", "load"]


class Average(NamedTuple):
    """The factors of a moment and of the gradient in the direction (look) and in the new moment
    (keep), rounded to the accumulator's dtype. For lerp the first is its weight."""

    look_m: float
    look_g: float
    keep_m: float
    keep_g: float


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """Bounds of parts of at least CHUNK elements (or one part, if there are fewer).

    They begin at multiples of CHUNK, hence of the moments' blocks.
    """
    count = max(1, numel // CHUNK)
    for i in range(count):
        yield i * CHUNK, numel if i == count - 1 else (i + 1) * CHUNK


def _halfwords(key: NoiseKey, numel: int, draw: int, purpose: int, device: torch.device) -> Tensor:
    """int64 (numel,) in [0, 65536): the random bits of elements offset ... offset + numel - 1."""
    index = torch.arange(key.offset, key.offset + numel, device=device)
    return philox.halfwords(index, seed=key.seed, stream=key.stream, draw=draw, purpose=purpose)


def _averages(g: Tensor, first: Moment, second: Moment, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """m and v, (k,), of which the moments are the last ones."""
    m = decode(first) * numbers.beta1 + g * numbers.complement1
    v = decode(second) * numbers.beta2 + g * g * numbers.complement2
    return m, v


def _mixtures(g: Tensor, stored: Moment, numbers: Average, mode: Mode) -> tuple[Tensor, Tensor]:
    """The direction and the new moment, (k,), both of the old moment."""
    if mode == "store":
        return g, g.to(stored.accumulator)
    m = decode(stored)
    if mode == "lerp":
        wide = torch.promote_types(m.dtype, g.dtype)
        average = m.to(wide).lerp(g.to(wide), numbers.look_m)
        return average, average.to(stored.accumulator)
    direction = m * numbers.look_m + g * numbers.look_g
    return direction, m * numbers.keep_m + g * numbers.keep_g


def _quotient(
    gradient: Tensor,
    first: Moment,
    second: Moment,
    numbers: Numbers,
    key: NoiseKey,
    moment_draw: int | None,
) -> Tensor:
    """Update both moments; return (scale m) / (sqrt(v) + eps), (k,), of m and v before rounding."""
    g = gradient.to(first.accumulator)
    m, v = kept(_averages, g, first, second, numbers)
    bits = None
    if moment_draw is not None:
        bits = _halfwords(key, g.numel(), moment_draw, philox.PURPOSE_MOMENTS, g.device)
    encode(m, first, bits)
    encode(v, second, bits)
    # Through float64, as in noise's `reference.adam_window`: the rounded root is then exact.
    root = v.double().sqrt().to(v.dtype)
    return m * numbers.scale / (root + numbers.eps)


def adam(
    gradient: Tensor,
    first: Moment,
    second: Moment,
    out: Tensor,
    numbers: Numbers,
    key: NoiseKey,
    moment_draw: int | None,
    norms: Tensor | None,
) -> None:
    """m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g g, and out (k,) receives
    (scale m) / (sqrt(v) + eps) of the moments as they are before they are stored.

    out may be of a narrower dtype, to which its elements are rounded to nearest. norms (2, rows)
    receives the direction's and the gradient's sums of squares, of rows of k / rows elements.
    """
    if norms is not None:
        once(norms.zero_)
    for start, stop in pieces(chunks(gradient.numel())):
        part = gradient[start:stop].to(first.accumulator)
        moments = first.part(start, stop), second.part(start, stop)
        direction = _quotient(part, *moments, numbers, key.shifted(start), moment_draw)
        if norms is not None:
            width = gradient.numel() // norms.shape[1]
            row = torch.arange(start, stop, device=out.device) // width
            once(norms[0].index_add_, 0, row, direction.square())
            once(norms[1].index_add_, 0, row, part.square())
        out[start:stop] = round_nearest(direction, out.dtype)


def adamw(
    theta: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    decay: float,
    numbers: Numbers,
    key: NoiseKey,
    moment_draw: int | None,
    rounding_draw: int | None,
) -> None:
    """theta (k,) <- round(decay theta + (scale m) / (sqrt(v) + eps)), the moments as in `adam`."""
    for start, stop in pieces(chunks(theta.numel())):
        part, shifted = theta[start:stop], key.shifted(start)
        moments = first.part(start, stop), second.part(start, stop)
        step = _quotient(gradient[start:stop], *moments, numbers, shifted, moment_draw)
        acc = part.to(torch.promote_types(theta.dtype, step.dtype)) * decay + step
        if rounding_draw is None:
            part.copy_(round_nearest(acc, theta.dtype))
            continue
        bits = _halfwords(shifted, acc.numel(), rounding_draw, philox.PURPOSE_ROUNDING, acc.device)
        part.copy_(round_stochastic(acc, theta.dtype, bits))


def average(
    gradient: Tensor,
    stored: Moment,
    out: Tensor,
    numbers: Average,
    mode: Mode,
    moment_draw: int | None,
    key: NoiseKey,
) -> None:
    """out (k,) receives look_m m + look_g g, or its signs, and m <- keep_m m + keep_g g; for lerp
    both are m + weight (g - m). To store is m <- g alone: out is not written. To load is out <- m
    alone.

    Multiples of the gradient are rounded to its own dtype; out's elements to out's, to nearest.
    """
    for start, stop in pieces(chunks(gradient.numel())):
        g, part, bits = gradient[start:stop], stored.part(start, stop), None
        if mode == "load":
            out[start:stop] = round_nearest(decode(part), out.dtype)
            continue
        direction, m = kept(_mixtures, g, part, numbers, mode)
        if moment_draw is not None:
            shifted = key.shifted(start)
            bits = _halfwords(shifted, g.numel(), moment_draw, philox.PURPOSE_MOMENTS, g.device)
        encode(m, part, bits)
        if mode == "store":
            continue
        direction = direction.sign() if mode == "signs" else direction
        out[start:stop] = round_nearest(direction, out.dtype)
