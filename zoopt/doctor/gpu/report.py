"""Runs all sections within a time limit, and writes the figures, a verdict on each, and a chart."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from zoopt.bench import common
from zoopt.bench.common import Row
from zoopt.doctor.gpu import bars, chart
from zoopt.doctor.gpu.scale import Scale
from zoopt.doctor.gpu.sections import SECTIONS
from zoopt.doctor.machine import identity

#: How long to wait between looks at a running section.
POLL_SECONDS = 0.1
#: A section is not started with less time than this.
LEAST_SECONDS = 5.0

Progress = Callable[[str], None]
#: (name of the section, name of the scale, device) -> the section's command.
Command = Callable[[str, str, str], list[str]]


def command_of(section: str, scale: str, device: str) -> list[str]:
    """The command that runs the section in its own process."""
    return [sys.executable, "-m", "zoopt.doctor.gpu.sections", section, scale, device]


def run(
    scale: Scale,
    device: torch.device,
    seconds: float,
    folder: Path,
    *,
    progress: Progress,
    command: Command = command_of,
    typed: str = "zoopt doctor --gpu",
) -> tuple[dict[str, Any], Path]:
    """Run all sections, and write a JSON file and a chart. The JSON is updated after each section.

    Args:
        scale: the models and sizes.
        device: the device to measure.
        seconds: time limit for everything. A section that is stopped keeps its rows so far.
        folder: where to write the two files, which are named after the device.
        progress: called with a line for each thing that starts or ends.
        command: makes the command of a section.
        typed: the command line that the user typed.

    Returns:
        The document (see `zoopt.bench.common.SCHEMA`), with `bars` and `unfinished` (the incomplete
        sections and the reasons), and the path of the JSON file.
    """
    deadline = time.monotonic() + seconds
    rows: dict[tuple[str, str], Row] = {}
    unfinished: dict[str, str] = {}
    options = argparse.Namespace(
        command=typed, scale=scale.name, device=str(device), seconds=seconds
    )
    path = folder / f"gpu_{slug(identity(device)['device'])}.json"

    def write() -> dict[str, Any]:
        document = common.document(
            *("gpu", options, device, list(rows.values())),
            ratio_to=None,
            scale=dataclasses.asdict(scale),
            unfinished=unfinished,
        )
        document["bars"] = [dataclasses.asdict(bar) for bar in bars.judge(document)]
        text = json.dumps(document, indent=2)
        path.write_text(text + "\n")
        written: dict[str, Any] = json.loads(text)
        return written

    for name, section in SECTIONS.items():
        limit = min(deadline - time.monotonic(), section.share * seconds)
        if limit < LEAST_SECONDS:
            unfinished[name] = "not begun, for lack of time"
            continue
        progress(f"{name}: {section.summary}")
        began = time.monotonic()
        found, reason = run_section(command(name, scale.name, str(device)), limit)
        rows |= {(row["name"], row["unit"]): row for row in found}
        if reason is not None:
            unfinished[name] = reason
        progress(f"{name}: {len(found)} figures, {time.monotonic() - began:.0f} s")
        write()
    document = write()
    chart.draw(path.with_suffix(".png"), document)
    return document, path


def run_section(command: list[str], seconds: float) -> tuple[list[Row], str | None]:
    """Run a section's process. Return its rows, and why it is incomplete (None if it is not)."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as lines, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=lines, stderr=errors)
        try:
            while process.poll() is None and time.monotonic() - began < seconds:
                time.sleep(POLL_SECONDS)
            status = process.poll()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        rows = _rows(lines)
        if status is None:
            return rows, f"stopped after {seconds:.0f} s"
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit status {status}"])[-1]
        return rows, last if status else None


def _rows(lines: TextIO) -> list[Row]:
    """Read the rows, without a line that was only partly written."""
    lines.seek(0)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def slug(device: str) -> str:
    """A device's name in a form that suits a file name."""
    return re.sub("[^a-z0-9]+", "_", device.lower()).strip("_")


def missing(document: Mapping[str, Any]) -> list[str]:
    """What could not be measured, one line each."""
    lines = [f"{name}: {reason}" for name, reason in document["unfinished"].items()]
    return lines + [
        f"{row['name']}: {row['reason']}" for row in document["rows"] if row["median"] is None
    ]
