"""How many steps a time budget pays for on this machine, and what the run is doing meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

#: The first step also loads or compiles kernels.
WARM_UP = 1
#: Timed steps that are waited for before the number of steps is chosen.
TIMED = 3
#: The most recent steps tell how long the next will take: a neighbour may have come or gone.
RECENT = 10


def steps_that_fit(durations: Sequence[float], planned: int, seconds_left: float) -> int:
    """How many steps there will be in all, those done among them; never more than planned.

    Args:
        durations: seconds of each step so far, at least `WARM_UP + TIMED` of them.
        planned: how many steps there would be without a limit.
        seconds_left: for the steps to come.
    """
    per_step = statistics.median(durations[WARM_UP:][-RECENT:])
    affordable = len(durations) + max(0.0, seconds_left) / per_step
    return planned if affordable >= planned else int(affordable)


class Stages:
    """Says what is being done, and how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._console = Console(highlight=False)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A spinner on a terminal, and a line; elsewhere the line alone."""
        started = time.perf_counter()
        if not self._console.is_terminal:
            self._console.print(f"{text} ...", markup=False, soft_wrap=True)
        with self._console.status(f"{text} ..."):
            yield
        self.seconds[text] = time.perf_counter() - started
        self._console.print(f"{text}: {self.seconds[text]:.1f} s", markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)
