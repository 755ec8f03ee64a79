"""The chart of a report: steps relative to their references, and the bandwidth of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoopt.bench import charts
from zoopt.bench.common import Row
from zoopt.bench.methods import INFERENCE, PUBLISHED
from zoopt.doctor.gpu import first_order, kernels, zeroth_order
from zoopt.doctor.gpu.bars import OTHERS
from zoopt.doctor.gpu.rows import of_section

#: The dtype of the weights in the kernels' panel.
DTYPE = "bfloat16"


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Draw the measured figures; write no file if there are none."""
    rows: list[Row] = document["rows"]
    panels = []
    settings = dict.fromkeys(row["setting"] for row in of_section(rows, zeroth_order.SECTION))
    for setting in settings:
        own = [row for row in of_section(rows, zeroth_order.SECTION) if row["setting"] == setting]
        title = f"{setting}: ms a step (x: of two forward passes)"
        panels.append(_panel(title, own, {INFERENCE, PUBLISHED}, INFERENCE))
    own = list(of_section(rows, first_order.SECTION))
    others = {row["method"] for row in own} - {*first_order.OURS, first_order.NEAREST}
    title = "first-order: ms a step (x: of torch's fused AdamW)"
    panels.append(_panel(title, own, others, first_order.REFERENCE))
    own = [
        {**row, "median": row["fraction_of_copy_bandwidth"], "spread": 0.0, "ratio": None}
        for row in of_section(rows, kernels.SECTION)
        if row["dtype"] == DTYPE and not row["method"].startswith(OTHERS)
    ]
    panels.append(_panel(f"kernels, {DTYPE}: share of a copy's bandwidth", own, set(), None))
    filled = [panel for panel in panels if panel.rows]
    if filled:
        charts.draw(path, document, "What this GPU says", filled)


def _panel(title: str, rows: list[Row], others: set[str], marked: str | None) -> charts.Panel:
    named = [{**row, "name": row["method"]} for row in rows]
    ours = frozenset(row["name"] for row in named) - others
    return charts.Panel(title, named, 1.0, ours, marked)
