"""Small LLaMAs trained from random weights on English text, one optimizer against another.

All methods make the same number of steps on the same tokens: a seed names the initial weights, the
order of the batches and the optimizer's noise. Learning rates warm up linearly over a tenth of the
steps and fall to a tenth along a cosine; weight decay is 0 and nothing is clipped. Projected
methods get the decoder's matrices at a quarter of the width (ApolloMini: at rank 1), refreshed
every 50 steps; embeddings and norms get plain Adam at the same learning rate. SLTrain and
GradNormLoRP (half of the rank between its bases) have factors of that rank in the matrices' place.
All weights are float32.

Learning rates: a grid a method runs with seed 0 for --grid-steps, and the one with the lowest
validation cross-entropy runs with --seeds seeds for --steps. Both are the full budget by default:
Adam's best rate of 120 steps was far too high for 400. While the best one is at the edge of its
grid, another is added beyond it, --extensions at most; what is at the edge even then is marked
with *. The 6m model has a grid of two: what was best for the 1m model, and half of it.

Text: introductions of the English Wikipedia and Shakespeare's works, fetched once into
.data/pretrain/ (bench/pretrain/data.py). Every twentieth document is held out to validate with.

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
from bench.pretrain import plan as planner
from bench.pretrain import report as reporter
from bench.pretrain import run as runner
from bench.pretrain.data import AssetError, fetch
from bench.pretrain.methods import METHODS, REFERENCE, TABLE, Method
from bench.pretrain.run import Run
from bench.pretrain.task import MODELS, Settings, Task
from bench.runs import Store, finite, pack, store
from zoopt.bench import common

RESULTS = ROOT / "bench" / "results" / "pretrain"

_task: Task | None = None


def prepare(settings: Settings) -> None:
    """Begin a worker: one thread, and the tokens for all its runs."""
    global _task
    torch.set_num_threads(1)
    _task = Task(settings)


def work(run: Run, settings: Settings, folder: Path) -> Run:
    """Do one run in a worker and leave its file."""
    assert _task is not None
    store(runner.execute(run, settings, _task), folder / run.file)
    return run


def open_store(folder: Path, settings: Settings) -> Store[Run]:
    return Store(folder, lambda run: runner.configuration(run, settings))


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
    results = open_store(options.runs, settings)
    records = planner.summarise(methods, settings, results)
    if not records:
        print("no method has finished a run of the full budget yet")
        return
    first = planner.finals(METHODS[records[0]["method"]], settings, results)[0]
    rows = [
        comparison.row(
            record["label"],
            record["validation_cross_entropy"]["values"],
            "validation cross-entropy",
        )
        for record in records
    ]
    content = common.document(
        *("pretrain", options, torch.device("cpu"), rows),
        arguments=settings.as_dict(),
        machine=first["machine"],
        settings=settings.as_dict(),
        sizes=Task(settings).sizes(),
        protocol=str(__doc__),
        records=records,
    )
    common.say(reporter.text(content), options.json)
    common.write_json(options.json, finite(content))
    reporter.draw(content, options.plot)
    common.say(f"written: {options.plot}", options.json)


def method_names(text: str) -> list[str]:
    """Names of methods, parted by commas."""
    names = text.split(",")
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(
                f"expected methods of {', '.join(METHODS)}, got {name!r}"
            )
    return names


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = common.parser(str(__doc__), "zoopt bench pretrain --model 1m --workers 2")
    parser.add_argument("--model", choices=list(MODELS), default="1m", help="size of the LLaMA")
    parser.add_argument(
        "--optimizers", "--methods", dest="methods", type=method_names, default=list(METHODS),
        metavar="NAME,NAME",
        help=f"which to compare; {REFERENCE} always is",
    )  # fmt: skip
    for name, text in {
        "steps": "of a run",
        "grid_steps": "of the runs that choose the learning rate",
        "seeds": "runs at the chosen learning rate",
    }.items():
        sizes = ", ".join(f"{getattr(model, name)} for {key}" for key, model in MODELS.items())
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=common.positive, help=f"{text} (default: {sizes})"
        )
    numbers = {
        "vocab_size": "of the byte-level BPE",
        "seq_len": "tokens a sequence",
        "batch_size": "sequences a step",
        "update_proj_gap": "steps between a projection's refreshes",
        "validation_rows": "sequences to validate with",
        "extensions": "of a grid",
    }
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name, text in numbers.items():
        kind = int if name == "extensions" else common.positive
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=defaults[name], help=text
        )
    parser.add_argument(
        "--documents", default=defaults["documents"], help="the text; fetched if it is not there"
    )
    comparison.add_arguments(parser, RESULTS, "pretrain.png")
    # A model's own summary, unless another place is asked for.
    parser.set_defaults(json=None, plot=None)
    options = parser.parse_args(argv)
    options.command = common.command(parser, argv)
    shape = MODELS[options.model]
    for name in ("steps", "grid_steps", "seeds"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(shape, name))
    options.json = options.json or RESULTS / f"summary_{options.model}.json"
    options.plot = options.plot or RESULTS / f"pretrain_{options.model}.png"
    comparison.make_folders(parser, options)
    if options.documents == defaults["documents"]:
        try:
            fetch()
        except (AssetError, OSError) as error:
            parser.error(str(error))
    elif not Path(options.documents).exists():
        parser.error(f"there is no {options.documents!r}")
    fields = {field.name for field in dataclasses.fields(Settings)}
    return options, Settings(**{k: v for k, v in vars(options).items() if k in fields})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options, settings = parse(argv)
    chosen = {REFERENCE, *options.methods}
    methods = [method for method in TABLE if method.name in chosen]
    began = time.perf_counter()
    done, failed = 0, dict[str, str]()
    if not options.only_report:
        Task(settings)  # Encodes the text once, before the workers read it.
        done, failed = run_all(methods, settings, options.runs, options.workers)
    if done:
        print(f"{done} runs in {time.perf_counter() - began:.0f} s\n")
    report(methods, settings, options)
    if options.pack:
        print(f"packed: {pack(options.runs)} runs")
    for name, reason in failed.items():
        print(f"bench.pretrain: error: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0
