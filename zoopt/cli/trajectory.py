"""`zoopt trajectory`: what a recorded run contains, whether it is intact, and its weights."""

from __future__ import annotations

import argparse
import collections
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from zoopt.cli.terminal import (
    CommandError,
    Parser,
    add_json_argument,
    open_console,
    print_table,
    write_json,
)
from zoopt.trajectory.format import Contents, Kind, TrajectoryError, read

DESCRIPTION = """\
Read a run that optimizer.record has written: tell what it holds, check every record, or take its
steps again on the weights that it began from. No model is evaluated for that."""


class Weights:
    """Tensors by name, with the method that `zoopt.replay` needs of a model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def named_parameters(self) -> Any:
        """Names and tensors."""
        return self.tensors.items()


def add_parser(subparsers: Any) -> None:
    """Register the commands."""
    parser = subparsers.add_parser(
        "trajectory",
        prog="zoopt trajectory",
        help="read, check and replay a recorded run",
        description=DESCRIPTION,
        example="zoopt trajectory replay run.zoopt --base base.safetensors --out tuned.safetensors",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    info = commands.add_parser(
        "info",
        prog="zoopt trajectory info",
        description="Print what a run is of, and how long it is.",
        example="zoopt trajectory info run.zoopt",
    )
    verify = commands.add_parser(
        "verify",
        prog="zoopt trajectory verify",
        description="Check every record. The exit status is 1 if the file is damaged or cut off.",
        example="zoopt trajectory verify run.zoopt",
    )
    replay = commands.add_parser(
        "replay",
        prog="zoopt trajectory replay",
        description=(
            "Take the steps again on the base weights, all or the first of them (so a run is taken "
            "back to any step), and write the weights that follow, or their difference."
        ),
        example="zoopt trajectory replay run.zoopt --base base.safetensors --out at-500.safetensors"
        " --until 500",
    )
    for each, function in ((info, _info), (verify, _verify), (replay, _replay)):
        each.add_argument("path", type=Path, metavar="PATH", help="the file of the run")
        each.set_defaults(func=function)
    add_json_argument(info)
    replay.add_argument("--base", type=Path, required=True, help="the base weights, safetensors")
    replay.add_argument("--out", type=Path, required=True, help="where the weights go")
    replay.add_argument("--until", type=int, metavar="STEP", help="the last step to take")
    replay.add_argument(
        "--other-base", action="store_true", help="apply the run to other weights than its own"
    )
    replay.add_argument(
        "--delta", action="store_true", help="write what the run has added, in float32"
    )


def _contents(path: Path) -> Contents:
    try:
        return read(path)
    except (OSError, TrajectoryError) as error:
        raise CommandError(str(error)) from None


def _info(options: argparse.Namespace) -> int:
    contents = _contents(options.path)
    header, steps = contents.header, contents.steps
    kinds = collections.Counter(event.kind for event in contents.events)
    size = options.path.stat().st_size
    elements = sum(math.prod(param["shape"]) for param in header["params"])
    facts = {
        "class": header["class"],
        "zoopt": header["zoopt"],
        "torch": header["torch"],
        "seed": header["groups"][0]["options"]["seed"],
        "parameters": f"{len(header['params'])} tensors, {elements:,} elements",
        "steps": steps,
        "probes of micro-batches": kinds[Kind.PROBE],
        "changes between steps": kinds[Kind.CHANGE],
        "bytes": size,
        "bytes torn off": contents.torn,
        "base": header["base"],
    }
    console = open_console(options.json)
    print_table(console, str(options.path), ("", ""), [(k, str(v)) for k, v in facts.items()])
    write_json(options.json, {**facts, "header": header})
    return 0


def _verify(options: argparse.Namespace) -> int:
    console = open_console(None)
    try:
        contents = read(options.path)
    except TrajectoryError as error:
        console.print(str(error), markup=False)
        return 1
    except OSError as error:
        raise CommandError(str(error)) from None
    if contents.torn:
        console.print(
            f"{options.path} ends with {contents.torn} bytes of a record that was cut off; "
            f"{contents.steps} steps before it are whole",
            markup=False,
        )
        return 1
    console.print(f"{options.path} is whole: {contents.steps} steps", markup=False)
    return 0


def _replay(options: argparse.Namespace) -> int:
    from zoopt.trajectory import replay

    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        raise CommandError("weights need safetensors; pip install 'zoopt-torch[demo]'") from None
    from rich.progress import Progress

    try:
        tensors = load_file(options.base)
    except (OSError, ValueError) as error:
        raise CommandError(f"--base: cannot read {str(options.base)!r}: {error}") from None
    before = {name: tensor.clone() for name, tensor in tensors.items()} if options.delta else {}
    console = open_console(None)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("replaying", total=None)
        try:
            optimizer = replay(
                Weights(tensors),
                options.path,
                until=options.until,
                check_base=not options.other_base,
                progress=lambda step, steps: bar.update(task, completed=step, total=steps),
            )
        except (OSError, ValueError) as error:
            raise CommandError(str(error)) from None
    if options.delta:
        moved = {name: tensors[name].float() - old.float() for name, old in before.items()}
        tensors = {name: delta for name, delta in moved.items() if delta.any()}
    else:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        save_file(tensors, options.out)
    except (OSError, ValueError) as error:
        raise CommandError(f"--out: cannot write {str(options.out)!r}: {error}") from None
    console.print(
        f"{options.out}: after step {optimizer.param_groups[0]['step']}, {len(tensors)} tensors",
        markup=False,
    )
    return 0
