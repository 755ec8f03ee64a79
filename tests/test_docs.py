"""The documentation builds, fetches nothing from elsewhere, and shows the measured figures."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from zoopt import registry

ROOT = Path(__file__).resolve().parent.parent
#: What a browser would fetch by itself: not links, which a reader follows.
FETCHED = re.compile(r"""(?:\bsrc=["']?|<link[^>]*\bhref=["']?|url\(["']?|@import )(https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built as by `make docs`; or what `make test` has just built."""
    if "ZOOPT_TEST_SITE" in os.environ:
        return ROOT / os.environ["ZOOPT_TEST_SITE"]
    path = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 40
    found = {page.name: FETCHED.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert not {name: urls for name, urls in found.items() if urls}


def test_pages_hold_transcription_figures_and_arguments(site: Path) -> None:
    page = (site / "optimizers" / "mezo.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "class MeZO64:" in text
    assert "test cross-entropy" in text
    assert "max_projected_grad" in text
    # Every table that a page asks for follows its marker.
    assert page.count("<!-- figures:") == len(re.findall(r"<!-- figures: .*? -->\s*<table>", page))


@pytest.mark.parametrize("row", registry.rows(), ids=lambda row: row.name)
def test_every_optimizer_has_a_page_that_tells_what_a_user_asks(row: registry.Row) -> None:
    text = (ROOT / row.page).read_text(encoding="utf-8")
    for heading in ("When to use it", "The update", "Settings that work", "Pitfalls"):
        assert f"\n## {heading}\n" in text
    assert "\n## What differs\n" in text
    assert f"\n::: zoopt.{row.cls.__name__}\n" in text


@pytest.mark.parametrize(
    "path",
    sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")}),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_code_on_a_page_is_python(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        compile(block, str(path), "exec")


def test_files_that_pages_name_are_there() -> None:
    missing = []
    for page in {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "CHANGELOG.md"}:
        for name in re.findall(r"`([\w./]+\.(?:py|json))`", page.read_text(encoding="utf-8")):
            found = [
                ROOT / folder / name for folder in ("", "zoopt", "zoopt/first_order/projected")
            ]
            if "/" in name and not any(path.exists() for path in found):
                missing.append((page.name, name))
    assert missing == []


def test_readme_has_the_measured_figures() -> None:
    figures = runpy.run_path(str(ROOT / "docs" / "tools" / "figures.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert figures["FILLED"].search(text)
    assert figures["filled"](text) == text, "run: python docs/tools/figures.py README.md"


def test_readme_lists_the_optimizers_of_the_registry() -> None:
    methods = runpy.run_path(str(ROOT / "docs" / "tools" / "methods.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert methods["FILLED"].search(text)
    assert methods["filled"](text) == text, "run: python docs/tools/methods.py README.md"


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []
