"""Fine-tune a language model on review sentences with forward passes only; see --help."""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentiment.errors import InputError
from sentiment.options import parse
from sentiment.pace import Stages

# Let OpenMP's threads sleep while they wait. If they spin while another program is busy, they take
# the processor from each other. OpenMP reads this once, when torch is imported further down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
#: Measuring memory loads the model three times and takes steps that last about three times as long
#: as the evaluation of the test sentences.
MEMORY_LOADS, MEMORY_EVALUATIONS = 3, 3
#: Drawing the chart takes about half as long as loading the model.
DRAWING_LOADS = 0.5


def load(args: Namespace) -> tuple[Any, dict[str, list[Any]]]:
    """Load the model and the three sets of prompted sentences."""
    from sentiment.data import read_sentences, split
    from sentiment.model import load_classifier

    splits = split(read_sentences(args.data, args.max_words))
    classifier = load_classifier(args.model, args.dtype, args.lora, args.prompt, args.verbalizers)
    sets = {
        "train": splits.train,
        "validation": splits.validation[: max(1, args.eval_sentences // 2)],
        "test": splits.test[: args.eval_sentences],
    }
    return classifier, {name: classifier.encode(members) for name, members in sets.items()}


def measure(args: Namespace) -> None:
    """Do one memory measurement in this process and print it."""
    from sentiment import memory
    from sentiment.model import balanced_batches

    def load_batch() -> tuple[Any, Any]:
        classifier, sets = load(args)
        # The batch with the longest sentences, which is the one that needs the most memory.
        longest = sorted(sets["train"], key=lambda e: len(e.token_ids))[-4 * args.batch_size :]
        batch = next(balanced_batches(longest, args.batch_size, args.seed))
        return classifier, classifier.collate(batch)

    memory.print_measurement(memory.measure(args.measure, load_batch))


def settings(args: Namespace) -> dict[str, Any]:
    """Return the options of the run, as they go into the JSON file."""
    skipped = ("measure", "output", "no_memory")
    values = {name: value for name, value in vars(args).items() if name not in skipped}
    values["data"] = args.data.name
    values["model"] = Path(args.model).name if Path(args.model).is_dir() else args.model
    return values


def run(args: Namespace, argv: Sequence[str]) -> None:
    """Train, evaluate, measure and report."""
    started = time.perf_counter()
    stages = Stages()
    with stages.stage("loading torch and transformers, the model and the sentences"):
        from sentiment import memory, report
        from sentiment.evaluation import evaluate
        from sentiment.training import make_optimizer, train

        classifier, sets = load(args)
    loaded = time.perf_counter()
    params = classifier.trainable()
    counts = {name: len(members) for name, members in sets.items()}
    trained = sum(p.numel() for _, p in params)
    stages.say(
        f"{settings(args)['model']}: training {trained:,} parameters in {args.dtype} on "
        f"{counts['train']} sentences with {args.optimizer}"
    )
    optimizer = make_optimizer(
        args.optimizer,
        params,
        lr=args.lr,
        zo_eps=args.zo_eps,
        max_projected_grad=args.max_projected_grad,
        seed=args.seed,
    )
    with stages.stage(f"classifying {counts['test']} test sentences, before training"):
        before = evaluate(classifier, sets["test"])
    evaluated, loading = time.perf_counter() - loaded, loaded - started
    after_training = evaluated + DRAWING_LOADS * loading
    if not args.no_memory:
        after_training += MEMORY_LOADS * loading + MEMORY_EVALUATIONS * evaluated
    deadline = started + args.seconds if args.seconds else math.inf
    stages.say("training: the first step also loads the kernels, or compiles them")
    history = train(
        classifier, optimizer, sets["train"], sets["validation"],
        steps=args.steps, batch_size=args.batch_size, schedule=args.schedule,
        evaluations=min(args.steps, 5), seed=args.seed, deadline=deadline,
        after_training=after_training,
    )  # fmt: skip
    done = len(history.losses)
    if done < args.steps:
        stages.say(
            f"{done} of {args.steps} steps: {history.seconds / done:.2f} s each, and the whole run "
            f"is to end within {args.seconds} s; --seconds 0 takes all of them"
        )
    with stages.stage(f"classifying {counts['test']} test sentences, after training"):
        after = evaluate(classifier, sets["test"])
    measured = None
    if not args.no_memory:
        with stages.stage("measuring memory, each method in a process"):
            measured = memory.measure_all(
                [sys.executable, __file__, *argv],
                seconds_each=loading,
                deadline=deadline - DRAWING_LOADS * loading,
            )

    figures = {
        "settings": settings(args),
        "parameters": {
            "all": sum(p.numel() for p in classifier.model.parameters()),
            "trained": trained,
        },
        "steps": {"planned": args.steps, "done": done},
        "sentences": counts,
        "test": {"before": before.as_dict(), "after": after.as_dict()},
        "training": {
            "losses": history.losses,
            "validation": history.validation,
            "projected_grads": history.projected_grads,
        },
        "memory": measured,
        "seconds": {
            "training": history.seconds,
            "per_step": history.seconds / done,
            "total": time.perf_counter() - started,
        },
        "environment": report.environment(),
    }
    report.print_summary(figures)
    report.write_json(figures, args.output / "figures.json")
    report.draw(figures, args.output / "finetune_sentiment.png")
    print(f"written: {args.output}/figures.json and {args.output}/finetune_sentiment.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(argv)
        if args.measure:
            measure(args)
        else:
            args.output.mkdir(parents=True, exist_ok=True)
            run(args, argv)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
