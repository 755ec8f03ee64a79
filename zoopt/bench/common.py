"""Shared by the benchmarks: options, round-robin timing, tables, progress and JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoopt.cli import terminal
from zoopt.cli.terminal import STDOUT, CommandError, Parser, add_json_argument
from zoopt.doctor.machine import identity as machine

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


#: Version of the JSON that every benchmark writes. A document is
#:
#:   schema, benchmark, date, command    this number; the benchmark's name; when and how it was run
#:   machine                             `zoopt.doctor.machine.identity`: device, versions, commit
#:   arguments                           the options, defaults among them
#:   rows                                the figures, one a row; less is better in every unit
#:
#: and whatever else the benchmark reports. A row is
#:
#:   name, unit      together unique in the document
#:   median          None if it could not be measured; `reason` says why
#:   spread          interquartile range; 0 for counts, None for a single measurement
#:   min, max
#:   repeats         how often it was measured
#:   ratio           median over rounds of this figure over the document's `ratio_to`, or None
#:
#: and its own further entries.
SCHEMA = 1
Row = dict[str, Any]


def parser(description: str, example: str) -> Parser:
    """A benchmark's parser; its program name is the first word of the example."""
    return Parser(example.partition(" --")[0], description, example)


def add_common_arguments(arguments: Parser, repeats: int) -> None:
    """Device, threads, rounds, and where results go."""
    arguments.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="CPU threads"
    )
    arguments.add_argument("--repeats", type=positive, default=repeats, help="rounds to time")
    add_json_argument(arguments)
    arguments.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw a chart here")


def parse(arguments: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and `command`, which repeats the call. Exits if results cannot be written."""
    options = arguments.parse_args(argv)
    options.command = command(arguments, argv)
    check_json(arguments, options.json)
    if options.plot is not None:
        check_writable(arguments, "--plot", options.plot)
        if importlib.util.find_spec("matplotlib") is None:
            arguments.error("--plot needs matplotlib; pip install 'zoopt-torch[cli]'")
    return options


def positive(text: str) -> int:
    """A positive integer, in figures or as a power such as 2**26."""
    base, _, exponent = text.partition("**")
    try:
        value = int(base) ** int(exponent) if exponent else int(base)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def command(arguments: Parser, argv: Sequence[str] | None) -> str:
    """The command line of this run."""
    return shlex.join([*arguments.prog.split(), *(sys.argv[1:] if argv is None else argv)])


def open_device(arguments: Parser, options: argparse.Namespace) -> torch.device:
    """The device to measure on, after the thread count has been set; exits if there is none."""
    try:
        device = torch.device(options.device)
    except RuntimeError:
        arguments.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type not in ("cpu", "cuda"):
        arguments.error(f"--device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        arguments.error(f"--device {options.device}: this machine has no such GPU")
    torch.set_num_threads(options.threads)
    return device


def check_json(arguments: Parser, path: Path | None) -> None:
    """Exit if the results could not be written, before anything is measured."""
    if path is not None and path != STDOUT:
        check_writable(arguments, "--json", path)


def check_writable(arguments: Parser, name: str, path: Path) -> None:
    """Exit unless a file can be written there."""
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        arguments.error(f"{name}: cannot write to the folder {str(path.parent)!r}")
    if path.is_dir():
        arguments.error(f"{name}: {str(path)!r} is a folder")


def seconds(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """The duration of one call, averaged over `calls` of them queued without a break."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def round_robin(
    methods: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    label: str,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Each method's durations in seconds: a round to warm up, then `repeats` rounds.

    A round runs every method once, so that a drift of the machine's speed affects all of them
    equally and durations of the same round can be compared.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats + 1):
        for name, function in methods.items():
            progress(f"{label}: round {turn} of {repeats}, {name}")
            duration = seconds(function, device, calls)
            if turn:
                times[name].append(duration)
    progress("")
    return times


def ratio(times: Sequence[float], to: Sequence[float], passes: int = 1) -> float:
    """The median over rounds of times / (passes to)."""
    return statistics.median(a / (passes * b) for a, b in zip(times, to, strict=True))


def measured(
    name: str, values: Sequence[float], unit: str, *, ratio: float | None = None, **extra: Any
) -> Row:
    """The row of a figure that was measured in several rounds."""
    spread = None
    if len(values) > 1:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        spread = third - first
    return {
        "name": name,
        "median": statistics.median(values),
        "spread": spread,
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
        "unit": unit,
        "ratio": ratio,
        **extra,
    }


def counted(name: str, value: float, unit: str, *, ratio: float | None = None, **extra: Any) -> Row:
    """The row of an exact figure: bytes, instructions."""
    return {**measured(name, [value], unit, ratio=ratio, **extra), "spread": 0.0}


def failed(name: str, unit: str, reason: str) -> Row:
    """The row of a figure that could not be measured, with the reason, such as "out of memory"."""
    nothing: Row = dict.fromkeys(("median", "spread", "min", "max"))
    return {"name": name, **nothing, "repeats": 0, "unit": unit, "ratio": None, "reason": reason}


def progress(text: str) -> None:
    """Show what is being done, if a terminal is attached."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def table(columns: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> str:
    """Records as text: columns maps a record's key to its heading; floats get 3 digits."""
    rows = [list(columns.values())]
    rows += [[_cell(record.get(key)) for key in columns] for record in records]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = records[0] if records else {}
    left = [isinstance(first.get(key), str) for key in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def say(text: str, json_path: Path | None) -> None:
    """Print for the user: to standard error if JSON goes to standard output."""
    stream = sys.stderr if json_path == STDOUT else sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def write_json(path: Path | None, content: Any) -> None:
    """Write the results, and say where they are."""
    terminal.write_json(path, content)
    if path is not None:
        say(f"\nwritten: {path}", path)


def document(
    benchmark: str,
    options: argparse.Namespace,
    device: torch.device,
    rows: Sequence[Row],
    **content: Any,
) -> dict[str, Any]:
    """The content of a results file; see `SCHEMA`. Entries of `content` take precedence."""
    # Paths of results, and options for our own child processes, are not worth recording.
    hidden = ("json", "plot", "command", "rss_of")
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": options.command,
        "machine": machine(device),
        "arguments": {key: value for key, value in vars(options).items() if key not in hidden},
        **content,
        "rows": list(rows),
    }


def load_document(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        CommandError: it cannot be read, or has another schema.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CommandError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{str(path)!r} is not JSON: {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise CommandError(
            f"{str(path)!r} must be a result of zoopt bench with schema {SCHEMA}, got {schema}; "
            f"measure again with --json"
        )
    return dict(content)
