"""Table and chart of bench.pretrain."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

#: Steps that a point of a loss curve is the mean of.
SMOOTH = 10


def text(content: Mapping[str, Any]) -> str:
    """The table, as wide as it needs to be, with what must be known to read it."""
    settings, sizes = content["settings"], content["sizes"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method")
    for heading in (
        *("lr", "perplexity", "state, MB", "of AdamW", "matrices'", "trained"),
        *("ms/step", "ms/update", "time of AdamW", "runs"),
    ):
        table.add_column(heading, justify="right")
    for record in content["records"]:
        seconds, shares = record["cpu_seconds"], record["of_reference"]
        table.add_row(
            record["label"],
            f"{record['lr']:g}{'*' if record['lr_at_edge'] else ' '}",
            _mean(record["validation_perplexity"]),
            f"{record['state_bytes'] / 1e6:.3f}",
            _percent(shares["state_bytes"]),
            _percent(shares["matrix_state_bytes"]),
            f"{record['trained_parameters']:,}",
            f"{seconds['median_step'] * 1e3:.0f}",
            f"{seconds['mean_optimizer'] * 1e3:.1f}",
            "-" if shares["mean_step"] is None else f"{shares['mean_step']:.2f}",
            str(record["seeds"]),
        )
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    tokens = settings["batch_size"] * settings["seq_len"]
    head = [
        f"LLaMA {settings['model']}: {sizes['parameters']:,} parameters, "
        f"{sizes['matrix_parameters']:,} of them in the decoder's matrices; "
        f"{settings['steps']} steps of {tokens} tokens ({settings['steps'] * tokens:,}), "
        f"rank {settings['rank']} of {settings['width']}, refreshed every "
        f"{settings['update_proj_gap']} steps",
        f"{sizes['train_tokens']:,} tokens to train on, {sizes['validation_tokens']:,} to "
        "validate; mean and standard deviation over seeds",
        "",
    ]
    foot = [
        "",
        "lr: * the best is at the edge of the extended grid; state: the optimizer's, measured, and "
        "of it the decoder matrices' part;",
        "ms/step: CPU time of forward, backward and update, median; ms/update: the update alone, "
        "mean with its refreshes;",
        "time of AdamW: mean CPU time of a step with its refreshes, over torch.optim.AdamW's",
    ]
    return "\n".join([*head, *lines, *foot])


def _mean(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return "diverged"
    return f"{figure['mean']:.1f} +- {figure['std']:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def smooth(curve: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Steps and means of `SMOOTH` losses each; none where one has diverged."""
    ends = range(SMOOTH, len(curve) + 1, SMOOTH)
    parts = [[math.nan if v is None else v for v in curve[e - SMOOTH : e]] for e in ends]
    return list(ends), [sum(part) / SMOOTH for part in parts]


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Training loss over steps; and perplexities, best first, with the optimizers' states."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = sorted(
        content["records"],
        key=lambda record: record["validation_perplexity"]["mean"] or math.inf,
    )
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        fig: Any
        fig, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
        for number, record in enumerate(records):
            colour = plt.get_cmap("turbo")(0.05 + 0.9 * number / max(1, len(records) - 1))
            left.plot(*smooth(record["curve"]), color=colour, linewidth=1.2)
            figure = record["validation_perplexity"]
            state = f"{record['state_bytes'] / 1e6:.3g} MB"
            end = right.get_yaxis_transform()
            right.annotate(state, (1.02, number), xycoords=end, va="center", annotation_clip=False)
            if figure["mean"] is not None:
                right.errorbar(
                    *(figure["mean"], number), xerr=figure["std"],
                    fmt="o", color=colour, capsize=3, markersize=7,
                )  # fmt: skip
        left.set_xlabel("step")
        left.set_ylabel(f"training loss, means of {SMOOTH} steps and of the seeds")
        right.set_xscale("log")
        ticks = _ticks([r["validation_perplexity"]["mean"] for r in records])
        right.set_xticks(ticks, [str(tick) for tick in ticks])
        right.minorticks_off()
        right.set_yticks(range(len(records)), [record["label"] for record in records])
        right.invert_yaxis()
        right.set_xlabel("validation perplexity, and standard deviation over the seeds")
        right.set_title("optimizer state", loc="right", fontsize=9)
        for ax in (left, right):
            ax.grid(alpha=0.3)
        settings = content["settings"]
        fig.suptitle(
            f"LLaMA {settings['model']}, {settings['steps']} steps: every method at its own best "
            "learning rate; curves in the colours of the list",
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
        fig.savefig(path, dpi=130)
        plt.close(fig)


def _ticks(means: Sequence[float | None]) -> list[int]:
    """Round numbers of two digits that are spread over the perplexities."""
    known = [mean for mean in means if mean is not None] or [1.0]
    low, high = min(known), max(known)
    steps = [low * (high / low) ** (i / 5) for i in range(6)]
    return sorted({int(float(f"{step:.2g}")) for step in steps})
