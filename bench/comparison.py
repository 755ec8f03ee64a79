"""Shared code of the comparisons of methods: learning rates, figures over seeds, processes."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from bench.runs import Run
from zoopt.bench import common
from zoopt.cli.terminal import Parser

R = TypeVar("R", bound=Run)


def to_two_digits(value: float) -> float:
    return round(value, 1 - math.floor(math.log10(value)))


def lr_grid(centre: float, ratio: float = 2.0, points: int = 3) -> tuple[float, ...]:
    """Learning rates around `centre`, each `ratio` times the previous one, to two digits."""
    half = points // 2
    return tuple(to_two_digits(centre * ratio**i) for i in range(-half, points - half))


@dataclasses.dataclass(frozen=True)
class Halving(Generic[R]):
    """A method's plan: a grid of learning rates on a small budget, then seeds of the best in full.

    While the best rate is at an edge of the grid, another one is added beyond it, up to
    `extensions` times. If every run has diverged, the lowest rate counts as the best.

    Attributes:
        lrs: the initial grid, ascending and evenly spaced in the logarithm.
        extensions: how many rates may be added.
        grid_run: learning rate -> its run on the small budget.
        final_runs: learning rate -> its runs on the full budget, seed 0 first.
        score: a run's result -> the criterion for the learning rate; lower is better.
        results: the result of a run, or None.
    """

    lrs: tuple[float, ...]
    extensions: int
    grid_run: Callable[[float], R]
    final_runs: Callable[[float], list[R]]
    score: Callable[[Mapping[str, Any]], float]
    results: Callable[[R], Mapping[str, Any] | None]

    @property
    def ratio(self) -> float:
        """The ratio of successive learning rates in the grid."""
        return math.exp(math.log(self.lrs[-1] / self.lrs[0]) / (len(self.lrs) - 1))

    def grid(self) -> tuple[list[float], float | None]:
        """The rates to try, judging from the results so far; and the best, once all are tried."""
        lrs = sorted(self.lrs)
        for added in range(self.extensions + 1):
            found = [self.results(self.grid_run(lr)) for lr in lrs]
            if None in found:
                return lrs, None
            scores = {lr: self.score(r) for lr, r in zip(lrs, found, strict=True) if r is not None}
            best = min(lrs, key=scores.__getitem__)
            if added == self.extensions or lrs[0] < best < lrs[-1]:
                break
            if best == lrs[0]:
                lrs.insert(0, to_two_digits(best / self.ratio))
            else:
                lrs.append(to_two_digits(best * self.ratio))
        return lrs, best

    def missing(self) -> list[R]:
        """The runs that can be started now; none if the method is done."""
        lrs, best = self.grid()
        runs = [self.grid_run(lr) for lr in lrs] if best is None else self.final_runs(best)
        return [run for run in runs if self.results(run) is None]

    def left(self) -> int:
        """How many runs the method still needs, if its grid is not extended again."""
        count = len(self.missing())
        lrs, best = self.grid()
        if best is not None:
            return count
        # Seed 0 of the best is done with the grid if that has the full budget.
        finals = self.final_runs(lrs[0])
        return count + len(finals) - (self.grid_run(lrs[0]) in finals)


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The mean and the standard deviation (0 for one value); None if a value is missing."""
    known = [math.nan if value is None else value for value in values]
    if not known or not all(map(math.isfinite, known)):
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def figure(values: Sequence[float | None]) -> dict[str, Any]:
    """A record's entry for one figure: a value per seed, their mean and standard deviation."""
    both = mean_and_spread(values)
    return {
        "values": list(values),
        "mean": both[0] if both else None,
        "std": both[1] if both else None,
    }


def row(name: str, values: Sequence[float | None], unit: str) -> common.Row:
    """The row of a method in a results file, with a value per seed."""
    finite_values = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite_values) < len(values):
        return common.failed(name, unit, "diverged")
    return common.measured(name, finite_values, unit)


class Inline(concurrent.futures.Executor):
    """Runs the work immediately, in this process, after `prepare`."""

    def __init__(self, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        prepare(*arguments)

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def executor(
    workers: int, prepare: Callable[..., None], arguments: tuple[Any, ...]
) -> concurrent.futures.Executor:
    """Processes that call `prepare` with the arguments before their first run."""
    if workers == 1:
        return Inline(prepare, arguments)
    # Set this before the workers start, so that their kernels do not compete for cores.
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, prepare, arguments)


def run_all(
    methods: Sequence[str],
    plan: Callable[[str], Halving[R]],
    work: Callable[[R], R],
    pool: Callable[[], concurrent.futures.Executor],
    workers: int,
) -> tuple[int, dict[str, str]]:
    """Do all missing runs, `workers` at a time, method by method.

    Args:
        methods: names of the methods.
        plan: makes the plan of a method.
        work: does one run in a worker, and writes its file.
        pool: makes the workers.

    Returns:
        The number of runs, and the methods that failed with the reasons. The other runs of a failed
        method are skipped.
    """
    failed: dict[str, str] = {}
    running: dict[concurrent.futures.Future[R], R] = {}
    done = 0

    def next_run(names: Sequence[str]) -> R | None:
        going = set(running.values())
        missing = (run for name in names for run in plan(name).missing())
        return next((run for run in missing if run not in going), None)

    if next_run(methods) is None:
        return done, failed
    with pool() as workplace, tqdm(desc="runs", unit="run", file=sys.stderr, smoothing=0.1) as bar:
        while True:
            good = [name for name in methods if name not in failed]
            while len(running) < workers:
                run = next_run(good)
                if run is None:
                    break
                bar.set_postfix_str(run.file.removesuffix(".json"))
                running[workplace.submit(work, run)] = run
            bar.total = done + sum(plan(name).left() for name in good)
            if not running:
                return done, failed
            finished, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                run = running.pop(future)
                error = future.exception()
                if isinstance(error, concurrent.futures.BrokenExecutor):
                    raise error
                if error is not None:
                    failed[run.method] = f"{type(error).__name__}: {error}"
                    continue
                done += 1
                bar.update()


def add_arguments(arguments: Parser, results: Path, chart: str) -> None:
    """Add the options for the folders of runs and report, and the number of processes."""
    arguments.add_argument(
        "--workers", type=common.positive, default=1, help="processes, a thread each"
    )
    arguments.add_argument(
        "--runs",
        type=Path,
        default=results / "runs",
        help="a file a run goes here, or RUNS.jsonl.xz",
    )
    arguments.add_argument(
        "--json", type=Path, default=results / "summary.json", help="the summary"
    )
    arguments.add_argument("--plot", type=Path, default=results / chart, help="the chart")
    arguments.add_argument("--only-report", action="store_true", help="start no runs")
    arguments.add_argument(
        "--pack", action="store_true", help="at the end, move the runs into one compressed file"
    )


def make_folders(arguments: Parser, options: argparse.Namespace) -> None:
    """Make the report's folders; exit if the report could not be written there."""
    for path in (options.json, options.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    common.check_json(arguments, options.json)
