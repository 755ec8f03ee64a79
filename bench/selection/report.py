"""Table and chart of bench.selection."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

#: The metrics that the table shows.
SHOWN = ("accuracy", "cross_entropy")
HEADINGS = ("steps", "lr", "accuracy", "cross-entropy", "s/step", "peak MB", "state MB", "trained")


def text(content: Mapping[str, Any]) -> str:
    """The table, as wide as it needs to be, with what must be known to read it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    before = content["untrained"]["test"]
    table.add_row("untrained", "", "", *(f"{before[key]:.3f}" for key in SHOWN))
    for record in content["records"]:
        table.add_row(*row(record, content["costs"].get(record["method"])))
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    foot = "mean and standard deviation over seeds; lr: * the best is at the edge of the grid"
    return "\n".join([*(line.rstrip() for line in lines), "", foot])


def row(record: Mapping[str, Any], cost: Mapping[str, Any] | None) -> list[str]:
    """A method's cells."""
    figures = [record[key] for key in SHOWN]
    cells = [
        *(record["label"], str(record["steps"])),
        f"{record['lr']:g}{'*' if record['lr_at_edge'] else ' '}",
        *("" if f["mean"] is None else f"{f['mean']:.3f} ± {f['std']:.3f}" for f in figures),
    ]
    if cost is not None:
        sizes = (f"{cost[key] / 1e6:.1f}" for key in ("peak_bytes", "state_bytes"))
        cells += [f"{cost['seconds']:.3f}", *sizes, f"{cost['trained']:,}"]
    return cells


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Test cross-entropy by the peak memory of a step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for record in content["records"]:
        cost, entropy = content["costs"].get(record["method"]), record["cross_entropy"]
        if cost is None or entropy["mean"] is None:
            continue
        place = (cost["peak_bytes"] / 1e6, entropy["mean"])
        axes.errorbar(*place, yerr=entropy["std"], fmt="o", capsize=3)
        axes.annotate(record["label"], place, xytext=(6, 4), textcoords="offset points", size=8)
    axes.axhline(content["untrained"]["test"]["cross_entropy"], color="gray", ls=":", lw=1)
    axes.set(xlabel="peak of a step, MB of tensors", ylabel="test cross-entropy")
    axes.set_title("dotted: untrained; bars: standard deviation over seeds", size=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
