"""Every zeroth-order method at one budget of forward passes, on the demo's model and sentences.

Trained are the last five layers of SmolLM2-135M-Instruct (--layers), in bfloat16. The layers below
are frozen and computed once a sentence, so that a forward pass is one through the trained layers,
and several hundred of them take a minute on one core. Prompt, words, loss, clipping, perturbation
scale and the learning rate's linear decay are those of examples/finetune_sentiment.py. Each step
takes one batch, the i-th of a seed the same for all methods: a method that spends more forward
passes on a step sees fewer batches. A dual pass (ForwardGrad) counts as three forward passes, for
it has three products where a forward pass has one; what it takes in time is in the table.

Learning rates: a grid a method runs with seed 0 for --grid-forwards, and the one with the lowest
validation cross-entropy runs with --seeds seeds for --forwards (successive halving; with both
budgets equal, seed 0 of the grid is one of these). While the best one is at the edge of its grid,
another is added beyond it, --extensions at most; what is at the edge even then is marked with *.
Nothing is chosen by the test sentences.

Every run leaves a file under --runs that is not computed again while its configuration is the
same. An interrupted comparison continues with the missing runs, and more --seeds only add runs.
--pack moves the files into one compressed file beside the folder, which is read in the same way.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import ROOT, comparison
from bench.convergence import plan as planner
from bench.convergence import report as reporter
from bench.convergence import run as runner
from bench.convergence.methods import METHODS, TABLE, Method
from bench.convergence.run import Run
from bench.convergence.task import Settings, Task
from bench.runs import Store, finite, pack, store
from zoopt.bench import common

RESULTS = ROOT / "bench" / "results" / "convergence"


def open_store(folder: Path, settings: Settings) -> Store[Run]:
    return Store(folder, lambda run: runner.configuration(run, settings))


_task: Task | None = None


def prepare(settings: Settings) -> None:
    """Begin a worker: one thread, and the task for all its runs."""
    global _task
    torch.set_num_threads(1)
    _task = Task(settings)


def work(run: Run, settings: Settings, folder: Path) -> Run:
    """Do one run in a worker and leave its file."""
    assert _task is not None
    store(runner.execute(run, settings, _task), folder / run.file)
    return run


def executor(workers: int, settings: Settings) -> concurrent.futures.Executor:
    return comparison.executor(workers, prepare, (settings,))


def run_all(
    methods: Sequence[Method], settings: Settings, folder: Path, workers: int
) -> tuple[int, dict[str, str]]:
    """Do all the runs that are missing, as `comparison.run_all` does."""
    folder.mkdir(parents=True, exist_ok=True)
    results = open_store(folder, settings)
    return comparison.run_all(
        [method.name for method in methods],
        lambda name: planner.plan(METHODS[name], settings, results),
        functools.partial(work, settings=settings, folder=folder),
        lambda: executor(workers, settings),
        workers,
    )


def report(methods: Sequence[Method], settings: Settings, options: argparse.Namespace) -> None:
    """Print the table of what is finished, and write the summary and the chart."""
    store = open_store(options.runs, settings)
    records = planner.summarise(methods, settings, store)
    if not records:
        print("no method has finished a run of the full budget yet")
        return
    runs = planner.final_runs(METHODS[records[0]["method"]], records[0]["lr"], settings)
    first = next(result for run in runs if (result := store(run)) is not None)
    rows = [
        comparison.row(
            record["label"], record["test_cross_entropy"]["values"], "test cross-entropy"
        )
        for record in records
    ]
    content = common.document(
        *("convergence", options, torch.device("cpu"), rows),
        arguments=settings.as_dict(),
        machine=first["machine"],
        settings=settings.as_dict(),
        sizes=first["sizes"],
        protocol=str(__doc__),
        rule=planner.RULE,
        untrained=first["untrained"],
        records=records,
    )
    common.say(reporter.text(content), options.json)
    common.write_json(options.json, finite(content))
    reporter.draw(content, options.plot)
    common.say(f"written: {options.plot}", options.json)


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = common.parser(str(__doc__), "zoopt bench convergence --workers 2 --seeds 3")
    names = [method.name for method in TABLE if method.available]
    parser.add_argument(
        "--optimizers", "--methods", dest="methods", nargs="+", choices=names, default=names,
        metavar="NAME",
        help=f"which to compare, of {', '.join(names)}; mezo always is",
    )  # fmt: skip
    defaults = Settings()
    numbers = {
        "forwards": "budget of a run, in forward passes",
        "grid_forwards": "budget of the runs that choose the learning rate",
        "seeds": "runs at the chosen learning rate",
        "layers": "how many of the last layers are trained",
        "batch_size": "sentences a step",
        "validation_sentences": "at most so many are used",
        "test_sentences": "at most so many are used",
    }
    for name, text in numbers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=common.positive,
            default=getattr(defaults, name),
            help=text,
        )
    parser.add_argument("--extensions", type=int, default=defaults.extensions, help="of a grid")
    parser.add_argument("--model", default=defaults.model, help="a model's directory")
    parser.add_argument("--data", default=defaults.data, help="labelled sentences")
    comparison.add_arguments(parser, RESULTS, "convergence.png")
    options = parser.parse_args(argv)
    options.command = common.command(parser, argv)
    comparison.make_folders(parser, options)
    for path in (options.model, options.data):
        if not Path(path).exists():
            parser.error(f"there is no {path!r}; run python examples/fetch_demo_assets.py once")
    fields = {field.name for field in dataclasses.fields(Settings)}
    return options, Settings(**{k: v for k, v in vars(options).items() if k in fields})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options, settings = parse(argv)
    chosen = {planner.REFERENCE, *options.methods}
    methods = [method for method in TABLE if method.name in chosen]
    began = time.perf_counter()
    done, failed = 0, dict[str, str]()
    if not options.only_report:
        done, failed = run_all(methods, settings, options.runs, options.workers)
    if done:
        print(f"{done} runs in {time.perf_counter() - began:.0f} s\n")
    report(methods, settings, options)
    if options.pack:
        print(f"packed: {pack(options.runs)} runs")
    for name, reason in failed.items():
        print(f"bench.convergence: error: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0
