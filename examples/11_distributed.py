"""MeZO on several processes, which exchange only their losses.

    torchrun --nproc-per-node 2 examples/11_distributed.py
    torchrun --nproc-per-node 2 examples/11_distributed.py --demo [options of the demo]

Each process has its own share of every batch. Directions come from the seed, so processes exchange
only a few numbers per step, and neither gradients nor weights. All processes end with bit for bit
equal weights.

The first command trains a small network in seconds. The second fine-tunes the demo's language model
on the demo's sentences (see finetune_sentiment.py), 20 steps unless `--steps` says otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import zoopt

CLASSES, FEATURES, BATCH = 4, 16, 128
#: Of a step's number and this process's place: its share of the batch, as a closure and its size.
Share = Callable[[int, int, int], tuple[Callable[[], torch.Tensor], int]]


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre for each class."""
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, FEATURES, generator=generator)
    return centres[labels] + 0.7 * noise, labels


def train(
    params: Iterable[tuple[str, nn.Parameter]],
    share: Share,
    accuracy: Callable[[], float],
    steps: int,
    **options: Any,
) -> dict[str, float]:
    """Take the steps with the other processes; return the figures."""
    params = list(params)
    launched = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    group = dist.group.WORLD if launched else None
    optimizer = zoopt.MeZO(params, process_group=group, **options)
    before, losses = accuracy(), []
    for step in range(steps):
        loss, examples = share(step, rank, world)
        losses.append(optimizer.step(loss, weight=examples))
    part = min(10, steps)
    figures = {
        "accuracy_before": before,
        "accuracy": accuracy(),
        "loss_before": sum(losses[:part]) / part,
        "loss": sum(losses[-part:]) / part,
        "ranks": world,
        "different_weights": 0,
    }
    if launched:
        weights = torch.cat([param.detach().float().flatten() for _, param in params])
        others = [torch.empty_like(weights) for _ in range(world)]
        dist.all_gather(others, weights)
        figures["different_weights"] = sum(int((weights != w).sum()) for w in others)
    return figures


def main(steps: int = 400) -> dict[str, float]:
    """Train a small network on this process's share of the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    x, y = data(4096, seed=1)
    held_out = data(1024, seed=2)

    def share(step: int, rank: int, world: int) -> tuple[Callable[[], torch.Tensor], int]:
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        own = batch.tensor_split(world)[rank]
        return lambda: F.cross_entropy(model(x[own]), y[own]), len(own)

    def accuracy() -> float:
        with torch.no_grad():
            return (model(held_out[0]).argmax(1) == held_out[1]).double().mean().item()

    params = model.named_parameters()
    return train(params, share, accuracy, steps, lr=2e-2, num_probes=4, seed=0)


def demo(arguments: Sequence[str]) -> dict[str, float]:
    """Fine-tune the demo's model on this process's share of the demo's sentences."""
    from sentiment.data import read_sentences, split
    from sentiment.evaluation import evaluate
    from sentiment.model import balanced_batches, load_classifier
    from sentiment.options import parse

    args = parse(["--steps", "20", *arguments])
    splits = split(read_sentences(args.data, args.max_words))
    model = load_classifier(args.model, args.dtype, args.lora, args.prompt, args.verbalizers)
    # The same batches in all processes: they come from the seed.
    batches = balanced_batches(model.encode(splits.train), args.batch_size, args.seed)
    test = model.encode(splits.test[: args.eval_sentences])

    def share(step: int, rank: int, world: int) -> tuple[Callable[[], torch.Tensor], int]:
        own = next(batches)[rank::world]
        batch = model.collate(own)
        return lambda: model.loss(batch), len(own)

    return train(
        model.trainable(),
        share,
        lambda: evaluate(model, test).accuracy,
        args.steps,
        lr=args.lr,
        zo_eps=args.zo_eps,
        max_projected_grad=args.max_projected_grad,
        seed=args.seed,
    )


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    measured = demo(sys.argv[2:]) if sys.argv[1:2] == ["--demo"] else main()
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{measured['ranks']} processes: accuracy {measured['accuracy_before']:.2f} -> "
            f"{measured['accuracy']:.2f}; weights that differ: {measured['different_weights']}"
        )
    if dist.is_initialized():
        dist.destroy_process_group()
