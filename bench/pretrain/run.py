"""One training run of bench.pretrain, and what its result depends on."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any

import torch

from bench.pretrain.methods import METHODS, state_bytes
from bench.pretrain.task import Settings, Task, matrices
from bench.runs import config_hash
from zoopt.doctor.machine import identity
from zoopt.noise import NOISE_VERSION


@dataclasses.dataclass(frozen=True)
class Run:
    """A method at a learning rate, a seed and a number of steps, on a model."""

    model: str
    method: str
    lr: float
    seed: int
    steps: int

    @property
    def file(self) -> str:
        return f"{self.model}-{self.method}-lr{self.lr:g}-n{self.steps}-s{self.seed}.json"


def configuration(run: Run, settings: Settings) -> dict[str, Any]:
    """Everything that a run's figures depend on, except the machine and the versions."""
    method = METHODS[run.method]
    of_comparison = ("steps", "grid_steps", "seeds", "extensions", "transferred")
    shared = {k: v for k, v in settings.as_dict().items() if k not in of_comparison}
    return {
        **shared,
        **dataclasses.asdict(run),
        "evaluations": settings.evaluations if run.steps == settings.steps else 1,
        "optimizer": method.optimizer,
        "options": method.options_for(settings),
        "convert": method.convert,
        "groups": method.groups,
        **({} if method.scale is None else {"scale": method.scale}),
        **({} if method.matrix_rate == 1.0 else {"matrix_rate": method.matrix_rate}),
        "schedule": "linear warm-up, cosine",
        "noise_version": NOISE_VERSION,
    }


def execute(run: Run, settings: Settings, task: Task) -> dict[str, Any]:
    """Train and evaluate. A run ends early if its loss is no longer finite."""
    config = configuration(run, settings)
    model, optimizer = METHODS[run.method].build(task.model(run.seed), run.lr, run.seed, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: settings.lr_factor(step, run.steps)
    )
    batches = task.batches(run.seed)
    looks = {
        round(run.steps * (i + 1) / config["evaluations"]) for i in range(config["evaluations"])
    }
    losses: list[float] = []
    validation: list[dict[str, float]] = []
    step_seconds, optimizer_seconds = [], []
    for done in range(1, run.steps + 1):
        batch = next(batches)
        began = time.process_time()
        loss = task.loss(model, batch)
        loss.backward()
        backward = time.process_time()
        optimizer.step()
        ended = time.process_time()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        step_seconds.append(ended - began)
        optimizer_seconds.append(ended - backward)
        diverged = not math.isfinite(losses[-1])
        if done in looks or diverged:
            validation.append({"step": done, **task.validate(model)})
        if diverged:
            break
    projected = list(matrices(model).values())
    declared = getattr(optimizer, "declared_state_bytes", None)
    return {
        "config_hash": config_hash(config),
        "config": config,
        "machine": identity(torch.device("cpu")),
        "losses": losses,
        "validation": validation,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "state_bytes": state_bytes(optimizer),
        "matrix_state_bytes": state_bytes(optimizer, projected),
        "declared_state_bytes": declared() if declared else None,
        "cpu_seconds": {
            "median_step": statistics.median(step_seconds),
            "mean_step": statistics.fmean(step_seconds),
            "mean_optimizer": statistics.fmean(optimizer_seconds),
        },
    }
