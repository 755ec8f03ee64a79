"""Methods that choose what trains, on the demo's model and sentences.

Trained are the last layers of SmolLM2-135M-Instruct in bfloat16; the layers below are frozen and
computed once a sentence. Each method takes few steps at three learning rates, and then all steps at
the best of them with three seeds; while the best is at the grid's edge, another rate is added.
Rates are chosen by the validation sentences alone. QZO needs no backward pass and takes ten times
as many steps. Every run leaves a file, and an interrupted comparison continues with the missing
ones. The time and memory of a step are measured at the end, method after method in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, comparison
from bench.comparison import Halving, figure
from bench.convergence.task import Settings, Task
from bench.runs import Store, finite, load, pack, store
from bench.selection import report as reporter
from bench.selection.methods import METHODS
from bench.selection.run import Run, configuration, cost, execute
from zoopt.bench import common

RESULTS = ROOT / "bench" / "results" / "selection"
STEPS, GRID_STEPS, SEEDS, EXTENSIONS = 40, 20, 3, 2
SETTINGS = Settings(batch_size=16, validation_sentences=150)

Results = Callable[[Run], Mapping[str, Any] | None]


def score(result: Mapping[str, Any]) -> float:
    value = result["metrics"]["cross_entropy"]
    return math.inf if value is None else float(value)


def plan(name: str, results: Results) -> Halving[Run]:
    """Which runs a method needs."""
    method = METHODS[name]
    return Halving(
        comparison.lr_grid(method.lr, 3.0),
        EXTENSIONS,
        lambda lr: Run(name, lr, 0, method.longer * GRID_STEPS),
        lambda lr: [Run(name, lr, seed, method.longer * STEPS) for seed in range(SEEDS)],
        score,
        results,
    )


_task: Task | None = None


def prepare(settings: Settings) -> None:
    """Begin a worker: one thread, and the task for all its runs."""
    global _task
    torch.set_num_threads(1)
    _task = Task(settings)


def work(run: Run, settings: Settings, folder: Path) -> Run:
    """Do one run in a worker and leave its file."""
    assert _task is not None
    final = run.steps == METHODS[run.method].longer * STEPS
    store(execute(run, settings, _task, final=final), folder / run.file)
    gc.collect()  # Models with hooks are in cycles, and few runs fit in memory.
    return run


def records(names: Sequence[str], results: Results) -> list[dict[str, Any]]:
    """A record for each method that has finished."""
    found = []
    for name in names:
        chosen = plan(name, results)
        lrs, best = chosen.grid()
        finals = [] if best is None else [results(run) for run in chosen.final_runs(best)]
        if best is None or None in finals:
            continue
        metrics = [own["metrics"] for own in finals if own is not None]
        found.append(
            {
                "method": name,
                "label": METHODS[name].label,
                "steps": METHODS[name].longer * STEPS,
                "lr": best,
                "lr_at_edge": best in (lrs[0], lrs[-1]),
                "seeds": len(metrics),
                **{
                    key: figure([own[key] for own in metrics])
                    for key in metrics[0]
                    if key != "sentences"
                },
            }
        )
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(str(__doc__), "python -m bench.selection --workers 2")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"which to compare, of {', '.join(METHODS)}",
    )  # fmt: skip
    parser.add_argument("--model", default=SETTINGS.model, help="a model's directory")
    parser.add_argument("--data", default=SETTINGS.data, help="labelled sentences")
    parser.add_argument("--no-costs", action="store_true", help="measure no time and memory")
    comparison.add_arguments(parser, RESULTS, "selection.png")
    options = parser.parse_args(argv)
    options.command = common.command(parser, argv)
    comparison.make_folders(parser, options)
    for path in (options.model, options.data):
        if not Path(path).exists():
            parser.error(f"there is no {path!r}; run python examples/fetch_demo_assets.py once")
    return options


def costs(found: Sequence[Mapping[str, Any]], task: Task) -> dict[str, Any]:
    """What a step of each finished method takes, measured one after another."""
    torch.set_num_threads(1)
    return {r["method"]: cost(Run(r["method"], r["lr"], 0, STEPS), task) for r in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing runs, measure, and write the table; returns the exit status."""
    options = parse(argv)
    settings = dataclasses.replace(SETTINGS, model=options.model, data=options.data)
    results = Store(options.runs, lambda run: configuration(run, settings))
    failed: dict[str, str] = {}
    if not options.only_report:
        options.runs.mkdir(parents=True, exist_ok=True)
        _, failed = comparison.run_all(
            options.methods,
            lambda name: plan(name, results),
            functools.partial(work, settings=settings, folder=options.runs),
            lambda: comparison.executor(options.workers, prepare, (settings,)),
            options.workers,
        )
    found = records(list(METHODS), results)
    known = load(options.json) or {}
    rows = [
        comparison.row(r["label"], r["cross_entropy"]["values"], "test cross-entropy")
        for r in found
    ]
    content = common.document(
        *("selection", options, torch.device("cpu"), rows),
        arguments={"steps": STEPS, "grid_steps": GRID_STEPS, **settings.as_dict()},
        protocol=__doc__,
        untrained=known.get("untrained"),
        costs=known.get("costs", {}),
        records=found,
    )
    if "machine" in known:  # That of the costs, if they are not measured again.
        content["machine"] = known["machine"]
    if not options.no_costs:
        task = Task(settings)
        content["untrained"] = task.untrained
        content["costs"] = costs(found, task)
        content["machine"] = common.machine(torch.device("cpu"))
    common.write_json(options.json, finite(content))
    if content["untrained"] is not None:
        print(reporter.text(content))
        reporter.draw(content, options.plot)
    if options.pack:
        print(f"packed: {pack(options.runs)} runs")
    for name, reason in failed.items():
        print(f"bench.selection: error: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0
