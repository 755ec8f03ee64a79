"""Additions when mkdocs builds: the registry's pages, measured figures, charts, the CLI's help."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from zoopt import cli, registry


def _tool(name: str) -> Any:
    """A module beside this one; mkdocs does not put their folder on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures, methods = _tool("figures"), _tool("methods")

_REGISTRY = re.compile(r"^<!-- registry: ([\w-]+) -->$", re.MULTILINE)

_HELP = re.compile(r"^<!-- help: ([\w ]+) -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Put the pages of a family where the menu says `registry FAMILY`."""
    for entry in config.nav:
        for title, target in entry.items() if isinstance(entry, dict) else ():
            if isinstance(target, str) and target.startswith("registry "):
                rows = registry.rows(target.removeprefix("registry "))
                entry[title] = [f"optimizers/{row.name}.md" for row in rows]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the charts, as figures/NAME.png."""
    for chart in sorted(figures.RESULTS.rglob("*.png")):
        files.append(
            File.generated(config, f"figures/{chart.name}", abs_src_path=str(chart.resolve()))
        )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put each table after the line that asks for it."""
    markdown = _REGISTRY.sub(lambda m: f"{m[0]}\n\n{methods.listing(m[1])}", markdown)
    markdown = _HELP.sub(lambda m: f"{m[0]}\n\n```text\n{_help(m[1])}```\n", markdown)
    return str(figures.MARKER.sub(lambda m: figures.render(m[0]), markdown))


def _help(command: str) -> str:
    """What `zoopt COMMAND --help` prints."""
    os.environ["COLUMNS"] = "92"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    return printed.getvalue()
