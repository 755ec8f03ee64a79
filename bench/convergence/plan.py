"""Which runs bench.convergence still needs, and the results of the finished ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.comparison import Halving, figure, mean_and_spread
from bench.convergence.methods import METHODS, Method
from bench.convergence.run import Run
from bench.convergence.task import Settings

#: The result of a run, or None.
Results = Callable[[Run], Mapping[str, Any] | None]

REFERENCE = "mezo"
RULE = (
    "On the mean test cross-entropy over seeds: a method beats MeZO (does not beat it) if it is "
    "lower (higher) by more than two standard errors of the difference, sqrt(s1^2/n1 + s2^2/n2); "
    "otherwise it ties."
)


def grid_score(result: Mapping[str, Any]) -> float:
    """The criterion for the learning rate: the last validation cross-entropy."""
    value = result["validation"][-1]["cross_entropy"]
    return math.inf if value is None or not math.isfinite(value) else value


def plan(method: Method, settings: Settings, results: Results) -> Halving[Run]:
    """The method's plan: seeds count on the full budget, seed 0 alone on the grid's."""
    return Halving(
        method.lrs,
        settings.extensions,
        lambda lr: Run(method.name, lr, 0, settings.grid_forwards),
        lambda lr: final_runs(method, lr, settings),
        grid_score,
        results,
    )


def final_runs(method: Method, lr: float, settings: Settings) -> list[Run]:
    return [Run(method.name, lr, seed, settings.forwards) for seed in range(settings.seeds)]


def verdict(values: Sequence[float | None], reference: Sequence[float | None]) -> str:
    """`RULE` on two lists of cross-entropies, a value a seed."""
    own, other = mean_and_spread(values), mean_and_spread(reference)
    if other is None or len(reference) < 2 or len(values) < 2:
        return "too few runs"
    if own is None:
        return "does not beat"
    difference = own[0] - other[0]
    error = math.sqrt(own[1] ** 2 / len(values) + other[1] ** 2 / len(reference))
    if abs(difference) <= 2 * error:
        return "ties"
    return "beats" if difference < 0 else "does not beat"


def summarise(
    methods: Sequence[Method], settings: Settings, results: Results
) -> list[dict[str, Any]]:
    """A record a method that has a run of the full budget at its chosen learning rate."""
    records = []
    reference = METHODS[REFERENCE]
    reference_lr = plan(reference, settings, results).grid()[1]
    reference_runs = final_runs(reference, reference_lr, settings) if reference_lr else []
    reference_finals = [r for r in map(results, reference_runs) if r is not None]
    for method in methods:
        lrs, best = plan(method, settings, results).grid()
        if best is None:
            continue
        finals = [r for r in map(results, final_runs(method, best, settings)) if r is not None]
        if finals:
            record = _record(method, settings, lrs, best, finals, results)
            record["verdict"] = "reference"
            if method.name != REFERENCE:
                record["verdict"] = verdict(
                    [f["test"]["cross_entropy"] for f in finals],
                    [f["test"]["cross_entropy"] for f in reference_finals],
                )
            cost = record["cpu_seconds_per_forward"]
            base = [f["seconds"]["cpu_per_forward"] for f in reference_finals]
            record["time_per_forward_of_mezo"] = cost / statistics.median(base) if base else None
            records.append(record)
    return records


def _record(
    method: Method,
    settings: Settings,
    lrs: Sequence[float],
    best: float,
    finals: Sequence[Mapping[str, Any]],
    results: Results,
) -> dict[str, Any]:
    scores = {}
    for lr in lrs:
        result = results(plan(method, settings, results).grid_run(lr))
        assert result is not None
        score = grid_score(result)
        scores[f"{lr:g}"] = score if math.isfinite(score) else None
    record: dict[str, Any] = {
        "method": method.name,
        "label": method.label,
        "optimizer": method.optimizer,
        "options": finals[0]["config"]["options"],
        "forwards_per_step": method.forwards_per_step,
        "steps": method.steps(settings.forwards),
        "forwards": finals[0]["forwards"],
        "lr": best,
        "lr_at_edge": best in (lrs[0], lrs[-1]),
        "lr_extensions": len(lrs) - len(method.lrs),
        "grid_validation_cross_entropy": scores,
        "seeds": len(finals),
        "skipped": sum(f["skipped"] for f in finals),
        "cpu_seconds_per_forward": statistics.median(
            f["seconds"]["cpu_per_forward"] for f in finals
        ),
        "curve_forwards": [point["forwards"] for point in finals[0]["validation"]],
        "curves": [[point["cross_entropy"] for point in f["validation"]] for f in finals],
    }
    columns = {
        "validation_cross_entropy": [f["validation"][-1]["cross_entropy"] for f in finals],
        **{
            f"test_{key}": [f["test"][key] for f in finals]
            for key in (
                *("cross_entropy", "calibrated_cross_entropy"),
                *("accuracy", "calibrated_accuracy"),
            )
        },
    }
    for key, values in columns.items():
        record[key] = figure(values)
    return record
