"""Command line of the example, with the defaults that were found to work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / ".data" / "smollm2-135m-instruct"
REVIEWS = ROOT / ".data" / "movie_reviews.tsv"
DTYPES = ("float32", "bfloat16", "float16")
FETCH = "python examples/fetch_demo_assets.py"

DESCRIPTION = """\
Fine-tune a causal language model to tell good reviews from bad ones, without a backward pass.

The model reads "SENTENCE Just" and is trained to go on with " great" or " terrible". By default
every parameter is trained with MeZO, on the CPU, in a few minutes: on a slow machine, or beside
another program, the run makes fewer steps and ends in the same time. Accuracy on held-out sentences
is taken before and after; peak memory is measured for this run, for plain inference and for AdamW
on the same batch. A chart and all figures are written to --output.
"""

EPILOG = """\
files for --data (UTF-8; sentences are split by a hash of the text into 70% train, 10%% validation,
20%% test):
  name.tsv    id<TAB>rating<TAB>text, no header; the sign of the rating is the label, 0 is left out
  name.csv    a header with the columns label and text
  name.jsonl  one {"label": ..., "text": ...} a line
  A label is 0 or 1, -1 or 1, neg or pos, negative or positive, bad or good, false or true.

examples:
  python examples/finetune_sentiment.py
  python examples/finetune_sentiment.py --lora 8
  python examples/finetune_sentiment.py --model DIRECTORY --data reviews.csv --steps 1000
"""


#: What a run may take, unless its steps are given.
SECONDS = 270


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters that go together."""

    lr: float
    steps: int
    zo_eps: float = 1e-3
    max_projected_grad: float = 10.0
    batch_size: int = 32
    dtype: str = "bfloat16"


# AdamW rounds to nearest, which would drop nearly every one of its updates in bfloat16.
RECIPES = {
    ("mezo", False): Recipe(lr=2e-4, steps=200),
    ("mezo", True): Recipe(lr=5e-3, steps=150, zo_eps=1e-2, max_projected_grad=5.0),
    ("adamw", False): Recipe(lr=2e-5, steps=60, batch_size=16, dtype="float32"),
    ("adamw", True): Recipe(lr=1e-3, steps=60, batch_size=16, dtype="float32"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def _number(kind: type[int] | type[float], minimum: float, text: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not minimum <= value < float("inf"):
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} of at least {minimum:g}, got {text!r}")
    return value


def _count(text: str) -> int:
    return int(_number(int, 1, text))


def _pair(text: str) -> int:
    return int(_number(int, 2, text))


def _natural(text: str) -> int:
    return int(_number(int, 0, text))


def _positive(text: str) -> float:
    return float(_number(float, 1e-12, text))


def _recipe_help(name: str, *, adamw: bool = True) -> str:
    kinds = [("", ("mezo", False)), ("with --lora ", ("mezo", True))]
    if adamw:
        kinds.append(("with --optimizer adamw ", ("adamw", False)))
    values = "; ".join(f"{label}{getattr(RECIPES[kind], name)}" for label, kind in kinds)
    return f"default: {values}"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = _Parser(
        prog="finetune_sentiment.py",
        description=DESCRIPTION,
        epilog=EPILOG.replace("%%", "%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default=str(MODEL),
        metavar="PATH_OR_NAME",
        help=f"a directory in Hugging Face's format, or a model's name (default: from {FETCH})",
    )
    add(
        "--data",
        type=Path,
        default=REVIEWS,
        metavar="FILE",
        help=f"labelled sentences, see below (default: from {FETCH})",
    )
    add(
        "--output",
        type=Path,
        default=ROOT / "out" / "finetune_sentiment",
        metavar="DIR",
        help="where the chart and the figures go (default: out/finetune_sentiment)",
    )
    add("--optimizer", choices=("mezo", "adamw"), default="mezo", help="default: %(default)s")
    add(
        "--lora",
        type=_natural,
        default=0,
        metavar="RANK",
        help="train LoRA adapters of this rank instead of all parameters (default: 0, off)",
    )
    add("--lr", type=_positive, help=f"learning rate at the start ({_recipe_help('lr')})")
    add(
        "--schedule",
        choices=("linear", "constant"),
        default="linear",
        help="learning rate over the run: down to 0, or unchanged (default: %(default)s)",
    )
    add(
        "--zo-eps",
        type=_positive,
        help=f"scale of MeZO's perturbations ({_recipe_help('zo_eps', adamw=False)})",
    )
    add(
        "--max-projected-grad",
        type=_positive,
        help="MeZO's slope estimates are cut off at this size, so that no single batch can throw "
        f"the model off ({_recipe_help('max_projected_grad', adamw=False)})",
    )
    add("--steps", type=_count, help=f"training steps ({_recipe_help('steps')})")
    add(
        "--seconds",
        type=_natural,
        help="make fewer steps where the whole run would take longer; 0 sets no limit "
        f"(default: {SECONDS}, or 0 with --steps)",
    )
    add(
        "--batch-size",
        type=_pair,
        help=f"sentences a step, half of each label ({_recipe_help('batch_size')})",
    )
    add("--dtype", choices=DTYPES, help=f"of the weights ({_recipe_help('dtype')})")
    add("--seed", type=_natural, default=0, help="default: %(default)s")
    add(
        "--max-words",
        type=_natural,
        default=12,
        help="leave out sentences with more words; 0 keeps all (default: %(default)s)",
    )
    add("--prompt", default="{} Just", help='{} stands for the sentence (default: "%(default)s")')
    add(
        "--verbalizers",
        nargs=2,
        default=(" terrible", " great"),
        metavar=("NEGATIVE", "POSITIVE"),
        help='words of one token that go on from the prompt (default: " terrible" " great")',
    )
    add(
        "--eval-sentences",
        type=_count,
        default=600,
        metavar="N",
        help="at most so many test sentences are used, and half as many validation sentences "
        "(default: %(default)s)",
    )
    add("--no-memory", action="store_true", help="leave out the memory measurements")
    add("--measure", choices=("inference", "mezo", "adamw"), help=argparse.SUPPRESS)
    return parser  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the recipe; raises InputError on bad input."""
    args = build_parser().parse_args(argv)
    recipe = RECIPES[args.optimizer, bool(args.lora)]
    if args.seconds is None:
        args.seconds = SECONDS if args.steps is None else 0
    for name in Recipe.__dataclass_fields__:
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name))
    if args.batch_size % 2:
        raise InputError(f"--batch-size must be even, half of each label, got {args.batch_size}")
    if args.model == str(MODEL) and not MODEL.is_dir():
        raise InputError(f"the model is not at {MODEL}; run {FETCH} once, or give --model")
    if not args.data.is_file():
        remedy = f"run {FETCH} once, or give --data" if args.data == REVIEWS else "check --data"
        raise InputError(f"there is no file {args.data}; {remedy}")
    return args
