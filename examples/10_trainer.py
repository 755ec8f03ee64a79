"""The demo's fine-tuning through transformers.Trainer: evaluation, schedule, checkpoints, resuming.

`ZOTrainer` is the Trainer for zeroth-order optimizers and is used like any other Trainer. With
--resume, a stopped run continues from its last checkpoint. The result is bit for bit that of an
uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from sentiment.data import read_sentences, split
from sentiment.errors import InputError
from sentiment.evaluation import metrics
from sentiment.model import Batch, Classifier, Example, load_classifier
from sentiment.options import FETCH, MODEL, RECIPES, REVIEWS, ROOT
from transformers.trainer_utils import get_last_checkpoint

import zoopt
from zoopt.integrations.transformers import ZOTrainer

RECIPE = RECIPES["mezo", False]


class SentimentTrainer(ZOTrainer):
    """Trains the demo's classifier: which of two words does the language model say next?"""

    # The loss below is a mean over its micro-batch.
    loss_is_scaled_for_ga = False

    def __init__(self, classifier: Classifier, **options: Any) -> None:
        super().__init__(
            model=classifier.model,
            data_collator=self.collate,
            compute_metrics=self.measure,
            **options,
        )
        self.classifier = classifier

    def collate(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Turn examples into the inputs of a step."""
        batch = self.classifier.collate(examples)
        return {"input_ids": batch.input_ids, "last": batch.last, "labels": batch.positive}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy between the two words."""
        batch = Batch(inputs["input_ids"], inputs["last"], inputs["labels"])
        difference = self.classifier.logit_difference(batch)
        loss = F.binary_cross_entropy_with_logits(difference, batch.positive)
        return (loss, {"logits": difference}) if return_outputs else loss

    @staticmethod
    def measure(prediction: transformers.EvalPrediction) -> dict[str, float]:
        """Accuracies and cross-entropies."""
        difference, positive = map(torch.from_numpy, (prediction.predictions, prediction.label_ids))
        return metrics(difference, positive).as_dict()


def build(args: argparse.Namespace) -> tuple[SentimentTrainer, list[Example]]:
    """Return the trainer and the test set."""
    splits = split(read_sentences(args.data, args.max_words))
    classifier = load_classifier(args.model, RECIPE.dtype, 0, "{} Just", (" terrible", " great"))
    every = args.every or max(1, args.steps // 4)
    arguments = transformers.TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.micro_batches,
        lr_scheduler_type="linear",
        logging_steps=max(1, args.steps // 20),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        seed=args.seed,
        use_cpu=True,
        report_to="none",
    )
    hyperparameters = {
        "lr": RECIPE.lr,
        "zo_eps": RECIPE.zo_eps,
        "max_projected_grad": RECIPE.max_projected_grad,
    }
    trainer = SentimentTrainer(
        classifier,
        args=arguments,
        train_dataset=classifier.encode(splits.train),
        eval_dataset=classifier.encode(splits.validation[: args.eval_sentences]),
        optimizer_cls_and_kwargs=(zoopt.MeZO, hyperparameters),
    )
    return trainer, classifier.encode(splits.test[: args.eval_sentences])


def run(args: argparse.Namespace) -> None:
    """Train, from the beginning or the last checkpoint, and measure on the test set."""
    checkpoint = None
    if args.resume:
        checkpoint = get_last_checkpoint(args.output) if args.output.is_dir() else None
        if checkpoint is None:
            raise InputError(f"there is no checkpoint in {args.output}; leave out --resume")
    trainer, test_set = build(args)
    before = trainer.predict(test_set).metrics
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.predict(test_set).metrics
    figures = {"before": before, "after": after, "log": trainer.state.log_history}
    path = args.output / "figures.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"test accuracy {before['test_accuracy']:.3f} -> {after['test_accuracy']:.3f}")
    print(f"written: checkpoints and {path}")


def count(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=str(MODEL), help=f"a directory or a name (default: from {FETCH})")
    add("--data", type=Path, default=REVIEWS, help=f"labelled sentences (default: from {FETCH})")
    add("--output", type=Path, default=ROOT / "out" / "trainer", help="default: out/trainer")
    add("--steps", type=count, default=RECIPE.steps, help="default: %(default)s")
    add("--batch-size", type=count, default=RECIPE.batch_size, help="default: %(default)s")
    add("--micro-batches", type=count, default=1, help="batches a step (default: %(default)s)")
    add("--every", type=count, help="steps between checkpoints (default: a quarter of --steps)")
    add("--max-words", type=int, default=12, help="of a sentence (default: %(default)s)")
    add("--eval-sentences", type=count, default=600, help="at most (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    try:
        run(parser.parse_args(argv))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
