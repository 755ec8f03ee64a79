"""All sections one after the other, within a time limit: figures, bars, a file and a chart."""

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

#: How often a running section is looked at.
POLL_SECONDS = 0.1
#: With less, a section is not begun.
LEAST_SECONDS = 5.0

Progress = Callable[[str], None]
#: The command of a section: its name, the scale's and the device.
Command = Callable[[str, str, str], list[str]]


def command_of(section: str, scale: str, device: str) -> list[str]:
    """The section in a process of its own."""
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
    """Do all sections and write a JSON and a chart; the JSON also after each section.

    Args:
        scale: on what models.
        device: where.
        seconds: for all of it; a section that is cut off leaves the rows that it has.
        folder: where the two files go, named after the device.
        progress: called with what is being done.
        command: of a section's process.
        typed: how the user called it.

    Returns:
        The document (see `zoopt.bench.common.SCHEMA`), with `bars` and with `unfinished`, the
        sections that are not whole and why; and the path of the JSON.
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
    """The rows of a section's process, and why they are not all that there should be, or None."""
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
    """Those that have been written whole."""
    lines.seek(0)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub("[^a-z0-9]+", "_", device.lower()).strip("_")


def missing(document: Mapping[str, Any]) -> list[str]:
    """What could not be measured, a line each."""
    lines = [f"{name}: {reason}" for name, reason in document["unfinished"].items()]
    return lines + [
        f"{row['name']}: {row['reason']}" for row in document["rows"] if row["median"] is None
    ]
