"""The command line, `zoopt`: each module here that has `add_parser` is a command."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

import zoopt
from zoopt.cli.terminal import CommandError, Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status.

    0: success. 1: a check failed. 2: the request was wrong.
    """
    if argv is None and sys.argv[1:2] == ["bench"] and "OMP_WAIT_POLICY" not in os.environ:
        # torch has been imported, so OpenMP has read its settings: start the program again with
        # ours.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    try:
        parser = _parser()
        options, rest = parser.parse_known_args(argv)
        # A command that passes its arguments on to another parser sets `rest`.
        if hasattr(options, "rest"):
            options.rest = rest
        elif rest:
            raise CommandError(f"unknown arguments {' '.join(rest)}; see {parser.prog} --help")
        status: int = options.func(options)
        sys.stdout.flush()
        return status
    except CommandError as error:
        sys.stderr.write(f"zoopt: error: {error}\n")
        return 2
    except BrokenPipeError:
        # The reader has closed the pipe. Python's flush at exit must not fail because of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    parser = Parser(
        "zoopt",
        "Memory-efficient optimizers for PyTorch: plans, measurements and self-tests.",
        "zoopt doctor",
    )
    parser.add_argument(
        "--version", action="version", version=f"zoopt {zoopt.__version__}", help="and exit"
    )
    commands: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        metavar="COMMAND", required=True, parser_class=Parser
    )
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "add_parser"):
            module.add_parser(commands)
    return parser
