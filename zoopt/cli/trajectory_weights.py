"""The commands of `zoopt trajectory` that make weights: replay, revert and merge."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from zoopt.cli.terminal import CommandError, fraction, open_console


class Weights:
    """Tensors by name, as `zoopt.replay` wants a model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def named_parameters(self) -> Any:
        """Names and tensors."""
        return self.tensors.items()


def add_parsers(commands: Any) -> None:
    """Register the commands."""
    replay = commands.add_parser(
        "replay",
        prog="zoopt trajectory replay",
        description=(
            "Repeat the steps of a run on the base weights, all of them or the first ones, and "
            "write the resulting weights, or their difference from the base."
        ),
        example="zoopt trajectory replay run.zoopt --base base.safetensors --out at-500.safetensors"
        " --until 500",
    )
    revert = commands.add_parser(
        "revert",
        prog="zoopt trajectory revert",
        description=(
            "Take trained weights back to an earlier step: without the base by subtracting what "
            "the later steps have added, which is exact up to rounding. With the base, replay "
            "--until has the weights to the bit."
        ),
        example="zoopt trajectory revert run.zoopt --trained tuned.safetensors --until 500 --out "
        "at-500.safetensors",
    )
    merge = commands.add_parser(
        "merge",
        prog="zoopt trajectory merge",
        description=(
            "Add several runs, or one, to the base weights: each one's difference times its "
            "weight, after random elements are dropped and the others rescaled (DARE)."
        ),
        example="zoopt trajectory merge a.zoopt b.zoopt --base base.safetensors --weights 0.7 0.3 "
        "--drop 0.9 --out merged.safetensors",
    )
    for each, function in ((replay, _replay), (revert, _revert)):
        each.add_argument("path", type=Path, metavar="PATH", help="the file of the run")
        each.set_defaults(func=function)
    merge.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="the files of the runs")
    merge.set_defaults(func=_merge)
    for each in (replay, merge):
        each.add_argument("--base", type=Path, required=True, help="the base weights, safetensors")
        each.add_argument(
            "--other-base", action="store_true", help="apply it to other weights than its own base"
        )
        each.add_argument(
            "--delta", action="store_true", help="write the difference from the base, in float32"
        )
    revert.add_argument(
        "--trained", type=Path, required=True, help="the weights after the last step, safetensors"
    )
    replay.add_argument("--until", type=int, metavar="STEP", help="the last step to take")
    revert.add_argument(
        "--until", type=int, metavar="STEP", required=True, help="the step to go back to"
    )
    merge.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each run")
    merge.add_argument(
        "--drop", type=fraction, default=0.0, metavar="P", help="probability to drop an element"
    )
    merge.add_argument("--seed", type=int, default=0, help="seed of what is dropped")
    for each in (replay, revert, merge):
        each.add_argument("--out", type=Path, required=True, help="where the weights go")


def _replay(options: argparse.Namespace) -> int:
    from zoopt.trajectory import replay

    def make(weights: Weights, progress: Callable[[int, int], None]) -> str:
        optimizer = replay(
            weights,
            options.path,
            until=options.until,
            check_base=not options.other_base,
            progress=progress,
        )
        return f"after step {optimizer.param_groups[0]['step']}"

    return _made(options, "--base", options.base, make)


def _revert(options: argparse.Namespace) -> int:
    from zoopt.trajectory import revert

    def make(weights: Weights, progress: Callable[[int, int], None]) -> str:
        revert(weights, options.path, options.until, progress=progress)
        return f"after step {options.until}, up to rounding"

    options.delta = False
    return _made(options, "--trained", options.trained, make)


def _merge(options: argparse.Namespace) -> int:
    from zoopt.trajectory import merge

    def make(weights: Weights, progress: Callable[[int, int], None]) -> str:
        merge(
            weights,
            options.paths,
            options.weights,
            p=options.drop,
            seed=options.seed,
            check_base=not options.other_base,
            progress=progress,
        )
        return f"{len(options.paths)} runs"

    return _made(options, "--base", options.base, make)


def _made(
    options: argparse.Namespace,
    name: str,
    source: Path,
    make: Callable[[Weights, Callable[[int, int], None]], str],
) -> int:
    """Read weights, change them, and write them, or the difference, with the file's metadata."""
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file, save_file
    except ImportError:
        raise CommandError("weights need safetensors; pip install 'zoopt-torch[demo]'") from None
    if not options.out.parent.is_dir():
        raise CommandError(f"--out: there is no folder {str(options.out.parent)!r}; make it first")
    try:
        tensors = load_file(source)
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
    except (OSError, ValueError, SafetensorError) as error:
        raise CommandError(f"{name}: cannot read {str(source)!r}: {error}") from None
    before = {key: tensor.clone() for key, tensor in tensors.items()} if options.delta else {}
    with _progress() as progress:
        try:
            done = make(Weights(tensors), progress)
        except (OSError, ValueError) as error:
            message = str(error).replace("check_base=False", "--other-base")
            raise CommandError(message) from None
    if options.delta:
        moved = {key: tensors[key].float() - old.float() for key, old in before.items()}
        tensors = {key: difference for key, difference in moved.items() if difference.any()}
    else:
        tensors = {key: tensor.detach() for key, tensor in tensors.items()}
    try:
        save_file(tensors, options.out, metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise CommandError(f"--out: cannot write {str(options.out)!r}: {error}") from None
    open_console(None).print(f"{options.out}: {done}, {len(tensors)} tensors", markup=False)
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of steps, while they are taken."""
    from rich.progress import Progress

    with Progress(console=open_console(None), transient=True) as bar:
        task = bar.add_task("replaying", total=None)
        yield lambda step, steps: bar.update(task, completed=step, total=steps)
