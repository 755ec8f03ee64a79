"""One training run of bench.selection, and the memory and time of its steps."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from typing import Any

import torch

from bench.convergence.task import Settings, Task, evaluate
from bench.runs import config_hash
from bench.selection.methods import METHODS, Training
from zoopt.bench import common
from zoopt.memory.meter import StorageMeter
from zoopt.memory.step import tensors_of

#: Steps whose time is taken, after one that makes the state.
TIMED = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """A method at a learning rate, a seed and a number of steps."""

    method: str
    lr: float
    seed: int
    steps: int

    @property
    def file(self) -> str:
        return f"{self.method}-lr{self.lr:g}-n{self.steps}-s{self.seed}.json"


def configuration(run: Run, settings: Settings) -> dict[str, Any]:
    """What a run's accuracy depends on, except the machine and the versions."""
    names = ("model", "data", "layers", "dtype", "batch_size", "max_words")
    sizes = ("validation_sentences", "test_sentences")
    shared = settings.as_dict()
    return {**{name: shared[name] for name in (*names, *sizes)}, **dataclasses.asdict(run)}


class Trainer:
    """A copy of the task's classifier, and a method's way to train it."""

    def __init__(self, run: Run, task: Task) -> None:
        self.classifier = copy.deepcopy(task.classifier)
        self.classifier.model.train()
        probes = [batch for batch, _ in zip(task.batches(1000 + run.seed), range(4), strict=False)]
        losses = [lambda batch=batch: self.classifier.loss(batch) for batch in probes]
        self.training: Training = METHODS[run.method].build(
            self.classifier, run.lr, run.seed, losses
        )

    def step(self, batch: Any) -> float:
        """Take a step; returns the loss."""
        optimizer = self.training.optimizer
        if self.training.forward_only:
            return float(optimizer.step(lambda: self.classifier.loss(batch)))
        optimizer.zero_grad()
        loss = self.classifier.loss(batch)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(tensor.nbytes for tensor in tensors_of(self.training.optimizer.state))


def execute(run: Run, settings: Settings, task: Task, *, final: bool) -> dict[str, Any]:
    """Train, and evaluate on the validation set, or at last on the test set."""
    trainer = Trainer(run, task)
    batches = task.batches(run.seed)
    optimizer = trainer.training.optimizer
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=run.steps)
    losses = []
    for _ in range(run.steps):
        losses.append(trainer.step(next(batches)))
        schedule.step()
    trainer.classifier.model.eval()
    config = configuration(run, settings)
    return {
        "config_hash": config_hash(config),
        "config": config,
        "on": "test" if final else "validation",
        "metrics": evaluate(trainer.classifier, task.test if final else task.validation).as_dict(),
        "losses": losses,
        "machine": common.machine(torch.device("cpu")),
    }


def cost(run: Run, task: Task) -> dict[str, Any]:
    """What a step takes: median seconds, bytes of tensors at its highest point and of state.

    The bytes are those of the weights, gradients, state and temporaries of the trained layers; a
    meter follows every operator.
    """
    trainer = Trainer(run, task)
    batches = task.batches(run.seed)
    trainer.step(next(batches))
    seconds = []
    for _ in range(TIMED):
        batch, began = next(batches), time.perf_counter()
        trainer.step(batch)
        seconds.append(time.perf_counter() - began)
    batch, model = next(batches), trainer.classifier.model
    for param in model.parameters():
        param.grad = None
    with StorageMeter() as meter:
        meter.track([*model.parameters(), *model.buffers()], "parameters")
        meter.track(tensors_of(trainer.training.optimizer.state), "optimizer state")
        meter.forget_peaks()
        trainer.step(batch)
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": meter.peak,
        "state_bytes": trainer.state_bytes(),
        "trained": sum(param.numel() for _, param in trainer.classifier.trainable()),
    }
