"""How a moment is stored: float32, bfloat16, or codes of 8 or 4 bits in blocks with one scale each.

A block's scale s is its largest magnitude. Codes are levels between 0 and s that lie closer
together for small values, which need them finer. With Q = 127 (int8) or 7 (int4), a signed code c
in [-Q, Q] stands for

    s (c / Q) |c / Q|

and with Q = 256 or 16, an unsigned code c in [0, Q - 1] stands for s ((c + 1) / Q)^2. So a second
moment that is not 0 is never stored as 0, which would make Adam's step infinite. The largest
magnitude itself is stored exactly. (A scale that is not 0 is at least 2^-110, so that every product
is a normal number.)

Rounding to nearest is off by at most half the distance between the two levels around the value; an
unsigned value below the lowest level s / Q^2 is off by at most s / Q^2. Stochastic rounding goes up
or down with the probability that makes the expectation exact, so that averages that change by less
than a level in a step still change. The two moments of an element share 16 random bits; the first
moment takes the low eight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.batch import name_of
from zoopt.kernels.journal import once
from zoopt.kernels.noise.reference import round_nearest
from zoopt.kernels.operands import check_values, settled
from zoopt.kernels.places import Kept

#: How moments are stored.
Format = Literal["float32", "bfloat16", "int8", "int4"]
#: Elements that share a scale.
BLOCK = {"int8": 256, "int4": 128}
#: Largest magnitude of a signed code; number of unsigned levels.
SIGNED_LEVELS = {"int8": 127, "int4": 7}
UNSIGNED_LEVELS = {"int8": 256, "int4": 16}
#: The smallest scale other than 0, such that s / Q^2 and Q^2 / s are normal float32 numbers.
MIN_SCALE = 2.0**-110
#: The dtypes of values, and of 8-bit codes by whether they are signed.
_VALUES = (torch.float32, torch.bfloat16, torch.float64)
_CODES = {True: torch.int8, False: torch.uint8}


@dataclasses.dataclass(frozen=True)
class Moment:
    """The tensors of one moment of `numel` elements.

    Attributes:
        codes: float32, float64 or bfloat16 values; int8 codes (uint8 if unsigned), one an element;
            or uint8, two elements' 4-bit codes each, the first in the low half (signed: c + 8).
        scale: float32, (blocks,), or None where codes are values.
        numel: elements.
        signed: whether values can be negative.

    Raises:
        TypeError, ValueError: tensors of other sizes or dtypes, or not contiguous; or codes for a
            single element, whose one byte cannot show whether it holds 8 bits or 4.
    """

    codes: Tensor
    scale: Tensor | None
    numel: int
    signed: bool

    def __post_init__(self) -> None:
        codes = self.codes
        plain = self.scale is None and settled(codes)
        if plain and codes.dtype in _VALUES and codes.numel() == self.numel:
            return  # what a step makes of each parameter's state
        for name, tensor in (("codes", codes), ("scale", self.scale)):
            if tensor is not None and not settled(tensor):
                check_values(name, tensor)
                if not tensor.is_contiguous() or tensor.is_neg():
                    raise ValueError("codes and scale must be contiguous; pass clones of them")
        known = _VALUES if self.scale is None else (_CODES[self.signed], torch.uint8)
        if self.codes.dtype not in known:
            raise TypeError(
                f"codes must be of {' or '.join(map(str, dict.fromkeys(known)))}, "
                f"got {self.codes.dtype}"
            )
        if self.scale is None:
            if self.codes.numel() != self.numel:
                raise ValueError(f"codes must have {self.numel} values, got {self.codes.numel()}")
            return
        if self.numel == 1:
            raise ValueError("numel must be 2 or more for codes, got 1; store it as float32")
        block = BLOCK[self.format]
        if self.codes.numel() not in (self.numel, -(-self.numel // 2)):
            raise ValueError(
                f"codes must have {self.numel} or half as many bytes, got {self.codes.numel()}"
            )
        dtype = _CODES[self.signed] if self.format == "int8" else torch.uint8
        if self.numel and self.codes.dtype != dtype:
            raise TypeError(f"{self.format} codes must not be of {self.codes.dtype}")
        if self.scale.dtype != torch.float32 or self.scale.device != self.codes.device:
            raise TypeError(
                f"scale must be float32 on {self.codes.device}, "
                f"got {self.scale.dtype} on {self.scale.device}"
            )
        if self.scale.numel() != -(-self.numel // block):
            raise ValueError(
                f"scale must have a number for each {block} of {self.numel} elements, "
                f"got {self.scale.numel()}"
            )

    @property
    def format(self) -> Format:
        """How it is stored (float64 counts as float32, the accumulator's own type)."""
        if self.scale is None:
            return "bfloat16" if self.codes.dtype == torch.bfloat16 else "float32"
        return "int8" if self.codes.numel() == self.numel else "int4"

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype that it is computed in."""
        return accumulator_dtype(self.codes.dtype)

    @property
    def levels(self) -> int:
        """Q of codes."""
        return (SIGNED_LEVELS if self.signed else UNSIGNED_LEVELS)[self.format]

    def part(self, start: int, stop: int) -> Moment:
        """Elements start ... stop - 1, in the same memory; `start` is the first of a block."""
        codes, numel = self.codes.detach().view(-1), stop - start
        if self.scale is None:
            return Moment(codes[start:stop], None, numel, self.signed)
        block = BLOCK[self.format]
        scale = self.scale[start // block : -(-stop // block)]
        if self.format == "int4":
            start, stop = start // 2, -(-stop // 2)
        return Moment(codes[start:stop], scale, numel, self.signed)


class Moments(tuple[Moment, ...]):
    """Moments of one format, of several tensors, that are used again and again.

    Attributes:
        codes, scales: their tensors.
    """

    codes: Kept
    scales: Kept | None

    def __new__(cls, moments: Sequence[Moment]) -> Moments:
        """A tuple of them."""
        self = super().__new__(cls, moments)
        self.codes = Kept([moment.codes for moment in moments])
        scales = [moment.scale for moment in moments if moment.scale is not None]
        self.scales = Kept(scales) if scales else None
        return self

    @property
    def name(self) -> Hashable:
        """The same one as long as no tensor has moved."""
        return name_of(self.codes), None if self.scales is None else name_of(self.scales)


def decode(stored: Moment) -> Tensor:
    """The moment's values: float32 (float64 for float64), (numel,)."""
    codes = stored.codes.detach().reshape(-1)
    if stored.scale is None:
        return codes.to(stored.accumulator)
    if stored.format == "int4":
        codes = torch.stack((codes & 15, codes >> 4), 1).view(-1)[: stored.numel]
    level = codes.float()
    if not stored.signed:
        level = level + 1.0
    elif stored.format == "int4":
        level = level - 8.0
    return level * level.abs() * (1.0 / stored.levels**2) * _spread(stored.scale, stored)


def encode(values: Tensor, stored: Moment, bits: Tensor | None = None) -> None:
    """Store values, of the accumulator's dtype, (numel,), in place.

    Args:
        bits: int64, (numel,), uniform in [0, 65536), for stochastic rounding; None for nearest.
    """
    if stored.format == "float32":
        once(stored.codes.view(-1).copy_, values)
        return
    if bits is not None:
        bits = bits & 0xFF if stored.signed else bits >> 8
    if stored.scale is None:
        once(stored.codes.view(-1).copy_, _bfloat16(values, bits))
        return
    block, top = BLOCK[stored.format], stored.levels
    padded = values.new_zeros(stored.scale.numel() * block)
    padded[: stored.numel] = values
    largest = padded.view(-1, block).abs().amax(1)
    scale = torch.where(largest == 0.0, largest, largest.clamp(min=MIN_SCALE))
    # 0 times infinity is a NaN, as is anything divided by a NaN scale; both become level 0.
    squared = (values.abs() * _spread(float(top * top) / scale, stored)).nan_to_num(0.0)
    # The last bits of the root do not matter: a value next to a level rounds to that level anyway.
    level = squared.sqrt().floor().clamp(max=top - 1)
    uniform = 0.5 if bits is None else (bits.float() + 0.5) * 2.0**-8
    level = level + (squared - level * level > uniform * (2.0 * level + 1.0)).float()
    if stored.signed:
        codes = level.copysign(values) + (8.0 if stored.format == "int4" else 0.0)
    else:
        codes = level.clamp(min=1.0) - 1.0
    _store(codes, stored)
    once(stored.scale.copy_, scale)


def _store(codes: Tensor, stored: Moment) -> None:
    """Write codes, float32 (numel,), as bytes or halves of bytes."""
    if stored.format == "int8":
        once(stored.codes.view(-1).copy_, codes)
        return
    pairs = codes.new_zeros(2 * stored.codes.numel(), dtype=torch.uint8)
    pairs[: stored.numel] = codes.to(torch.uint8)
    pairs = pairs.view(-1, 2)
    once(stored.codes.copy_, pairs[:, 0] | pairs[:, 1] << 4)


def _spread(numbers: Tensor, stored: Moment) -> Tensor:
    """Repeat each block's number for its elements: (numel,)."""
    return numbers.repeat_interleave(BLOCK[stored.format])[: stored.numel]


def _bfloat16(values: Tensor, bits: Tensor | None) -> Tensor:
    """Round float32 (n,), with eight random bits an element or to nearest."""
    if bits is None:
        return round_nearest(values, torch.bfloat16)
    pattern = values.view(torch.int32)
    carried = (pattern + (bits.to(torch.int32) << 8)) >> 16
    return (
        torch.where(values.isfinite(), carried, pattern >> 16).to(torch.int16).view(torch.bfloat16)
    )
