"""`zoopt doctor --gpu`: the package's promises, and what is measured on this GPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from zoopt.cli.terminal import CommandError, open_console, print_table, styled, write_json

#: The time limit, in seconds.
SECONDS = 480
#: Without these packages it would fail at the end, or measure nothing.
NEEDED = ("matplotlib", "rich", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--gpu` and its options."""
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="measure kernels, steps and memory on the GPU, and compare them with what the package "
        "promises; writes gpu_DEVICE.json and .png",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="with --gpu: time limit of all of it"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="with --gpu: for the two files"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with --gpu: the same on the CPU with tiny models; its figures mean nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Print each promise with its figure; returns 1 if one is not kept or not measured."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"--gpu needs {package}; pip install 'zoopt-torch[demo]'")
    from zoopt.doctor.gpu import report
    from zoopt.doctor.gpu.scale import FULL, TINY
    from zoopt.doctor.gpu.sections import SECTIONS

    if not (options.dry_run or torch.cuda.is_available()):
        parts = ", ".join(f"{name} ({part.summary})" for name, part in SECTIONS.items())
        raise CommandError(
            f"--gpu needs a GPU, and torch {torch.__version__} sees none; with one it would run "
            f"{parts}, within {options.seconds:g} s. --dry-run does it on the CPU with tiny models"
        )
    if not (options.output.is_dir() and os.access(options.output, os.W_OK)):
        raise CommandError(f"--output: cannot write to the folder {str(options.output)!r}")
    console = open_console(options.json)
    scale, device = (TINY, "cpu") if options.dry_run else (FULL, "cuda")
    with console.status("beginning") as status:

        def progress(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text, markup=False)

        document, path = report.run(
            scale, torch.device(device), options.seconds, options.output, progress=progress
        )
    print_table(
        console,
        f"Steps on {document['machine']['device']}",
        ("what", "median", "unit", "ratio"),
        [_line(row) for row in document["rows"] if row["median"] is not None],
    )
    for line in report.missing(document):
        console.print(f"not measured: {line}", markup=False)
    bars = document["bars"]
    print_table(
        console,
        "Promises",
        ("promise", "figure", "limit", "", "note"),
        [_bar(bar) for bar in bars],
    )
    console.print(f"written: {path} and {path.with_suffix('.png')}", markup=False)
    write_json(options.json, document)
    kept = sum(bar["holds"] is True for bar in bars)
    unknown = sum(bar["holds"] is None for bar in bars)
    console.print(
        f"{kept} of {len(bars)} promises are kept, {unknown} were not measured"
        + ("; a dry run, whose figures mean nothing" if options.dry_run else "")
    )
    if options.dry_run:
        return 1 if document["unfinished"] or unknown else 0
    return 0 if kept == len(bars) else 1


def _line(row: dict[str, Any]) -> list[str]:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
    return [row["name"], f"{row['median']:.4g}", row["unit"], ratio]


def _bar(bar: dict[str, Any]) -> list[Any]:
    verdict = {
        True: styled("holds", "green"),
        False: styled("FAILS", "bold red"),
        None: styled("not measured", "yellow"),
    }[bar["holds"]]
    figure = "" if bar["figure"] is None else f"{bar['figure']:.3g}"
    return [bar["promise"], figure, f"{bar['limit']:.3g}", verdict, bar["note"]]
