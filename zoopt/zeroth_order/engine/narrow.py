"""Losses of 16 bits, whose differences are mostly rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from zoopt.warn import warn

#: How many differences of 16-bit losses are judged, the run's first.
_JUDGED = 4


class JudgesLosses:
    """Warns of losses that are too coarse to learn from."""

    #: How many differences of 16-bit losses have been judged, and how coarse they were.
    _judged = _coarse = 0

    def _judge(
        self, eps: float, compared: Iterable[Sequence[float]], name: str, scale: str
    ) -> None:
        """Warn of losses of 16 bits that do not differ, or twice hardly: once, early in the run.

        Args:
            eps: the relative spacing of such numbers, or 0 for wider ones.
            compared: the losses, those together whose differences count.
            name: what the closure returns.
            scale: the argument that sets how far apart the points are.
        """
        for losses in compared if eps else ():
            finite = [loss for loss in losses if math.isfinite(loss)]
            spacing = eps * max(map(abs, finite), default=0.0)
            if len(finite) < 2 or not spacing or self._judged >= _JUDGED:
                continue
            spread = max(finite) - min(finite)
            self._judged += 1
            self._coarse += (spread <= 2.0 * spacing) + (spread == 0.0)
            if self._coarse >= 2:
                self._judged = _JUDGED
                warn(
                    f"the {name} has only 16 bits, and two differ by {spread:.1g} where such "
                    f"numbers lie {spacing:.1g} apart: the estimate will be mostly rounding; "
                    f"compute the {name} in float32, from logits.float() say, and return it as it "
                    f"is ({name}.float() at the least), or raise {scale}"
                )
                return
