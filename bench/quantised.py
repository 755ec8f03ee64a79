"""Fine-tunes the demo's language model in 4 bits by forward passes, beside the float one.

    python -m bench.quantised [--model DIRECTORY] [--data FILE] [METHOD ...]

trains the whole model of examples/finetune_sentiment.py, with its prompt, sentences and batches:

    mezo             every parameter in bfloat16; the demo's own setting
    mezo-lora        LoRA adapters on the bfloat16 model
    qzo-int4         the logarithms of the scales of 4-bit layers
    mezo-lora-int4   LoRA adapters on 4-bit layers

"qzo-int4" takes `GRID_STEPS` at three learning rates, and `STEPS` at the best of them with `SEEDS`
seeds; the others have the demo's rates. Each run is a file in bench/results/quantised, so that an
interrupted comparison continues with the missing runs. The table of the finished runs goes to
bench/results/quantised.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import zoopt
from bench import ROOT
from bench.comparison import lr_grid
from bench.runs import load, store
from zoopt.bench import common

if str(ROOT / "examples") not in sys.path:
    sys.path.insert(1, str(ROOT / "examples"))

from sentiment.data import read_sentences, split
from sentiment.evaluation import evaluate
from sentiment.model import Classifier, balanced_batches, load_classifier
from sentiment.options import MODEL, REVIEWS

RESULTS = ROOT / "bench" / "results" / "quantised"
STEPS, GRID_STEPS, SEEDS = 200, 60, 3
#: Of the validation set. What a label's bias adds to the loss, which falls first, is left out.
CRITERION = "calibrated_cross_entropy"
BATCH_SIZE, MAX_WORDS, VALIDATION_SENTENCES = 32, 12, 272
GROUP_SIZE, LORA_RANK = 64, 8
PROMPT, WORDS = "{} Just", (" terrible", " great")


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


class Runs:
    """The runs that are made, on the sentences of a file.

    Args:
        model: the model's directory.
        data: the sentences.
    """

    def __init__(self, model: str, data: str) -> None:
        self._model = model
        self._splits = split(read_sentences(Path(data), MAX_WORDS))

    def __call__(self, name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
        """Return the run's result, from its file if it exists."""
        path = RESULTS / f"{name}-lr{lr:g}-n{steps}-s{seed}.json"
        known = load(path)
        if known is None:
            known = self._execute(name, lr, seed, steps)
            RESULTS.mkdir(parents=True, exist_ok=True)
            store(known, path)
            print(path.name, known["metrics"], known["seconds_a_step"], flush=True)
        return known

    def _classifier(self, name: str) -> Classifier:
        method = METHODS[name]
        torch.manual_seed(0)  # peft draws its adapters with torch's generator.
        classifier = load_classifier(self._model, "bfloat16", method.lora, PROMPT, WORDS)
        if method.quantise is not None:
            method.quantise(classifier.model)
        return classifier

    def _execute(self, name: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
        """Train, and evaluate on the validation set; a run of all steps, on the test set."""
        method, classifier = METHODS[name], self._classifier(name)
        whole = steps == STEPS
        held_out = self._splits.test if whole else self._splits.validation[:VALIDATION_SENTENCES]
        examples = classifier.encode(held_out)
        before = evaluate(classifier, examples).as_dict()
        params = classifier.trainable()
        optimizer = zoopt.MeZO(
            params,
            lr=lr,
            zo_eps=method.zo_eps,
            max_projected_grad=method.max_projected_grad,
            seed=seed,
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        batches = balanced_batches(classifier.encode(self._splits.train), BATCH_SIZE, seed)
        losses, seconds = [], []
        for _ in range(steps):
            batch, began = classifier.collate(next(batches)), time.perf_counter()
            losses.append(float(optimizer.step(lambda batch=batch: classifier.loss(batch))))
            seconds.append(time.perf_counter() - began)
            schedule.step()
        model = classifier.model
        return {
            "method": name,
            "lr": lr,
            "seed": seed,
            "steps": steps,
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


def summary() -> dict[str, Any]:
    """The results of each method at its best learning rate: means over the seeds that have run."""
    table = {}
    for name in METHODS:
        runs = [
            run
            for path in sorted(RESULTS.glob(f"{name}-lr*-n{STEPS}-s*.json"))
            if (run := load(path))
        ]
        if not runs:
            continue
        table[name] = {
            "lr": runs[0]["lr"],
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
                for key in ("seconds_a_step", "model_bytes", "state_bytes", "trained")
            },
        }
    return {"steps": STEPS, "grid_steps": GRID_STEPS, "methods": table}


def main() -> None:
    """Do the missing runs, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantised", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--data", default=str(REVIEWS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    run = Runs(options.model, options.data)
    for name in options.methods or METHODS:
        lrs = METHODS[name].lrs
        best = lrs[0]
        if len(lrs) > 1:
            best = min(lrs, key=lambda lr: run(name, lr, 0, GRID_STEPS)["metrics"][CRITERION])
        for seed in range(options.seeds):
            run(name, best, seed, STEPS)
            store(summary(), Path(f"{RESULTS}.json"))


if __name__ == "__main__":
    main()
