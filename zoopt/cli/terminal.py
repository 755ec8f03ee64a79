"""Shared by the commands: a parser with short errors and examples, a console, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: The width of output that is not a terminal: enough for every table.
WIDTH = 160
STDOUT = Path("-")


class CommandError(Exception):
    """A request that cannot be met; the message is one line, with a remedy."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks, and shows defaults other than None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with an example. Errors take one line and exit with status 2.

    Args:
        prog: the command, for example "zoopt doctor".
        description: what it does; its lines are kept.
        example: an example call.
    """

    def __init__(self, prog: str, description: str = "", example: str = "", **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=_Formatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with the message on one line."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def fraction(text: str) -> float:
    """A number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {text!r}")
    return value


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json FILE`; - is standard output."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the results here; - for stdout"
    )


def open_console(json_path: Path | None) -> Console:
    """A console on standard output, or on standard error if JSON goes to standard output.

    Raises:
        CommandError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError:
        raise CommandError("the command line needs rich; pip install 'zoopt-torch[cli]'") from None
    stream = sys.stderr if json_path == STDOUT else sys.stdout
    return Console(
        file=stream, width=None if stream.isatty() else WIDTH, highlight=False, soft_wrap=False
    )


def styled(text: str, style: str) -> Text:
    """The text in one of rich's styles, if the output is a terminal."""
    from rich.text import Text

    return Text(text, style)


def print_table(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str | Text]]
) -> None:
    """A table without lines, under its title; strings are printed as they are."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(table)
    console.print()


def write_json(path: Path | None, content: Any) -> None:
    """Write the content as JSON; - is standard output, and None writes nothing.

    Raises:
        CommandError: the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(content, indent=2) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise CommandError(
            f"--json: cannot write {str(path)!r}: {error.strerror}; name a file in a folder that "
            f"exists, or - for standard output"
        ) from None
