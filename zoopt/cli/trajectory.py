"""`zoopt trajectory`: what a recorded run contains, whether it is intact, and its weights."""

from __future__ import annotations

import argparse
import collections
import math
from pathlib import Path
from typing import Any

from zoopt.cli import trajectory_weights
from zoopt.cli.terminal import (
    CommandError,
    Parser,
    add_json_argument,
    open_console,
    print_table,
    write_json,
)
from zoopt.trajectory.format import Contents, Event, Kind, TrajectoryError, read

DESCRIPTION = """\
Read a run that optimizer.record has written: tell what it holds, check every record, or take its
steps again on the weights that it began from. No model is evaluated for that."""


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
    diff = commands.add_parser(
        "diff",
        prog="zoopt trajectory diff",
        description="Print where two runs part. The exit status is 1 if they are not one run.",
        example="zoopt trajectory diff run.zoopt other.zoopt",
    )
    for each, function in ((info, _info), (verify, _verify), (diff, _diff)):
        each.add_argument("path", type=Path, metavar="PATH", help="the file of the run")
        each.set_defaults(func=function)
    add_json_argument(info)
    diff.add_argument("other", type=Path, metavar="OTHER", help="the file of another run")
    trajectory_weights.add_parsers(commands)


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


def _diff(options: argparse.Namespace) -> int:
    from zoopt.trajectory import diff

    console = open_console(None)
    try:
        found = diff(options.path, options.other)
    except (OSError, TrajectoryError) as error:
        raise CommandError(str(error)) from None
    if found.same:
        console.print(f"one run: {found.common} steps", markup=False)
        return 0
    rows = [(name, str(first), str(second)) for name, first, second in found.settings]
    rows.append(("steps", str(found.steps[0]), str(found.steps[1])))
    rows.append(("steps in common", str(found.common), str(found.common)))
    events = [" ".join(map(_shown, own)) or "none" for own in (found.first, found.second)]
    rows.append((f"step {found.common + 1}", events[0], events[1]))
    print_table(console, "where they differ", ("", str(options.path), str(options.other)), rows)
    return 1


def _shown(event: Event) -> str:
    """An event on one line."""
    parts = [event.kind.name.lower(), *(f"{loss:.9g}" for loss in event.losses)]
    if event.rates:
        parts.append(f"lr={','.join(f'{rate:.6g}' for rate in event.rates)}")
    if event.change:
        parts.append(str(event.change))
    return " ".join(parts)
