"""Peak memory of training steps, by method: planned, counted, and resident.

`planned` is what `zoopt plan` predicts without allocating anything. `counted` is the peak of all
live tensors in two real steps (the first makes the optimizer's state), and on a GPU the
allocator's. `resident` is the growth of the process's resident set since before the model was
built. It includes what the others cannot see: buffers of numba and BLAS, and the C allocator's
slack.

Each method runs in a process of its own, on random weights of the model's configuration.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoopt.bench import common, methods, models
from zoopt.bench.methods import Entry
from zoopt.cli.terminal import CommandError
from zoopt.memory.measure import Measurement, measure_here
from zoopt.memory.meter import CATEGORIES
from zoopt.memory.plan import DTYPES, Plan, plan

DEFAULT = (
    *("baselines", "mezo", "mezo-in-place", "lozo", "zoadam-window", "hizoo"),
    *("galoreadamw-int8-state", "galoreadamw-int8-state-fused-backward", "apollomini"),
    *("sm3", "sm3-fused-backward", "zoopt-adamw-int4-state"),
)
COLORS = {
    "parameters": "#9aa5b1",
    "gradients": "#d98c3f",
    "optimizer state": "#2a7f9e",
    "activations": "#7fb069",
    "workspace": "#c05f7e",
}
MB = 1e6


def measured(options: argparse.Namespace, workers: int, key: str) -> Measurement | str:
    """The measurement of one method, made in a process of its own, or the reason for its
    absence."""
    command = [sys.executable, "-m", __name__, "--child", key]
    for name in ("model", "dtype", "batch", "seq", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    # With more threads than cores, threads would spin while they wait for each other.
    command += ["--threads", str(max(1, options.threads // workers))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def child(options: argparse.Namespace, entry: Entry) -> None:
    """Measure one method in this process and print the measurement."""
    measurement = measure_here(
        models.spec(options.model),
        entry.method,
        batch=options.batch,
        seq=options.seq,
        dtype=DTYPES[options.dtype],
        checkpointing=entry.checkpointing,
        device=options.device,
    )
    sys.stdout.write(json.dumps(dataclasses.asdict(measurement)) + "\n")


def planned(options: argparse.Namespace, entries: Sequence[Entry]) -> dict[str, int]:
    """The planned peaks by name, of the methods that can be planned."""
    spec = models.spec(options.model)
    peaks = {}
    for checkpointing in (False, True):
        chosen = [entry for entry in entries if entry.checkpointing == checkpointing]
        for entry in chosen:
            common.progress(f"planning: {entry.name}")
            try:
                result: Plan = plan(
                    spec,
                    optimizers=[entry.method],
                    batch=options.batch,
                    seq=options.seq,
                    dtype=options.dtype,
                    checkpointing=checkpointing,
                )
            except Exception as error:
                # Other packages' optimizers read values, and fake tensors have none.
                common.progress(f"no plan of {entry.name}: {error}")
                continue
            peaks[entry.name] = result.estimates[0].peak
    return peaks


def rows_of(
    name: str, measurement: Measurement | str, plan_peak: int | None, inference: int
) -> list[common.Row]:
    """A method's figures: counted, planned and resident bytes."""
    if isinstance(measurement, str):
        return [common.failed(name, "bytes", measurement)]
    peak = measurement.allocated or measurement.peak
    rows = [
        common.counted(
            name,
            peak,
            "bytes",
            ratio=peak / inference,
            categories=measurement.categories,
            phases=measurement.allocated_phases or measurement.phases,
            state=measurement.state,
            reserved=measurement.reserved,
        )
    ]
    if plan_peak is not None:
        rows.append(common.counted(name, plan_peak, "bytes planned", ratio=plan_peak / peak))
    if measurement.resident is not None:
        resident = measurement.resident
        rows.append(common.counted(name, resident, "bytes resident", ratio=resident / peak))
    return rows


def text(rows: Sequence[common.Row]) -> str:
    """The table, one line for each method."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["name"], {"name": row["name"]})
        if row["median"] is None:
            line["peak"] = row["reason"]
        elif row["unit"] == "bytes":
            line |= {"peak": row["median"] / MB, "ratio": row["ratio"]}
            line |= {category: row["categories"][category] / MB for category in CATEGORIES}
        elif row["unit"] == "bytes planned":
            line |= {"planned": row["median"] / MB, "plan": row["ratio"]}
        else:
            line["resident"] = row["median"] / MB
    columns: dict[str, str] = {
        "name": "method",
        "peak": "peak MB",
        "ratio": "/ inference",
        **dict(zip(CATEGORIES, CATEGORIES, strict=True)),
        "planned": "planned MB",
        "plan": "planned / peak",
        "resident": "resident MB",
    }
    return common.table(columns, list(lines.values()))


def draw(path: Path, rows: Sequence[common.Row], title: str) -> None:
    """Stacked bars of the peaks' parts; a tick marks the plan."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counted = [row for row in rows if row["unit"] == "bytes" and row["median"] is not None]
    counted.sort(key=lambda row: -row["median"])
    plans = {row["name"]: row["median"] for row in rows if row["unit"] == "bytes planned"}
    fig, ax = plt.subplots(figsize=(9, 0.34 * len(counted) + 1.6), layout="constrained")
    for i, row in enumerate(counted):
        left = 0.0
        for category in CATEGORIES:
            width = row["categories"][category] / MB
            label = category if i == 0 else None
            ax.barh(i, width, left=left, color=COLORS[category], label=label)
            left += width
        if row["name"] in plans:
            ax.plot([plans[row["name"]] / MB] * 2, [i - 0.42, i + 0.42], color="black", lw=1.5)
    ax.set_yticks(range(len(counted)), [row["name"] for row in counted])
    ax.set_xlabel("peak of a training step, MB; a tick where the plan predicts it")
    ax.set_title(title, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper right")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = common.parser(
        str(__doc__), "zoopt bench memory --model gpt2 --optimizers baselines mezo --json mem.json"
    )
    models.add_argument(parser, "smollm2-135m")
    methods.add_argument(parser, DEFAULT)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="weights")
    parser.add_argument("--batch", type=common.positive, default=4, help="sequences a batch")
    parser.add_argument("--seq", type=common.positive, default=64, help="tokens a sequence")
    parser.add_argument("--workers", type=common.positive, default=2, help="processes at a time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    common.add_common_arguments(parser, repeats=1)
    options = common.parse(parser, argv)
    common.open_device(parser, options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options = parse(argv)
    if options.child:
        child(options, methods.table()[options.child])
        return 0
    entries = list(methods.chosen(options.optimizers).values())
    plans = planned(options, entries)
    found: dict[str, Measurement | str] = {}
    workers = 1 if options.device.startswith("cuda") else options.workers
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {
            pool.submit(measured, options, workers, methods.key(entry.name)): entry.name
            for entry in entries
        }
        for future in concurrent.futures.as_completed(futures):
            found[futures[future]] = future.result()
            common.progress(f"measured: {len(found)} of {len(entries)}, {futures[future]}")
    common.progress("")
    inference = found["inference"]
    if isinstance(inference, str):
        raise CommandError(f"measuring inference failed: {inference}")
    base = inference.allocated or inference.peak
    rows = [
        row
        for entry in entries
        for row in rows_of(entry.name, found[entry.name], plans.get(entry.name), base)
    ]
    what = f"{options.model}, {options.dtype}, {options.batch} x {options.seq} tokens"
    common.say(f"{what}\n\n{text(rows)}", options.json)
    import torch

    document = common.document("memory", options, torch.device(options.device), rows)
    common.write_json(options.json, document)
    if options.plot:
        draw(options.plot, rows, f"Peak memory: {what}")
        common.say(f"written: {options.plot}", options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
