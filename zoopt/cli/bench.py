"""`zoopt bench`: the programs of `zoopt.bench`, and those of a checkout's bench/ folder."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from zoopt.cli.terminal import CommandError
from zoopt.doctor.machine import ROOT

#: Benchmarks of any installation.
INSTALLED = {
    "memory": "peak memory of one training step, by method",
    "step": "time and memory of one training step, by method",
    "kernels": "time of the fused kernels",
    "compare": "what changed beyond noise between two results",
}
#: Benchmarks that need the repository.
CHECKOUT = {
    "convergence": "zeroth-order methods at one budget of forward passes",
    "pretrain": "first-order methods pre-training at one budget of tokens",
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
    for name, summary in {**INSTALLED, **CHECKOUT}.items():
        # The program parses its own arguments, --help included.
        benchmarks.add_parser(name, prog=f"zoopt bench {name}", help=summary, add_help=False)
    parser.set_defaults(func=run, rest=[])


def run(options: argparse.Namespace) -> int:
    """Run the program with the rest of the arguments; returns its exit status."""
    name = options.benchmark
    module = f"zoopt.bench.{name}"
    if name in CHECKOUT:
        module = f"bench.{name}.command"
        if not (ROOT / "bench" / name / "command.py").is_file():
            raise CommandError(
                f"zoopt bench {name} needs a checkout of the repository, and {str(ROOT)!r} is "
                f"none: clone it, and pip install --editable '.[test]' there"
            )
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"zoopt bench {name} needs {error.name}; pip install 'zoopt-torch[demo]'"
        ) from None
    return int(program.main(options.rest) or 0)
