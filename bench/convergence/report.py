"""Table and chart of bench.convergence."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

VERDICT_COLOURS = {
    "reference": "#1f2933",
    "beats": "#1f8a4c",
    "ties": "#7b8794",
    "does not beat": "#c0392b",
    "too few runs": "#b7bfc8",
}
COLUMNS = 4
COIN = math.log(2)


def text(content: Mapping[str, Any]) -> str:
    """The table, as wide as it needs to be, with what must be known to read it."""
    settings, sizes, untrained = content["settings"], content["sizes"], content["untrained"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method")
    for heading in (
        *("fwd/step", "steps", "lr", "val CE", "test CE", "test accuracy"),
        *("accuracy, median", "time/fwd", "runs"),
    ):
        table.add_column(heading, justify="right")
    table.add_column("vs MeZO")
    validation, test = untrained["validation"], untrained["test"]
    table.add_row(
        *("untrained", "", "", "", f"{validation['cross_entropy']:.3f}"),
        *(f"{test[key]:.3f}" for key in ("cross_entropy", "accuracy", "calibrated_accuracy")),
    )
    table.add_row("tossing a coin", "", "", "", f"{COIN:.3f}", f"{COIN:.3f}", "0.500", "0.500")
    for record in content["records"]:
        table.add_row(
            record["label"],
            str(record["forwards_per_step"]),
            str(record["steps"]),
            f"{record['lr']:g}{'*' if record['lr_at_edge'] else ' '}",
            *(
                _mean(record[key])
                for key in (
                    *("validation_cross_entropy", "test_cross_entropy"),
                    *("test_accuracy", "test_calibrated_accuracy"),
                )
            ),
            _number(record["time_per_forward_of_mezo"], 2),
            str(record["seeds"]),
            record["verdict"],
        )
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    head = [
        f"{settings['model']}, last {settings['layers']} layers "
        f"({sizes['trained_parameters']:,} parameters, {settings['dtype']}), "
        f"{settings['forwards']} forward passes of {settings['batch_size']} sentences",
        f"{sizes['train']} sentences to train on, {sizes['validation']} to validate, "
        f"{sizes['test']} to test; mean and standard deviation over seeds",
        "",
    ]
    foot = [
        "",
        "lr: * the best is at the edge of the extended grid; median: threshold at the median, "
        "without label bias;",
        "time/fwd: CPU time of training a forward pass counted, over MeZO's",
        content["rule"],
    ]
    return "\n".join([*head, *lines, *foot])


def _mean(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return "diverged"
    return f"{figure['mean']:.3f} +- {figure['std']:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Curves of the validation loss, a panel a method, and the final test figures with spreads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = content["records"]
    reference = next((r for r in records if r["verdict"] == "reference"), None)
    rows = math.ceil(len(records) / COLUMNS)
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 8.5,
        "axes.titlelocation": "left",
    }
    with plt.rc_context(style):
        height = max(4.5, 1.45 * rows + 1.2)
        fig: Any = plt.figure(figsize=(16, height), layout="constrained")
        left, right = fig.subfigures(1, 2, width_ratios=[1.15, 1])
        axes = left.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
        for ax, record in zip(axes, records, strict=False):
            _draw_curve(ax, record, reference)
        for ax in axes[len(records) :]:
            ax.set_axis_off()
        axes[0].set_ylim(*_curve_limits(records))
        left.supxlabel("forward passes", fontsize=9)
        left.suptitle(
            "Validation cross-entropy: mean and range over seeds; MeZO dashed, a coin dotted",
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
        _draw_finals(right.subplots(1, 2, sharey=True), records, reference, content["untrained"])
        right.suptitle(
            f"Test set after {content['settings']['forwards']} forward passes: each seed, mean and "
            "standard deviation",
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
        fig.savefig(path, dpi=130)
        plt.close(fig)


def _curves(record: Mapping[str, Any]) -> list[list[float]]:
    return [[math.nan if v is None else v for v in curve] for curve in record["curves"]]


def _mean_curve(record: Mapping[str, Any]) -> list[float]:
    return [sum(point) / len(point) for point in zip(*_curves(record), strict=True)]


def _curve_limits(records: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    values = [v for r in records for v in _mean_curve(r) if math.isfinite(v)]
    # All begin at the same point, far above where they differ.
    return min(*values, COIN) - 0.03, COIN + 0.12


def _draw_curve(ax: Any, record: Mapping[str, Any], reference: Mapping[str, Any] | None) -> None:
    colour = VERDICT_COLOURS[record["verdict"]]
    x, curves = record["curve_forwards"], _curves(record)
    ax.axhline(COIN, color="black", linewidth=0.8, linestyle=":")
    if reference is not None:
        ax.plot(
            reference["curve_forwards"], _mean_curve(reference),
            color="#1f2933", linewidth=1, linestyle="--", alpha=0.7,
        )  # fmt: skip
    points = list(zip(*curves, strict=True))
    ax.fill_between(x, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.2)
    ax.plot(x, _mean_curve(record), color=colour, linewidth=1.8)
    ax.set_title(f"{record['label']}\n{record['verdict']}", color=colour)
    ax.grid(axis="y", alpha=0.3)


def _draw_finals(
    axes: Sequence[Any],
    records: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any] | None,
    untrained: Mapping[str, Any],
) -> None:
    """Dots for the seeds, a bar for the mean and its spread, best at the top."""

    def loss(record: Mapping[str, Any]) -> float:
        mean = record["test_cross_entropy"]["mean"]
        return math.inf if mean is None else float(mean)

    ordered = sorted(records, key=loss)
    panels = {"test_cross_entropy": "cross-entropy", "test_accuracy": "accuracy"}
    for ax, (key, name) in zip(axes, panels.items(), strict=True):
        start = untrained["test"][key.removeprefix("test_")]
        ax.axvline(start, color="#b7bfc8", linewidth=1, linestyle="--", label="untrained")
        chance = COIN if name == "cross-entropy" else 0.5
        ax.axvline(chance, color="black", linewidth=1, linestyle=":", label="a coin")
        if reference is not None and reference[key]["mean"] is not None:
            mean, std = reference[key]["mean"], reference[key]["std"]
            ax.axvspan(mean - std, mean + std, color="#1f2933", alpha=0.08, label="MeZO")
        for row, record in enumerate(ordered):
            colour, figure = VERDICT_COLOURS[record["verdict"]], record[key]
            if figure["mean"] is None:
                ax.text(chance, row, " diverged", va="center", color=colour)
                continue
            ax.plot(figure["values"], [row] * record["seeds"], "o", color=colour, alpha=0.35, ms=4)
            ax.errorbar(
                figure["mean"], row, xerr=figure["std"], fmt="D", color=colour, ms=5, capsize=3
            )
            if name == "cross-entropy" and figure["mean"] > start + 0.05:
                text = f"{figure['mean']:.2f} \N{RIGHTWARDS ARROW} "
                ax.text(start + 0.05, row, text, va="center", ha="right", color=colour)
        if name == "cross-entropy":
            ax.set_xlim(right=start + 0.05)
        ax.set_title(name, fontsize=10)
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(ordered)), [record["label"] for record in ordered])
    for tick, record in zip(axes[0].get_yticklabels(), ordered, strict=True):
        tick.set_color(VERDICT_COLOURS[record["verdict"]])
    axes[0].invert_yaxis()
    axes[1].legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=3, fontsize=8
    )
