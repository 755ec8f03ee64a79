"""Compares the methods of zoopt.selection on the demo's model and sentences.

    python -m bench.selection [--model DIRECTORY] [--data FILE] [METHOD ...]

trains the last layers of the demo's language model. Each method takes few steps at three learning
rates, and then more steps at the best of them with three seeds. Every run is a file in
bench/results/selection, so that an interrupted comparison continues with the missing runs. The
table of the finished runs goes to bench/results/selection.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoopt
from bench import ROOT
from bench.comparison import lr_grid
from bench.convergence.task import Settings, Task, evaluate
from bench.runs import load
from zoopt.bench import common

RESULTS = ROOT / "bench" / "results" / "selection"
STEPS, GRID_STEPS, SEEDS = 40, 20, 3
LAYERS = ["*.layers.*"]


@dataclasses.dataclass
class Training:
    """How a method trains a classifier: its optimizer, and objects that must be kept alive.

    Attributes:
        forward_only: whether the optimizer's step takes the closure, without a backward pass.
    """

    optimizer: Any
    kept: Any = None
    forward_only: bool = False


#: classifier, learning rate, seed, losses of a few batches -> how it is trained.
Build = Callable[[Any, float, int, list[Callable[[], torch.Tensor]]], Training]


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the table: how the method trains, and the middle one of its learning rates."""

    build: Build
    lr: float


def trained(classifier: Any) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in classifier.model.named_parameters() if p.requires_grad]


def adamw(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    return Training(zoopt.AdamW(trained(classifier), lr=lr, seed=seed))


def lora(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    peft.get_peft_model(classifier.model, config)
    return adamw(classifier, lr, seed, losses)


def ggpo(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    training = lora(classifier, lr, seed, losses)
    training.kept = zoopt.LoRAGGPO(classifier.model, training.optimizer, seed=seed)
    return training


def spiel(growth: Any) -> Build:
    def build(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
        for _, param in trained(classifier):
            param.requires_grad_(param.dim() > 1)
        params = trained(classifier)
        options = {"growth": growth, "update_gap": 10, "seed": seed}
        return Training(zoopt.SparseDeltaAdamW(params, lr=lr, **options))

    return build


def half(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    training = adamw(classifier, lr, seed, losses)
    training.kept = zoopt.HalfFineTuning(
        classifier.model, training.optimizer, round_steps=10, seed=seed
    )
    return training


def green(budget: float) -> Build:
    def build(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
        training = adamw(classifier, lr, seed, losses)
        training.kept = zoopt.GreenTrainer(
            *(classifier.model, training.optimizer, losses[0]), budget=budget, select_every=10
        )
        return training

    return build


def cofitune(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    training = adamw(classifier, lr, seed, losses)
    training.kept = zoopt.CoFiTune(
        *(classifier.model, training.optimizer, losses), target=["*.mlp.*"], seed=seed
    )
    return training


def lora_sb(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    zoopt.nn.convert_to_lora_sb(classifier.model, losses, LAYERS, rank=32, lr=1e-4)
    for name, param in classifier.model.named_parameters():
        param.requires_grad_(name.endswith(".core"))
    return adamw(classifier, lr, seed, losses)


def peqa(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    zoopt.nn.convert_to_quantised(classifier.model, LAYERS, bits=4)
    return Training(zoopt.AdamW(zoopt.nn.train_scales(classifier.model), lr=lr, seed=seed))


def qzo(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    zoopt.nn.convert_to_quantised(classifier.model, LAYERS, bits=4, form="log")
    scales = zoopt.nn.train_scales(classifier.model)
    options = {"max_projected_grad": 100.0, "zo_eps": 1e-3, "seed": seed}
    return Training(zoopt.MeZO(scales, lr=lr, **options), forward_only=True)


METHODS = {
    "adamw": Method(adamw, 1e-4),
    "lora": Method(lora, 1e-3),
    "lora-ggpo": Method(ggpo, 1e-3),
    "lora-sb": Method(lora_sb, 1e-3),
    "spiel-ag": Method(spiel("accumulated"), 4e-4),
    "spiel-ma": Method(spiel("momentum"), 4e-4),
    "hft": Method(half, 1e-4),
    "green-30": Method(green(0.3), 1e-4),
    "green-50": Method(green(0.5), 1e-4),
    "cofitune": Method(cofitune, 2e-4),
    "peqa-int4": Method(peqa, 4e-5),
    "qzo-int4": Method(qzo, 1e-5),
}


def execute(name: str, lr: float, seed: int, steps: int, task: Task) -> dict[str, Any]:
    """Train, and evaluate on the validation set; after a run of all steps, also on the test set."""
    classifier = copy.deepcopy(task.classifier)
    classifier.model.train()
    first, batches = task.batches(1000 + seed), task.batches(seed)
    probes = [next(first) for _ in range(4)]
    losses = [lambda batch=batch: classifier.loss(batch) for batch in probes]
    training = METHODS[name].build(classifier, lr, seed, losses)
    optimizer = training.optimizer
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    seconds, values = [], []
    for _ in range(steps):
        batch, began = next(batches), time.perf_counter()
        if training.forward_only:
            values.append(float(optimizer.step(lambda batch=batch: classifier.loss(batch))))
        else:
            optimizer.zero_grad()
            loss = classifier.loss(batch)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        seconds.append(time.perf_counter() - began)
        schedule.step()
    state = sum(v.nbytes for own in optimizer.state.values() for v in own.values())
    classifier.model.eval()
    whole = steps == STEPS
    metrics = evaluate(classifier, task.test if whole else task.validation).as_dict()
    return {
        "method": name,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "on": "test" if whole else "validation",
        "metrics": metrics,
        "losses": values,
        "seconds_a_step": statistics.median(seconds),
        "state_bytes": state,
        "trained": sum(p.numel() for _, p in trained(classifier)),
        "machine": common.machine(torch.device("cpu")),
    }


def run(name: str, lr: float, seed: int, steps: int, task: Callable[[], Task]) -> dict[str, Any]:
    """Return the run's result, from its file if it exists."""
    path = RESULTS / f"{name}-lr{lr:g}-n{steps}-s{seed}.json"
    known = load(path)
    if known is None:
        known = execute(name, lr, seed, steps, task())
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known) + "\n")
    return known


def summary() -> dict[str, Any]:
    """The results of each method at its best learning rate, over the seeds that have run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob(f"*-n{STEPS}-s*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["method"], []).append(result)
    table = {}
    for name in METHODS:
        if name in found:
            runs = found[name]
            table[name] = {
                "lr": runs[0]["lr"],
                "seeds": len(runs),
                **{
                    key: statistics.mean(own["metrics"][key] for own in runs)
                    for key in runs[0]["metrics"]
                },
                **{
                    key: statistics.median(own[key] for own in runs)
                    for key in ("seconds_a_step", "state_bytes", "trained")
                },
            }
    return {"steps": STEPS, "grid_steps": GRID_STEPS, "methods": table}


def main() -> None:
    """Do the missing runs, and write the table."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m bench.selection", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--model", default=defaults.model)
    parser.add_argument("--data", default=defaults.data)
    options = parser.parse_args()
    made: list[Task] = []

    def task() -> Task:
        if not made:
            settings = Settings(
                model=options.model, data=options.data, batch_size=16, validation_sentences=150
            )
            made.append(Task(settings))
            untrained = made[0].untrained
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / "untrained.json").write_text(json.dumps(untrained) + "\n")
        return made[0]

    for name in options.methods or METHODS:
        grid = {
            lr: run(name, lr, 0, GRID_STEPS, task)["metrics"]["cross_entropy"]
            for lr in lr_grid(METHODS[name].lr, 3.0)
        }
        best = min(grid, key=lambda lr: grid[lr])
        for seed in range(SEEDS):
            run(name, best, seed, STEPS, task)
        known = load(RESULTS / "untrained.json") or {}
        text = json.dumps({**summary(), "untrained": known}, indent=1)
        Path(f"{RESULTS}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
