"""Keys: they name the noise of a tensor."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from zoopt.checks import check_number

Distribution = Literal["normal", "rademacher"]

#: Block numbers have 56 bits, and a block holds eight normals.
MAX_INDEX = 1 << 59
#: Densities are multiples of 1 / DENSITY_STEPS: a mask has 16 bits an element.
DENSITY_STEPS = 1 << 16


@dataclasses.dataclass(frozen=True)
class NoiseKey:
    """Names the noise of one tensor (or of a slice of one, `offset` elements in).

    Args:
        seed: 64 bits, the run's.
        stream: 32 bits, the tensor's.
        offset: position of the first element in the whole, unsharded tensor.
        distribution: `"normal"` or `"rademacher"`.
        density: the fraction of elements that a direction moves, chosen at random in each draw; in
            [2^-17, 1], rounded to a multiple of 2^-16 (and to 2^-16 at least).

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    seed: int
    stream: int
    offset: int = 0
    distribution: Distribution = "normal"
    density: float = 1.0

    def __post_init__(self) -> None:
        check_unsigned("seed", self.seed, 64)
        check_unsigned("stream", self.stream, 32)
        if not 0 <= self.offset < MAX_INDEX:
            raise ValueError(f"offset must be an int in [0, 2^59), got {self.offset!r}")
        if self.distribution == "normal" and self.density == 1.0:
            return  # the common case: first-order optimizers make one in every update
        if self.distribution not in get_args(Distribution):
            raise ValueError(
                f"distribution must be one of {', '.join(map(repr, get_args(Distribution)))}, "
                f"got {self.distribution!r}"
            )
        check_number("density", self.density, low=0.0, high=1.0, open_low=True)
        scaled = float(self.density) * DENSITY_STEPS
        if scaled < 0.5:
            raise ValueError(
                f"density must be at least 2^-17, got {self.density!r}, which rounds to nothing; "
                f"pass {1 / DENSITY_STEPS:.2e} for the least that there is"
            )
        object.__setattr__(self, "density", max(1, round(scaled)) / DENSITY_STEPS)

    @property
    def threshold(self) -> int | None:
        """An element moves if the mask's 16 bits are below this; None if all do."""
        return None if self.density == 1.0 else int(self.density * DENSITY_STEPS)

    def shifted(self, elements: int) -> NoiseKey:
        """The key of the slice that begins `elements` later."""
        if not elements:
            return self
        return dataclasses.replace(self, offset=self.offset + elements)


def check_unsigned(name: str, value: int, bits: int) -> None:
    """Raise unless `value` is an int of at most `bits` bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be an int in [0, 2^{bits}), got {value!r}")
