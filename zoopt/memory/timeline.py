"""A meter's record, event by event, and its extrapolation to a model with more layers.

A step on d layers and one on d + 1 differ by what one layer adds: blocks of events that occur
once more (the layer's forward, its backward, its part of a pass over the weights), and events that
grow (all weights are counted at once). With both, the step on any number of layers is known to the
byte: the blocks are repeated, and growing events grow in proportion.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from zoopt.memory.meter import CATEGORIES, Category, Event

#: Events that concern all tensors at once. Others have the same size at every depth.
_GROWING = ("phase", "track", "aten::_foreach", "aten::_fused")


@dataclasses.dataclass(frozen=True)
class Part:
    """A meter's record of a part of a step.

    Attributes:
        categories: the bytes of each category at the highest point.
        phases: the highest point of each phase.
        peak: the highest point.
        last: the bytes of each category at the end.
    """

    categories: dict[Category, int]
    phases: dict[str, int]
    peak: int
    last: dict[Category, int]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Events of a meter.

    Attributes:
        phases, names: the phase and the operator of each event, (events,).
        live: bytes of each of CATEGORIES after it, int64 (events, categories).
    """

    phases: list[str]
    names: list[str]
    live: np.ndarray

    @staticmethod
    def of(events: Sequence[Event]) -> Timeline:
        """The events as columns."""
        live = np.array([event.live for event in events], dtype=np.int64)
        return Timeline([e.phase for e in events], [e.name for e in events], live)

    @property
    def changes(self) -> np.ndarray:
        """What each event changed: int64 (events, categories)."""
        return np.diff(self.live, axis=0, prepend=np.zeros_like(self.live[:1]))

    def buffered(self, prefix: str, nbytes: int) -> Timeline:
        """With a buffer of so many bytes, of the workspace, in the phases that begin like that."""
        held = np.array([phase.startswith(prefix) for phase in self.phases])
        live = self.live.copy()
        live[held, CATEGORIES.index("workspace")] += nbytes
        return dataclasses.replace(self, live=live)

    @property
    def part(self) -> Part:
        """Its peaks."""
        totals = self.live.sum(axis=1)
        phases: dict[str, int] = {}
        for phase, total in zip(self.phases, totals.tolist(), strict=True):
            phases[phase] = max(phases.get(phase, 0), total)
        at_peak, last = self.live[int(totals.argmax())], self.live[-1]
        return Part(_by_category(at_peak), phases, int(totals.max()), _by_category(last))


def _by_category(row: np.ndarray) -> dict[Category, int]:
    return dict(zip(CATEGORIES, row.tolist(), strict=True))


def extended(base: Timeline, deeper: Sequence[tuple[Timeline, int]]) -> Timeline | None:
    """The timeline of a model of more layers.

    Args:
        base: of a model of few layers.
        deeper: for each stack of layers, the timeline of a model with one more of them than the
            base, and how many more the whole model has.

    Returns:
        The whole model's, or None if the timelines differ by more than repeated layers.
    """
    changes = base.changes
    grown = changes.copy()
    inserted: dict[int, list[tuple[Timeline, int, int, int]]] = {}
    for other, more in deeper:
        other_changes = other.changes
        matcher = difflib.SequenceMatcher(
            None, _signature(base, changes), _signature(other, other_changes), autojunk=False
        )
        for kind, i, i_end, j, j_end in matcher.get_opcodes():
            if kind == "equal":
                # Zero except for events that grow: all others are equal to the byte.
                grown[i:i_end] += more * (other_changes[j:j_end] - changes[i:i_end])
            elif kind == "insert":
                inserted.setdefault(i, []).append((other, j, j_end, more))
            else:
                return None
    phases: list[str] = []
    names: list[str] = []
    rows: list[np.ndarray] = []
    for i in range(len(base.phases) + 1):
        for other, j, j_end, more in inserted.get(i, ()):
            phases += other.phases[j:j_end] * more
            names += other.names[j:j_end] * more
            rows.append(np.tile(other.changes[j:j_end], (more, 1)))
        if i < len(base.phases):
            phases.append(base.phases[i])
            names.append(base.names[i])
            rows.append(grown[i : i + 1])
    return Timeline(phases, names, np.concatenate(rows).cumsum(axis=0))


def _signature(timeline: Timeline, changes: np.ndarray) -> list[tuple[str, str, bytes]]:
    """Equal for equal events: with their sizes, unless these grow with the depth."""
    return [
        (phase, name, b"" if name.startswith(_GROWING) else change.tobytes())
        for phase, name, change in zip(timeline.phases, timeline.names, changes, strict=True)
    ]
