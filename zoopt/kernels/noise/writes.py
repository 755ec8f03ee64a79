"""Writes of theta that follow one after the other: what a run has done to it, as numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from zoopt.checks import check_choice
from zoopt.dtypes import Rounding, accumulator_dtype, scalars
from zoopt.kernels.noise.key import check_unsigned

#: What is made of the estimate ghat; the numbers are those of the compiled kernels.
Rule = Literal["none", "sign", "adam", "momentum"]
RULES: dict[str, int] = {"none": 0, "sign": 1, "adam": 2, "momentum": 3}
#: Directions of a tile that are kept on the CPU until a later write uses them again.
_MOST_KEPT = 64
#: At most so many writes along one direction are made at once on the CPU.
_LONGEST_RUN = 3


@dataclasses.dataclass(frozen=True)
class Write:
    """theta <- round(decay theta + sum_j coefficients[j] z(draws[j]) + u).

    u is 0, or made of an estimate ghat that begins as 0: term i, in order, adds

        ghat <- ghat + gradients[i] z(estimate_draws[i])

    `rule="sign"`: u = step_size sign(ghat). `rule="adam"`: where closes[i],

        m <- m + first[i] ghat,    v <- v + second[i] (ghat ghat),    ghat <- 0

    and u = (step_size m) / (sqrt(v) + eps), as in `adam_window_`. `rule="momentum"`: a tensor
    beside theta, the buffer, takes the place of ghat and is kept for the next write. It is first
    multiplied by `momentum`, then the terms are added to it, and u = step_size buffer, as in
    `momentum_`.

    Attributes:
        draws, coefficients: a number a direction.
        decay: multiplies theta.
        rounding_draw: the draw whose bits round stochastically, or None to round to nearest.
        rule: `"none"`, `"sign"`, `"adam"` or `"momentum"`.
        estimate_draws, gradients, first, second, closes: a number a term; the last three of
            `"adam"` alone.
        step_size, eps, momentum: as in the formulas.
    """

    draws: tuple[int, ...]
    coefficients: tuple[float, ...]
    decay: float = 1.0
    rounding_draw: int | None = None
    rule: Rule = "none"
    estimate_draws: tuple[int, ...] = ()
    gradients: tuple[float, ...] = ()
    first: tuple[float, ...] = ()
    second: tuple[float, ...] = ()
    closes: tuple[bool, ...] = ()
    step_size: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0

    def undone(self) -> Write:
        """The write that takes this one back, up to rounding, which is to nearest.

        Raises:
            ValueError: it has an estimate, or leaves nothing of theta.
        """
        if self.rule != "none" or not self.decay:
            raise ValueError(
                f"a write that can be undone must be a sum, with a decay that is not 0, got {self}"
            )
        back = tuple(-coefficient / self.decay for coefficient in self.coefficients)
        return Write(self.draws, back, 1.0 / self.decay)

    def check(self) -> None:
        """Raise unless lengths, draws and rule fit."""
        check_choice("rule", self.rule, get_args(Rule))
        _check_lengths("draws", self.draws, coefficients=self.coefficients)
        _check_lengths("estimate_draws", self.estimate_draws, gradients=self.gradients)
        if self.rule == "adam":
            own = {"first": self.first, "second": self.second, "closes": self.closes}
            _check_lengths("estimate_draws", self.estimate_draws, **own)
        for draw in (*self.draws, *self.estimate_draws):
            check_unsigned("draw", draw, 32)
        if self.rounding_draw is not None:
            check_unsigned("rounding_draw", self.rounding_draw, 32)

    def rounded(self, dtype: torch.dtype) -> Write:
        """The write with its numbers as every implementation sees them."""
        numbers = (self.decay, self.step_size, self.eps, self.momentum)
        decay, step_size, eps, momentum = scalars(numbers, dtype)
        exact = dtype == accumulator_dtype(dtype)
        return dataclasses.replace(
            self,
            coefficients=tuple(scalars(self.coefficients, dtype)),
            gradients=tuple(scalars(self.gradients, dtype)),
            first=tuple(scalars(self.first, dtype)),
            second=tuple(scalars(self.second, dtype)),
            decay=decay,
            step_size=step_size,
            eps=eps,
            momentum=momentum,
            rounding_draw=None if exact else self.rounding_draw,
        )


def _check_lengths(name: str, draws: Sequence[int], **columns: Sequence[Any]) -> None:
    for column, values in columns.items():
        if len(values) != len(draws):
            raise ValueError(
                f"{column} and {name} must have equal lengths, got {len(values)} and {len(draws)}"
            )


def rounding_draw(rounding: Rounding, draws: Sequence[int]) -> int | None:
    """The draw that `apply_` rounds by: the last one, or None to nearest."""
    return draws[-1] if rounding == "stochastic" else None


def kept_directions(draws: Sequence[int], room: int) -> tuple[list[int], list[bool], list[int]]:
    """Where to keep the directions of terms until they are used again; the one that was used least
    recently gives way.

    Args:
        draws: one for each term, in order.
        room: how many directions can be kept.

    Returns:
        For each term: its direction's place; whether it must be made; and, where it must, the last
        term that uses what was made.
    """
    held: dict[int, tuple[int, int]] = {}  # draw -> place, the term that made it; oldest use first
    places, made, last = [], [], list(range(len(draws)))
    for j, draw in enumerate(draws):
        known = held.pop(draw, None)
        if known is None:
            place = held.pop(next(iter(held)))[0] if len(held) == room else len(held)
        else:
            place = known[0]
            last[known[1]] = j
        held[draw] = place, j if known is None else known[1]
        places.append(place)
        made.append(known is None)
    return places, made, last


class Script:
    """Writes in order, with their numbers rounded to the accumulator's dtype.

    Args:
        writes: checked.
        dtype: theta's.
    """

    def __init__(self, writes: Sequence[Write], dtype: torch.dtype) -> None:
        self._given, self._dtype = writes, dtype

    @functools.cached_property
    def writes(self) -> list[Write]:
        """The writes, with rounded numbers."""
        return [write.rounded(self._dtype) for write in self._given]

    @property
    def stateful(self) -> bool:
        """Whether any write has a buffer."""
        return any(write.rule == "momentum" for write in self._given)

    @property
    def estimates(self) -> bool:
        """Whether any write has an estimate."""
        return any(write.rule != "none" for write in self._given)

    @functools.cached_property
    def _directions(self) -> tuple[list[int], list[bool], list[int]]:
        """Of each term: place, whether it is made there, and the last term that uses it, for as
        many places as the write with most directions needs."""
        most = max((len({*write.draws, *write.estimate_draws}) for write in self._given), default=1)
        room = min(_MOST_KEPT, max(1, most))
        places, made, last = kept_directions(self._draws, room)
        # Those for one term alone need no place.
        shared = [j for j, m in enumerate(made) if not m or last[j] > j]
        own, *_ = kept_directions([self._draws[j] for j in shared], room)
        places = [0] * len(places)
        for j, place in zip(shared, own, strict=True):
            places[j] = place
        return places, made, last

    @functools.cached_property
    def _draws(self) -> list[int]:
        return [draw for write in self._given for draw in (*write.draws, *write.estimate_draws)]

    @functools.cached_property
    def kept(self) -> int:
        """How many directions of a tile are kept on the CPU."""
        return max(self._directions[0], default=0) + 1

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray[Any, Any], ...]:
        """The numbers as columns for the CPU, rounded to float32; a write is one with those before
        it where it only adds terms to their result (see `_joined`).

        A number a write: where its terms end (a 0 comes before), where its estimate's begin, the
        length of the run that begins there (see `_runs`), rounding draw or -1, rule, decay,
        step_size, eps, momentum. A number a term: draw, where its direction is kept, whether it is
        made there first, whether for this term alone, coefficient or gradient, first, second,
        whether it closes.
        """
        counts = [len(write.draws) + len(write.estimate_draws) for write in self._given]
        ends = np.cumsum([0, *counts], dtype=np.int64)
        exact = self._dtype == torch.float32
        places, made, last = self._directions
        runs = self._runs(ends.tolist(), made, last)
        joined = self._joined(runs) if exact else [False] * len(runs)
        begun = [w for w, own in enumerate(joined) if not own]
        writes = [self._given[w] for w in begun]
        ends = np.append(ends[begun], ends[-1])
        rounds = [
            -1 if exact or write.rounding_draw is None else write.rounding_draw for write in writes
        ]

        def column(dtype: Any, *names: str) -> np.ndarray[Any, Any]:
            """A number a term: those of the write and of its estimate, or else zeros."""
            values: list[Any] = []
            for write in self._given:
                for name, draws in zip(names, (write.draws, write.estimate_draws), strict=True):
                    values += (getattr(write, name) if name else ()) or (0,) * len(draws)
            return np.array(values, dtype)

        return (
            ends,
            ends[1:] - np.array([len(write.estimate_draws) for write in writes], np.int64),
            np.array([runs[w] for w in begun], np.int64),
            np.array(rounds, np.int64),
            np.array([RULES[write.rule] for write in writes], np.int64),
            *(
                np.array([getattr(write, name) for write in writes], np.float32)
                for name in ("decay", "step_size", "eps", "momentum")
            ),
            np.array(self._draws, np.uint32),
            np.array(places, np.int64),
            np.array(made, np.bool_),
            np.array([m and last[j] == j for j, m in enumerate(made)], np.bool_),
            column(np.float32, "coefficients", "gradients"),
            column(np.float32, "", "first"),
            column(np.float32, "", "second"),
            column(np.bool_, "", "closes"),
        )

    def _joined(self, runs: list[int]) -> list[bool]:
        """For each float32 write, whether it can be one with the write before: both are sums alone
        and outside of runs, and its decay is 1, so that it adds its terms to what that has left."""
        joined, before, free = [], False, 0
        for w, write in enumerate(self._given):
            free = max(free, w + runs[w])
            alone = w >= free and write.rule == "none"
            joined.append(alone and before and np.float32(write.decay) == 1.0)
            before = alone
        return joined

    def _runs(self, ends: list[int], made: list[bool], last: list[int]) -> list[int]:
        """For each write, how many writes of one term each begin there, all along a direction that
        is made by the first of them and not used after the last; 0 if there is no such run."""
        runs = [0] * len(self._given)
        for w, write in enumerate(self._given):
            start = ends[w]
            if len(write.draws) == 1 and write.rule == "none" and made[start]:
                length = last[start] - start + 1
                others = self._given[w + 1 : w + length]
                if length <= _LONGEST_RUN and all(
                    other.draws == write.draws and other.rule == "none" for other in others
                ):
                    runs[w] = length
        return runs

    @functools.cached_property
    def numbers(self) -> tuple[float, ...]:
        """The same in one row, as floats: each write's nine, then its terms'.

        A write: decay, whether it rounds stochastically, its draw's halves, rule, step_size and
        eps, terms, terms of its estimate. A term: its draw's halves, coefficient. One of an
        estimate: its draw's halves, gradient, first, second, whether it closes.
        """
        row: list[float] = []
        for write in self.writes:
            draw = write.rounding_draw or 0
            row += (write.decay, float(write.rounding_draw is not None), draw >> 16, draw & 0xFFFF)
            row += (RULES[write.rule], write.step_size, write.eps)
            row += (len(write.draws), len(write.estimate_draws))
            for draw, coefficient in zip(write.draws, write.coefficients, strict=True):
                row += (draw >> 16, draw & 0xFFFF, coefficient)
            none = (0.0,) * len(write.estimate_draws)
            columns = (
                write.gradients,
                write.first or none,
                write.second or none,
                write.closes or none,
            )
            for draw, *numbers in zip(write.estimate_draws, *columns, strict=True):
                row += (draw >> 16, draw & 0xFFFF, *numbers)
        return tuple(map(float, row))
