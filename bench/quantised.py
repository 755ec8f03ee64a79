"""Fine-tunes the demo's language model in 4 bits by forward passes, beside the float one.

It trains the whole model of examples/finetune_sentiment.py, with its prompt, sentences and batches:

    mezo             every parameter in bfloat16; the demo's own setting
    mezo-lora        LoRA adapters on the bfloat16 model
    qzo-int4         the logarithms of the scales of 4-bit layers
    mezo-lora-int4   LoRA adapters on 4-bit layers

"qzo-int4" takes 60 steps at three learning rates, and 200 at the best of them with three seeds; the
others have the demo's rates. Each run is a file in bench/results/quantised, so that an interrupted
comparison continues with the missing runs. The table of the finished ones goes to
bench/results/quantised.json; it averages over the seeds that have run. Committed are the grid of
"qzo-int4" and three seeds of each method, but two of "mezo".
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import zoopt
from bench import ROOT, comparison
from bench.comparison import Halving, lr_grid
from bench.convergence.task import (
    PROMPT,
    WORDS,
    Classifier,
    Settings,
    balanced_batches,
    evaluate,
    load_classifier,
    read_sentences,
    split,
)
from bench.runs import Store, config_hash, finite, store
from bench.selection.run import Run
from zoopt.bench import common

RESULTS = ROOT / "bench" / "results" / "quantised"
STEPS, GRID_STEPS, SEEDS = 200, 60, 3
#: Of the validation set. What a label's bias adds to the loss, which falls first, is left out.
CRITERION = "calibrated_cross_entropy"
BATCH_SIZE, MAX_WORDS, VALIDATION_SENTENCES = 32, 12, 272
DTYPE, GROUP_SIZE, LORA_RANK = "bfloat16", 64, 8


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the table.

    Attributes:
        lrs: its learning rates; the best of several is chosen first.
        zo_eps, max_projected_grad: of MeZO.
        lora: the rank of its adapters; 0: none.
        quantise: quantises the model; None: it stays in bfloat16.
    """

    lrs: tuple[float, ...]
    zo_eps: float
    max_projected_grad: float
    lora: int = 0
    quantise: Callable[[Any], None] | None = None


def to_scales(model: Any) -> None:
    """Put all layers into 4 bits; the logarithms of scales train."""
    zoopt.nn.convert_to_quantised(model, bits=4, group_size=GROUP_SIZE, form="log")
    zoopt.nn.train_scales(model)


def below_adapters(model: Any) -> None:
    """Put the layers, also those under peft's adapters, into 4 bits; only the adapters train."""
    zoopt.nn.convert_to_quantised(
        model,
        lambda name, module: ".layers." in name and ".lora_" not in name,
        bits=4,
        group_size=GROUP_SIZE,
    )
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)


# A slope along log s is about 10 times smaller than along all weights: the root mean squares of a
# sentence's gradient are 5.7 and 56. So a `zo_eps` 10 times larger, a bound 10 times smaller and a
# rate 100 times larger are steps as long as those of "mezo".
METHODS = {
    "mezo": Method((2e-4,), 1e-3, 10.0),
    "mezo-lora": Method((5e-3,), 1e-2, 5.0, lora=LORA_RANK),
    "qzo-int4": Method(lr_grid(2e-2), 1e-2, 1.0, quantise=to_scales),
    "mezo-lora-int4": Method((5e-3,), 1e-2, 5.0, lora=LORA_RANK, quantise=below_adapters),
}


class Trainer:
    """Makes runs, on the sentences of a file.

    Args:
        options: `model`, the model's directory, and `data`, the sentences.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._splits = split(read_sentences(Path(options.data), MAX_WORDS))

    def _classifier(self, name: str) -> Classifier:
        method = METHODS[name]
        torch.manual_seed(0)  # peft draws its adapters with torch's generator.
        classifier = load_classifier(self._options.model, DTYPE, method.lora, PROMPT, WORDS)
        if method.quantise is not None:
            method.quantise(classifier.model)
        return classifier

    def __call__(self, run: Run) -> dict[str, Any]:
        """Train, and evaluate on the validation set; a run of all steps, on the test set."""
        method, classifier = METHODS[run.method], self._classifier(run.method)
        whole = run.steps == STEPS
        held_out = self._splits.test if whole else self._splits.validation[:VALIDATION_SENTENCES]
        examples = classifier.encode(held_out)
        before = evaluate(classifier, examples).as_dict()
        params = classifier.trainable()
        optimizer = zoopt.MeZO(
            params,
            lr=run.lr,
            zo_eps=method.zo_eps,
            max_projected_grad=method.max_projected_grad,
            seed=run.seed,
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=run.steps)
        batches = balanced_batches(classifier.encode(self._splits.train), BATCH_SIZE, run.seed)
        losses, seconds = [], []
        for _ in range(run.steps):
            batch, began = classifier.collate(next(batches)), time.perf_counter()
            losses.append(float(optimizer.step(lambda batch=batch: classifier.loss(batch))))
            seconds.append(time.perf_counter() - began)
            schedule.step()
        model = classifier.model
        config = configuration(run, self._options)
        return {
            "config_hash": config_hash(config),
            "config": config,
            "on": "test" if whole else "validation",
            "before": before,
            "metrics": evaluate(classifier, examples).as_dict(),
            "losses": losses,
            "seconds_a_step": statistics.median(seconds),
            "model_bytes": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
            "state_bytes": sum(v.nbytes for own in optimizer.state.values() for v in own.values()),
            "trained": sum(param.numel() for _, param in params),
            "machine": common.machine(torch.device("cpu")),
        }


def configuration(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """What a run's accuracy depends on, except the machine and the versions."""
    method = METHODS[run.method]
    return {
        "model": Path(options.model).name,
        "data": Path(options.data).name,
        "dtype": DTYPE,
        "batch_size": BATCH_SIZE,
        "max_words": MAX_WORDS,
        "validation_sentences": VALIDATION_SENTENCES,
        "zo_eps": method.zo_eps,
        "max_projected_grad": method.max_projected_grad,
        "lora_rank": method.lora,
        "group_size": None if method.quantise is None else GROUP_SIZE,
        **dataclasses.asdict(run),
    }


def score(result: Any) -> float:
    """The criterion for the learning rate; infinite if the run has diverged."""
    value = result["metrics"][CRITERION]
    return math.inf if value is None else float(value)


def plan(name: str, seeds: int, results: Callable[[Run], Any]) -> Halving[Run]:
    """Which runs a method needs. If it has one learning rate, its first seed is the grid's run."""
    lrs = METHODS[name].lrs
    return Halving(
        lrs,
        0,
        lambda lr: Run(name, lr, 0, GRID_STEPS if len(lrs) > 1 else STEPS),
        lambda lr: [Run(name, lr, seed, STEPS) for seed in range(seeds)],
        score,
        results,
    )


def finished(name: str, seeds: int, results: Callable[[Run], Any]) -> list[Any]:
    """The results of all steps at the method's best learning rate, of the seeds that have run."""
    chosen = plan(name, seeds, results)
    _, best = chosen.grid()
    made = [] if best is None else map(results, chosen.final_runs(best))
    return [result for result in made if result is not None]


def figures(runs: Sequence[Any]) -> dict[str, Any]:
    """A method's figures: means over its seeds, its sizes, and the time of the fastest run, which
    neighbours on the machine have slowed least."""
    return {
        "lr": runs[0]["config"]["lr"],
        "seeds": len(runs),
        **{
            f"{key}_before": statistics.mean(run["before"][key] for run in runs)
            for key in ("accuracy", "cross_entropy")
        },
        **{
            key: statistics.mean(run["metrics"][key] for run in runs)
            for key in ("accuracy", "calibrated_accuracy", "cross_entropy")
        },
        **{
            key: statistics.median(run[key] for run in runs)
            for key in ("model_bytes", "state_bytes", "trained")
        },
        "seconds_a_step": min(run["seconds_a_step"] for run in runs),
    }


def summary(options: argparse.Namespace, results: Callable[[Run], Any]) -> dict[str, Any]:
    """The results file: each method that has finished a run of all steps."""
    runs = {name: made for name in METHODS if (made := finished(name, options.seeds, results))}
    rows = [
        comparison.row(name, [run["metrics"]["cross_entropy"] for run in made], "cross-entropy")
        for name, made in runs.items()
    ]
    names = {"model": Path(options.model).name, "data": Path(options.data).name}
    content = common.document(
        *("quantised", options, torch.device("cpu"), rows),
        arguments={"steps": STEPS, "grid_steps": GRID_STEPS, "seeds": options.seeds, **names},
        methods={name: figures(made) for name, made in runs.items()},
    )
    if runs:
        content["machine"] = next(iter(runs.values()))[0]["machine"]
    return content


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser(str(__doc__), "python -m bench.quantised --seeds 1")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"which to run, of {', '.join(METHODS)}",
    )  # fmt: skip
    parser.add_argument("--model", default=Settings.model, help="a model's directory")
    parser.add_argument("--data", default=Settings.data, help="labelled sentences")
    parser.add_argument("--seeds", type=common.positive, default=SEEDS, help="of the best rate")
    parser.add_argument("--runs", type=Path, default=RESULTS, help="a file a run goes here")
    parser.add_argument("--json", type=Path, default=Path(f"{RESULTS}.json"), help="the table")
    parser.add_argument("--only-report", action="store_true", help="start no runs")
    options = parser.parse_args(argv)
    options.command = common.command(parser, argv)
    common.check_json(parser, options.json)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing runs, and write the table; returns the exit status."""
    options = parse(argv)
    results = Store[Run](options.runs, lambda run: configuration(run, options))
    if not options.only_report:
        options.runs.mkdir(parents=True, exist_ok=True)
        train = Trainer(options)
        for name in options.methods:
            while missing := plan(name, options.seeds, results).missing():
                result = train(missing[0])
                store(result, options.runs / missing[0].file)
                print(missing[0].file, result["metrics"], result["seconds_a_step"], flush=True)
                common.write_json(options.json, finite(summary(options, results)))
    common.write_json(options.json, finite(summary(options, results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
