"""What the benchmarks share: who measures, round-robin timing, tables, progress and JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

#: The checkout; `tests.reference` is imported from it.
ROOT = Path(__file__).resolve().parent.parent

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and states the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def parser(description: str, example: str) -> Parser:
    return Parser(
        description=description, epilog=f"example:\n  {example}", formatter_class=_Formatter
    )


def add_common_arguments(arguments: Parser, repeats: int) -> None:
    arguments.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="CPU threads"
    )
    arguments.add_argument("--repeats", type=positive, default=repeats, help="rounds to time")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")


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
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        arguments.error(f"--json: cannot write to the folder {str(path.parent)!r}")
    if path is not None and path.is_dir():
        arguments.error(f"--json: {str(path)!r} is a folder")


def machine(device: torch.device) -> dict[str, Any]:
    """What identifies the machine and the software of a measurement."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_minute": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": _commit(),
    }


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def seconds(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """The duration of one call, averaged over `calls` of them queued without a break."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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

    A round runs every method once, so that a drift of the machine's speed hits all alike and
    durations of the same round can be compared.
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


def spread(times: Sequence[float], unit: str, scale: float) -> dict[str, float]:
    """Median, least and greatest, as `median_<unit>` and so on."""
    return {
        f"median_{unit}": statistics.median(times) * scale,
        f"min_{unit}": min(times) * scale,
        f"max_{unit}": max(times) * scale,
    }


def progress(text: str) -> None:
    """Show what is being done, if anyone is looking."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


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


def write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n")
        print(f"\nwritten: {path}")


def document(device: torch.device, options: argparse.Namespace, **content: Any) -> dict[str, Any]:
    """What a results file holds: the machine, the arguments, and the measurements."""
    # Where the results go, and what only our own child processes are passed, say nothing of them.
    hidden = ("json", "rss_of")
    arguments = {key: value for key, value in vars(options).items() if key not in hidden}
    return {"machine": machine(device), "arguments": arguments, **content}
