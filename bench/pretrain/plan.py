"""Which runs bench.pretrain still needs, and the results of the finished ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.comparison import Halving, figure
from bench.pretrain.methods import METHODS, REFERENCE, Method
from bench.pretrain.run import Run
from bench.pretrain.task import Settings

#: The result of a run, or None.
Results = Callable[[Run], Mapping[str, Any] | None]


def grid_score(result: Mapping[str, Any]) -> float:
    """The criterion for the learning rate: the last validation cross-entropy."""
    value = result["validation"][-1]["cross_entropy"]
    return math.inf if value is None or not math.isfinite(value) else value


def plan(method: Method, settings: Settings, results: Results) -> Halving[Run]:
    """The method's plan: seed 0 for few steps on the grid, all seeds for all steps on its best."""
    lrs, extensions = method.grid(settings)
    return Halving(
        lrs,
        extensions,
        lambda lr: Run(settings.model, method.name, lr, 0, settings.grid_steps),
        lambda lr: [
            Run(settings.model, method.name, lr, seed, settings.steps)
            for seed in range(settings.seeds)
        ],
        grid_score,
        results,
    )


def finals(method: Method, settings: Settings, results: Results) -> list[Mapping[str, Any]]:
    """The finished runs of the full budget at the chosen learning rate."""
    of_method = plan(method, settings, results)
    best = of_method.grid()[1]
    runs = of_method.final_runs(best) if best is not None else []
    return [result for result in map(results, runs) if result is not None]


def summarise(
    methods: Sequence[Method], settings: Settings, results: Results
) -> list[dict[str, Any]]:
    """A record a method that has a run of the full budget at its chosen learning rate."""
    reference = finals(METHODS[REFERENCE], settings, results)
    found = [(method, finals(method, settings, results)) for method in methods]
    return [_record(method, settings, done, reference, results) for method, done in found if done]


def _record(
    method: Method,
    settings: Settings,
    done: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]],
    results: Results,
) -> dict[str, Any]:
    of_method = plan(method, settings, results)
    lrs, best = of_method.grid()
    scores = {}
    for lr in lrs:
        result = results(of_method.grid_run(lr))
        assert result is not None
        score = grid_score(result)
        scores[f"{lr:g}"] = score if math.isfinite(score) else None
    first = done[0]
    seconds = {key: median_seconds(done, key) for key in first["cpu_seconds"]}
    return {
        "method": method.name,
        "label": method.label,
        "optimizer": method.optimizer,
        "options": first["config"]["options"],
        "lr": best,
        "lr_at_edge": len(lrs) > 2 and best in (lrs[0], lrs[-1]),
        "grid_validation_cross_entropy": scores,
        "seeds": len(done),
        "validation_perplexity": figure([f["validation"][-1]["perplexity"] for f in done]),
        "validation_cross_entropy": figure([f["validation"][-1]["cross_entropy"] for f in done]),
        "trained_parameters": first["trained_parameters"],
        **{
            key: first[key] for key in ("state_bytes", "matrix_state_bytes", "declared_state_bytes")
        },
        "cpu_seconds": seconds,
        "of_reference": {
            "state_bytes": _share(first["state_bytes"], [f["state_bytes"] for f in reference]),
            "matrix_state_bytes": _share(
                first["matrix_state_bytes"], [f["matrix_state_bytes"] for f in reference]
            ),
            "mean_step": _share(
                seconds["mean_step"], [f["cpu_seconds"]["mean_step"] for f in reference]
            ),
        },
        "curve": mean_curve([f["losses"] for f in done]),
    }


def median_seconds(done: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(f["cpu_seconds"][key] for f in done)


def _share(value: float, reference: Sequence[float]) -> float | None:
    return value / statistics.median(reference) if reference else None


def mean_curve(losses: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The training loss of each step, its mean over seeds; None once one has diverged."""
    steps = max(map(len, losses))
    padded = [[*curve, *[None] * (steps - len(curve))] for curve in losses]
    known = [[value for value in point if value is not None] for point in zip(*padded, strict=True)]
    return [statistics.fmean(p) if len(p) == len(losses) else None for p in known]
