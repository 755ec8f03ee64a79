"""`zoopt bench`: the programs of the checkout's bench/ folder."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from zoopt.cli.terminal import CommandError
from zoopt.doctor.machine import ROOT

BENCHMARKS = {
    "memory": "peak memory of one training step, by method",
    "step": "time and memory of one training step, by method",
    "kernels": "time of the fused kernels, or their instructions",
    "convergence": "zeroth-order methods at one budget of forward passes",
    "pretrain": "first-order methods pre-training at one budget of tokens",
    "compare": "what changed beyond noise between two results",
}
DESCRIPTION = """\
Run a benchmark. All write the same JSON (--json FILE, - for standard output), with the machine's
identity, and draw a chart (--plot FILE.png). `zoopt bench BENCHMARK --help` tells more of each."""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        prog="zoopt bench",
        help="benchmarks, and their comparison",
        description=DESCRIPTION,
        example="zoopt bench step --model gpt2 --optimizers MeZO AdamW --json step.json",
    )
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", dest="benchmark", required=True)
    for name, summary in BENCHMARKS.items():
        # Its arguments and its --help belong to the program.
        benchmarks.add_parser(name, prog=f"zoopt bench {name}", help=summary, add_help=False)
    parser.set_defaults(func=run, rest=[])


def run(options: argparse.Namespace) -> int:
    """Run the program with the rest of the arguments; returns its exit status."""
    name = options.benchmark
    if not (ROOT / "bench" / "common.py").is_file():
        raise CommandError(
            f"zoopt bench needs a checkout of the repository, and {str(ROOT)!r} is none: "
            f"clone it, and pip install --editable '.[test]' there"
        )
    if not (ROOT / "bench" / f"{name}.py").is_file():
        raise CommandError(f"this checkout has no bench/{name}.py; update it")
    if str(ROOT) not in sys.path:
        # Programs import each other, and float64 references of the tests, by their full names.
        sys.path.insert(0, str(ROOT))
    try:
        program = importlib.import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        raise CommandError(
            f"zoopt bench {name} needs {error.name}; pip install 'zoopt-torch[demo]'"
        ) from None
    return int(program.main(options.rest) or 0)
