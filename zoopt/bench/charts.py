"""Charts of results: large, plain bars."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoopt.bench import common

BAR, BASELINE_BAR, INK = "#2a7f9e", "#9aa5b1", "#1f2933"


@dataclasses.dataclass(frozen=True)
class Panel:
    """Bars of one unit, a row each, in the rows' order.

    Attributes:
        scale: the factor that converts a row's figures to the unit in the title.
        highlighted: names of coloured bars; the others are there for comparison.
        marked: the row whose bar all others are compared with; a line is drawn at its end.
    """

    title: str
    rows: Sequence[common.Row]
    scale: float
    highlighted: frozenset[str]
    marked: str | None = None


def draw(path: Path, document: Mapping[str, Any], title: str, panels: Sequence[Panel]) -> None:
    """Draw the panels side by side, with the machine's identity below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
    }
    height = max(2.4, 0.34 * max(len(panel.rows) for panel in panels) + 1.5)
    with plt.rc_context(style):
        fig, axes = plt.subplots(
            *(1, len(panels)), figsize=(6.5 * len(panels), height), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for ax, panel in zip(axes[0], panels, strict=True):
            _bars(ax, panel)
        fig.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
        fig.supxlabel(_identity(document), x=0.01, ha="left", fontsize=8, color=INK)
        fig.savefig(path, dpi=130)
        plt.close(fig)


def _bars(ax: Any, panel: Panel) -> None:
    """A bar for each row, with its value beside it and its interquartile range as a line."""
    medians = [(row["median"] or 0.0) * panel.scale for row in panel.rows]
    spreads = [(row["spread"] or 0.0) * panel.scale for row in panel.rows]
    colours = [BAR if row["name"] in panel.highlighted else BASELINE_BAR for row in panel.rows]
    ax.barh(
        range(len(medians)), medians, color=colours, height=0.7,
        xerr=[spread / 2 for spread in spreads], error_kw={"elinewidth": 1, "ecolor": INK},
    )  # fmt: skip
    ends = [median + spread / 2 for median, spread in zip(medians, spreads, strict=True)]
    room = max(ends) * 0.02
    for place, row in enumerate(panel.rows):
        text = row["reason"] if row["median"] is None else f"{medians[place]:.3g}"
        if row["ratio"] is not None:
            text += f"  ({row['ratio']:.2f}x)"
        # There is room beside the bars, so the layout need not reserve any.
        ax.text(ends[place] + room, place, text, va="center", color=INK, in_layout=False)
        if row["name"] == panel.marked:
            ax.axvline(medians[place], color=INK, linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(medians)), [row["name"] for row in panel.rows])
    ax.set_ylim(len(medians) - 0.4, -0.6)
    ax.set_xlim(0, max(ends) * 1.4 or 1.0)
    ax.set_title(panel.title, fontsize=10)
    ax.grid(axis="x", alpha=0.3)


def _identity(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    commit = (machine["commit"] or "no commit")[:12]
    identity = (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{commit}, {document['date'][:10]}"
    )
    return identity + (f"; (x): over {document['ratio_to']}" if document["ratio_to"] else "")
