"""One training run of bench.convergence, and the file that keeps its result."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any

import torch

from bench.convergence.methods import METHODS
from bench.convergence.task import PROMPT, WORDS, Settings, Task
from bench.runs import config_hash
from zoopt.bench import common
from zoopt.noise import NOISE_VERSION


@dataclasses.dataclass(frozen=True)
class Run:
    """A method at a learning rate, a seed and a budget: all that a result depends on."""

    method: str
    lr: float
    seed: int
    forwards: int

    @property
    def file(self) -> str:
        return f"{self.method}-lr{self.lr:g}-f{self.forwards}-s{self.seed}.json"


def configuration(run: Run, settings: Settings) -> dict[str, Any]:
    """Everything that a run's figures depend on, except the machine and the versions."""
    method = METHODS[run.method]
    steps = method.steps(run.forwards)
    shared = settings.as_dict()
    of_comparison = ("forwards", "grid_forwards", "seeds", "extensions")
    return {
        **{key: value for key, value in shared.items() if key not in of_comparison},
        **dataclasses.asdict(run),
        "evaluations": settings.evaluations if run.forwards == settings.forwards else 1,
        "optimizer": method.optimizer,
        "options": {key: _plain(value) for key, value in method.options_for(steps).items()},
        "forwards_per_step": method.forwards_per_step,
        "steps": steps,
        "schedule": "linear to 0",
        "batches": "one a step; the i-th step of a seed has the same one in every method",
        "prompt": PROMPT,
        "words": list(WORDS),
        "noise_version": NOISE_VERSION,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def execute(run: Run, settings: Settings, task: Task) -> dict[str, Any]:
    """Train and evaluate; a run of the full budget ends on the test set.

    Raises:
        RuntimeError: the number of the optimizer's forward passes is not the one in the table.
    """
    method, config = METHODS[run.method], configuration(run, settings)
    steps, cost = config["steps"], config["forwards_per_step"]
    task.reset()
    optimizer = method.build(task.parameters(), run.lr, run.seed, steps)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    batches = task.batches(run.seed)
    looks = {round(steps * (i + 1) / config["evaluations"]) for i in range(config["evaluations"])}
    validation = [{"forwards": 0, **task.untrained["validation"]}]
    losses: list[float] = []
    forwards, repeated, cpu, wall = 0, 0, 0.0, 0.0
    for done in range(1, steps + 1):
        batch = next(batches)

        def closure(batch: Any = batch) -> Any:
            nonlocal forwards
            forwards += method.passes_per_call
            loss = task.loss(batch)
            return -loss if method.maximizes else loss

        began_cpu, began = time.process_time(), time.perf_counter()
        with warnings.catch_warnings():
            # If the learning rate is too high, losses become infinite or NaN.
            warnings.filterwarnings("ignore", "skipped .* because")
            value = float(optimizer.step(closure))
        cpu, wall = cpu + time.process_time() - began_cpu, wall + time.perf_counter() - began
        losses.append(-value if method.maximizes else value)
        # The first evaluation of a run is repeated, to check the closure: it tells nothing new.
        repeated += done == 1 and forwards == cost + method.passes_per_call
        if forwards != done * cost + repeated * method.passes_per_call:
            raise RuntimeError(
                f"{run.method}: {done} steps made {forwards} forward passes, not {cost} each"
            )
        schedule.step()
        if done in looks:
            validation.append({"forwards": done * cost, **task.validate()})
    return {
        "config_hash": config_hash(config),
        "config": config,
        "machine": common.machine(torch.device("cpu")),
        "sizes": task.sizes(),
        "untrained": task.untrained,
        "forwards": steps * cost,
        "repeated_evaluations": int(repeated),
        "losses": losses,
        "skipped": optimizer.skipped_probes,
        "validation": validation,
        "test": task.final() if run.forwards == settings.forwards else None,
        "seconds": {"cpu": cpu, "wall": wall, "cpu_per_forward": cpu / forwards},
    }
