"""What a run leaves behind: a table on the screen, a chart and a JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .training import smooth

NAMES = {"inference": "Inference", "mezo": "MeZO", "adamw": "AdamW"}
COLOURS = {"inference": "#9aa5b1", "mezo": "#1f6fb2", "adamw": "#d1662b"}
METRICS = {
    "accuracy": "accuracy",
    "calibrated_accuracy": "accuracy, median threshold",
    "cross_entropy": "cross-entropy",
    "calibrated_cross_entropy": "cross-entropy, median threshold",
}


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
    }


def print_summary(figures: dict[str, Any]) -> None:
    """Print the outcome as two small tables."""
    console = Console()
    before, after = figures["test"]["before"], figures["test"]["after"]
    table = Table(title=f"{before['sentences']} held-out sentences", title_justify="left")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    for key, name in METRICS.items():
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}")
    console.print(table)

    memory = figures["memory"]
    if memory is not None and "inference" in memory:
        table = Table(title="peak memory, one batch", title_justify="left")
        table.add_column("")
        table.add_column("MiB", justify="right")
        table.add_column("times inference", justify="right")
        floor = memory["inference"]["peak_mib"]
        for method, name in NAMES.items():
            if method not in memory:
                continue
            peak = memory[method]["peak_mib"]
            table.add_row(name, f"{peak:,.0f}", f"{peak / floor:.2f}")
        console.print(table)
    if memory is not None and memory["left_out"]:
        names = ", ".join(NAMES[method] for method in memory["left_out"])
        console.print(f"peak memory not measured, for want of time: {names}; see --seconds")
    seconds = figures["seconds"]
    console.print(
        f"{figures['steps']['done']} steps in {seconds['training']:.0f} s, "
        f"{seconds['total']:.0f} s in all"
    )


def write_json(figures: dict[str, Any], path: Path) -> None:
    """Write all figures."""
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw the loss curve and, where measured, the memory bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    memory = figures["memory"]
    if memory is not None and "inference" not in memory:
        memory = None
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
    }
    with plt.rc_context(style):
        columns = 1 if memory is None else 2
        fig, axes = plt.subplots(
            1, columns, figsize=((7.5, 4.8) if memory is None else (11.6, 4.8)), squeeze=False,
            width_ratios=[1.35, 1][:columns], layout="constrained",
        )  # fmt: skip
        _draw_loss(axes[0][0], figures)
        if memory is not None:
            _draw_memory(axes[0][1], memory)
        fig.suptitle(_headline(figures), x=0.01, ha="left", fontsize=12)
        fig.savefig(path, dpi=150)
        plt.close(fig)


def _headline(figures: dict[str, Any]) -> str:
    before, after = figures["test"]["before"], figures["test"]["after"]
    what = "LoRA adapters" if figures["settings"]["lora"] else "all parameters"

    def change(key: str) -> str:
        return f"{before[key]:.1%} \N{RIGHTWARDS ARROW} {after[key]:.1%}"

    return (
        f"{NAMES[figures['settings']['optimizer']]} on {what}: "
        f"test accuracy {change('accuracy')}\n"
        f"without label bias (threshold at the median): {change('calibrated_accuracy')}\n"
    )


def _draw_loss(ax: Any, figures: dict[str, Any]) -> None:
    colour = COLOURS[figures["settings"]["optimizer"]]
    losses = figures["training"]["losses"]
    steps = range(1, len(losses) + 1)
    ax.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8, label="training, each batch")
    ax.plot(steps, smooth(losses), color=colour, linewidth=2.2, label="training, smoothed")
    points = figures["training"]["validation"]
    ax.plot(
        [p["step"] for p in points], [p["cross_entropy"] for p in points],
        "o", color="black", markersize=6, label="validation",
    )  # fmt: skip
    ax.axhline(math.log(2), color="black", linewidth=1, linestyle=":", label="tossing a coin")
    ax.set(title="Cross-entropy between the two words", xlabel="step", xlim=(0, None))
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)


def _draw_memory(ax: Any, memory: dict[str, Any]) -> None:
    methods = [m for m in NAMES if m in memory]
    peaks = [memory[m]["peak_mib"] for m in methods]
    ax.barh([NAMES[m] for m in methods], peaks, color=[COLOURS[m] for m in methods], height=0.6)
    for row, peak in enumerate(peaks):
        ax.text(peak, row, f" {peak:,.0f} MiB\n {peak / peaks[0]:.2f} x", va="center", fontsize=10)
    weights = memory["inference"]["weights_mib"]
    ax.axvline(weights, color="black", linewidth=1, linestyle=":", label="the weights alone")
    ax.legend(frameon=False, loc="upper right")
    ax.invert_yaxis()
    ax.set(title="Peak memory, same batch", xlabel="MiB", xlim=(0, 1.3 * max(peaks)))
