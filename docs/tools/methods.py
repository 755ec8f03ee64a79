"""Tables of the optimizers, made from the registry.

README.md is read without a build, so it contains its table, between the lines `<!-- methods -->`
and `<!-- end of methods -->`. This command writes the table:

    python docs/tools/methods.py README.md

A test checks that it is up to date. The site's tables are made when the site is built.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

from zoopt import registry

#: For each family: what it is called in tables, and the memory of its methods.
FAMILIES: dict[registry.Family, tuple[str, str]] = {
    "zeroth-order": ("forward passes only", "next to none"),
    "low-rank": ("low-rank projection", "a rank-r part of Adam's"),
    "compact": ("compact state", "moments in 16, 8 or 4 bits; or next to none (`SM3`)"),
}
FILLED = re.compile(r"^<!-- methods -->$.*?^<!-- end of methods -->$", re.MULTILINE | re.DOTALL)


def overview() -> str:
    """Every optimizer by family, with links to their pages from the checkout's root."""
    lines = ["| family | classes | memory beyond inference |", "| --- | --- | --- |"]
    for family in get_args(registry.Family):
        title, memory = FAMILIES[family]
        links = [f"[`{row.cls.__name__}`]({row.page})" for row in registry.rows(family)]
        lines.append(f"| {title} | {', '.join(links)} | {memory} |")
    return "\n".join(lines)


def listing(family: registry.Family) -> str:
    """A family's optimizers, one a row, with links to their pages from the page beside them."""
    lines = ["| name | class | in one line |", "| --- | --- | --- |"]
    for row in registry.rows(family):
        lines.append(
            f"| [`{row.name}`]({row.name}.md) | `zoopt.{row.cls.__name__}` | {row.summary} |"
        )
    return "\n".join(lines)


def filled(text: str) -> str:
    """A page with the table between its markers written from the registry."""
    return FILLED.sub(f"<!-- methods -->\n{overview()}\n<!-- end of methods -->", text)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(filled(path.read_text()))
