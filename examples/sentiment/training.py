"""The training loop: a closure, an optimizer, a progress bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

import zoopt

from .evaluation import evaluate
from .model import Batch, Classifier, Example, balanced_batches
from .pace import RECENT, TIMED, WARM_UP, steps_that_fit

SMOOTHING = 0.95


@dataclass
class History:
    """What happened in a run."""

    losses: list[float] = field(default_factory=list)
    projected_grads: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """All steps together."""
        return sum(self.durations)


def smooth(values: Sequence[float], factor: float = SMOOTHING) -> list[float]:
    """Exponential moving average that starts unbiased."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = factor * average + (1 - factor) * value
        weight = factor * weight + (1 - factor)
        result.append(average / weight)
    return result


def make_optimizer(
    name: str,
    params: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    lr: float = 1e-6,
    zo_eps: float = 1e-3,
    max_projected_grad: float | None = None,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Build the optimizer ``name``, "mezo" or "adamw", over named parameters."""
    if name == "mezo":
        return zoopt.MeZO(
            params, lr=lr, zo_eps=zo_eps, max_projected_grad=max_projected_grad, seed=seed
        )
    return torch.optim.AdamW(params, lr=lr)


def step(optimizer: Any, classifier: Classifier, batch: Batch) -> float:
    """Do one step on a batch with either kind of optimizer and return the loss."""

    def forward_only() -> torch.Tensor:
        return classifier.loss(batch)

    def with_backward() -> torch.Tensor:
        optimizer.zero_grad()
        loss = classifier.loss(batch)
        loss.backward()
        return loss.detach()

    closure = forward_only if isinstance(optimizer, zoopt.MeZO) else with_backward
    return float(optimizer.step(closure))


def train(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    train_set: Sequence[Example],
    validation_set: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    schedule: str,
    evaluations: int,
    seed: int,
    deadline: float = math.inf,
    after_training: float = 0.0,
) -> History:
    """Train, looking at the validation set ``evaluations`` times on the way.

    It takes ``steps`` steps, or as many as end ``after_training`` seconds before the ``deadline``
    (of ``time.perf_counter``): the last steps' duration tells how many those are, and the learning
    rate falls so as to end with them. Where looking at the validation set takes longer than at
    first, what comes after training will too.
    """
    history = History()
    end_factor = {"constant": 1.0, "linear": 0.0}[schedule]
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end_factor, total_iters=steps)
    batches: Iterator[list[Example]] = balanced_batches(train_set, batch_size, seed)
    total, done, looks = steps, 0, 0
    started = time.perf_counter()
    history.validation.append({"step": 0, **evaluate(classifier, validation_set).as_dict()})
    first_look = last_look = time.perf_counter() - started
    with tqdm(total=total, desc="training", unit="step", file=sys.stderr) as bar:
        while done < total:
            done += 1
            started = time.perf_counter()
            batch = classifier.collate(next(batches))
            history.losses.append(step(optimizer, classifier, batch))
            if isinstance(optimizer, zoopt.MeZO) and optimizer.last_step is not None:
                history.projected_grads.extend(optimizer.last_step.projected_grads)
            scheduler.step()
            history.durations.append(time.perf_counter() - started)
            if done == WARM_UP + TIMED or (done > WARM_UP + TIMED and done % RECENT == 0):
                slower = max(1.0, last_look / first_look) if first_look else 1.0
                left = deadline - time.perf_counter() - after_training * slower
                left -= (evaluations - looks) * last_look
                total = steps_that_fit(history.durations, steps, left)
                scheduler.total_iters = bar.total = total
            if done >= round(total * (looks + 1) / evaluations):
                looks = max(looks + 1, done * evaluations // total)
                started = time.perf_counter()
                figures = evaluate(classifier, validation_set).as_dict()
                last_look = time.perf_counter() - started
                history.validation.append({"step": done, **figures})
            latest = history.validation[-1]
            bar.set_postfix_str(
                f"loss {smooth(history.losses)[-1]:.3f}, "
                f"validation accuracy {latest['accuracy']:.3f}",
                refresh=False,
            )
            bar.update()
    return history
