"""What mkdocs does besides: figures from bench/results, their charts, docstrings as Markdown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_TOOLS = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("figures", _TOOLS / "figures.py")
assert _spec is not None
assert _spec.loader is not None
figures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(figures)


def on_files(files: Files, config: Any) -> Files:
    """Add the charts, as figures/NAME.png."""
    for chart in sorted(figures.RESULTS.rglob("*.png")):
        files.append(
            File.generated(config, f"figures/{chart.name}", abs_src_path=str(chart.resolve()))
        )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put each table after the line that asks for it."""
    return str(figures.MARKER.sub(lambda m: figures.render(m[0]), markdown))
