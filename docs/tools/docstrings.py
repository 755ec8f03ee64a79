"""Docstrings of the package as Markdown: examples become code, class names become links."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:\n((?:[ ]{4}.*\n?|\n)+)", re.MULTILINE)


def _code(match: re.Match[str]) -> str:
    lines = textwrap.dedent(match[1]).strip().splitlines()
    code = "\n".join(line[4:] if line[:3] in (">>>", "...") else line for line in lines)
    return f"**Example**\n\n```python\n{code}\n```\n"


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once an object has been read."""
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(_code, obj.docstring.value)
