"""The operations, defined: plain PyTorch on any device, in chunks that bound the temporaries.

The CPU and GPU kernels return the same bits. Every rounding is therefore explicit: a product is
rounded before it is added, nothing is contracted, and the only inexact conversions are
`round_nearest` and `round_stochastic`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.writes import Script, Write

#: Elements a chunk: the largest temporaries are a few int64 tensors of this size.
CHUNK = 1 << 13


class MaskedNoise:
    """z of elements start ... start + numel - 1 of the tensor, and which of them its mask keeps.

    Attributes:
        z: float32, (numel,), before it is masked.
        kept: bool, (numel,), or None for all.
    """

    def __init__(
        self, start: int, numel: int, key: NoiseKey, draw: int, device: torch.device
    ) -> None:
        index = torch.arange(key.offset + start, key.offset + start + numel, device=device)
        generate = philox.normal if key.distribution == "normal" else philox.rademacher
        self.z = generate(index, seed=key.seed, stream=key.stream, draw=draw)
        self.kept: Tensor | None = None
        if key.threshold is not None:
            self.kept = philox.mask(
                index, seed=key.seed, stream=key.stream, draw=draw, threshold=key.threshold
            )

    def added(self, acc: Tensor, coefficient: float | Tensor) -> Tensor:
        """acc + coefficient z, (numel,): the very bits of acc where the mask is 0. The coefficient
        is one number, or (numel,)."""
        total = acc + self.z.to(acc.dtype) * coefficient
        return total if self.kept is None else torch.where(self.kept, total, acc)


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 (n,) to the nearest `dtype`, ties to even."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    # On the integer bits: vectorised conversions treat NaN each in its own way.
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    rounded = torch.where(x.isnan(), 0x7FC0, rounded)
    return rounded.to(torch.int16).view(torch.bfloat16)


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 (n,) up with the probability of its distance to the value below.

    Args:
        x: float32, (n,).
        dtype: bfloat16 or float16.
        bits: int64, (n,), uniform in [0, 65536).
    """
    if dtype == torch.bfloat16:
        # The discarded half of the bits plus a uniform number carries as often as it should.
        pattern = x.view(torch.int32)
        carried = (pattern + bits.to(torch.int32)) >> 16
        return torch.where(x.isfinite(), carried, pattern >> 16).to(torch.int16).view(dtype)
    if dtype == torch.float16:
        # 13 bits are what a normal float16 discards. Below 2^-14 its spacing stays at 2^-24.
        magnitude = x.abs()
        exponent = (magnitude.view(torch.int32) >> 23).clamp(min=113)
        ulp = (exponent - 10 << 23).view(torch.float32)
        inverse = (264 - exponent << 23).view(torch.float32)
        steps = (magnitude * inverse + (bits & 0x1FFF).float() * 2.0**-13).floor()
        rounded = torch.where(magnitude < 65536.0, steps * ulp, magnitude)
        return rounded.copysign(x).to(dtype)
    raise ValueError(f"dtype must be bfloat16 or float16, got {dtype}")


def _chunks(numel: int) -> Iterator[slice]:
    for start in range(0, numel, CHUNK):
        yield slice(start, min(start + CHUNK, numel))


def _store(out: Tensor, acc: Tensor, part: slice, key: NoiseKey, rounding_draw: int | None) -> None:
    """Round the accumulator (chunk,) into out[part]."""
    if rounding_draw is None:
        out[part] = round_nearest(acc, out.dtype)
        return
    index = torch.arange(key.offset + part.start, key.offset + part.stop, device=acc.device)
    bits = philox.halfwords(
        index,
        seed=key.seed,
        stream=key.stream,
        draw=rounding_draw,
        purpose=philox.PURPOSE_ROUNDING,
    )
    out[part] = round_stochastic(acc, out.dtype, bits)


def weighted_sum(
    theta: Tensor,
    out: Tensor,
    addend: Tensor | None,
    coefficients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    rounding_draw: int | None,
    key: NoiseKey,
) -> None:
    """out <- round(decay theta + sum_j coefficients[j] z(draws[j]) + addend), all tensors (n,).

    The addend has the accumulator's dtype; None: nothing is added last.
    """
    for part in _chunks(theta.numel()):
        acc = theta[part].to(accumulator_dtype(theta.dtype)) * decay
        for coefficient, draw in zip(coefficients, draws, strict=True):
            acc = MaskedNoise(part.start, acc.numel(), key, draw, theta.device).added(
                acc, coefficient
            )
        if addend is not None:
            acc = acc + addend[part]
        _store(out, acc, part, key, rounding_draw)


def scaled_rows(
    theta: Tensor,
    out: Tensor,
    scales: Tensor,
    alpha: float,
    draw: int,
    key: NoiseKey,
) -> None:
    """out_ij <- round(theta_ij + (alpha scales_i) z_ij), rows of equal length, theta and out (n,)
    and scales (m,) in the accumulator's dtype."""
    columns = theta.numel() // scales.numel()
    for part in _chunks(theta.numel()):
        acc = theta[part].to(scales.dtype)
        rows = torch.arange(part.start, part.stop, device=theta.device) // columns
        z = MaskedNoise(part.start, acc.numel(), key, draw, theta.device)
        _store(out, z.added(acc, (scales * alpha)[rows]), part, key, None)


def momentum_sum(
    theta: Tensor,
    buffer: Tensor,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    momentum: float,
    step_size: float,
    rounding_draw: int | None,
    key: NoiseKey,
) -> None:
    """buffer <- momentum buffer + sum_j gradients[j] z_j, all tensors (n,), and with the new buffer
    theta <- round(decay theta + sum_j coefficients[j] z_j + step_size buffer)."""
    for part in _chunks(theta.numel()):
        acc = theta[part].to(buffer.dtype) * decay
        buf = buffer[part] * momentum
        for coefficient, gradient, draw in zip(coefficients, gradients, draws, strict=True):
            direction = MaskedNoise(part.start, acc.numel(), key, draw, theta.device)
            acc = direction.added(acc, coefficient)
            buf = direction.added(buf, gradient)
        buffer[part] = buf
        _store(theta, acc + buf * step_size, part, key, rounding_draw)


def adam_window(
    theta: Tensor,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    closes: Sequence[bool],
    draws: Sequence[int],
    decay: float,
    step_size: float,
    eps: float,
    rounding_draw: int | None,
    key: NoiseKey,
) -> None:
    """theta (n,) <- round(decay theta + sum_j coefficients[j] z_j + step_size m / (sqrt(v) + eps)).

    ghat, m and v begin as 0. MaskedNoise j adds gradients[j] z_j to ghat; where closes[j], then

        m <- m + first[j] ghat,    v <- v + second[j] (ghat ghat),    ghat <- 0
    """
    for part in _chunks(theta.numel()):
        acc = theta[part].to(accumulator_dtype(theta.dtype)) * decay
        ghat, m, v = (torch.zeros_like(acc) for _ in range(3))
        for j, draw in enumerate(draws):
            direction = MaskedNoise(part.start, acc.numel(), key, draw, theta.device)
            acc = direction.added(acc, coefficients[j])
            ghat = direction.added(ghat, gradients[j])
            if closes[j]:
                m = m + ghat * first[j]
                v = v + ghat * ghat * second[j]
                ghat = torch.zeros_like(ghat)
        acc = acc + m * step_size / (_root(v) + eps)
        _store(theta, acc, part, key, rounding_draw)


def _root(v: Tensor) -> Tensor:
    """The square roots, correctly rounded.

    torch's float32 ones are off by one here and there. Those of float64, rounded, are exact even if
    off: the root of a float32 is 4 of its units or more from every tie.
    """
    return v.double().sqrt().to(v.dtype)


def write_each(theta: Tensor, buffer: Tensor | None, script: Script, key: NoiseKey) -> None:
    """Each write of the script in turn, on theta (n,) and its buffer (n,); see `Write`."""
    for part in _chunks(theta.numel()):
        made: dict[int, MaskedNoise] = {}
        for write in script.writes:
            draws = {*write.draws, *write.estimate_draws}
            made = {draw: made[draw] for draw in made if draw in draws}
            for draw in draws - made.keys():
                made[draw] = MaskedNoise(
                    part.start, part.stop - part.start, key, draw, theta.device
                )
            _write(theta, buffer, part, write, made, key)


def _write(
    theta: Tensor,
    buffer: Tensor | None,
    part: slice,
    write: Write,
    directions: dict[int, MaskedNoise],
    key: NoiseKey,
) -> None:
    """One write, on theta[part] (chunk,)."""
    acc = theta[part].to(accumulator_dtype(theta.dtype)) * write.decay
    for draw, coefficient in zip(write.draws, write.coefficients, strict=True):
        acc = directions[draw].added(acc, coefficient)
    if write.rule == "momentum":
        assert buffer is not None
        buf = buffer[part] * write.momentum
        for draw, gradient in zip(write.estimate_draws, write.gradients, strict=True):
            buf = directions[draw].added(buf, gradient)
        buffer[part] = buf
        acc = acc + buf * write.step_size
    elif write.rule != "none":
        ghat, m, v = (torch.zeros_like(acc) for _ in range(3))
        for i, draw in enumerate(write.estimate_draws):
            ghat = directions[draw].added(ghat, write.gradients[i])
            if write.rule == "adam" and write.closes[i]:
                m = m + ghat * write.first[i]
                v = v + ghat * ghat * write.second[i]
                ghat = torch.zeros_like(ghat)
        if write.rule == "sign":
            acc = acc + ghat.sign() * write.step_size
        else:
            acc = acc + m * write.step_size / (_root(v) + write.eps)
    _store(theta, acc, part, key, write.rounding_draw)


def gather_rows(
    weight: Tensor, rows: Tensor, out: Tensor, alpha: float, key: NoiseKey, draw: int
) -> None:
    """out[i] <- round(weight[rows[i]] + alpha z), weight (V, d), rows (n,), out (n, d)."""
    d = weight.shape[1]
    for i, row in enumerate(rows.tolist()):
        row_key = key.shifted(row * d)
        weighted_sum(weight[row], out[i], None, [alpha], [draw], 1.0, None, row_key)
