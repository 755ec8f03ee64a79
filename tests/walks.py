"""Follows a call through the package: which files a step leads through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "zoopt"


def called(run: Callable[[], Any]) -> list[CodeType]:
    """The package's functions that a call runs, each once, in the order of their first calls."""
    found: dict[CodeType, None] = {}

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            found.setdefault(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return list(found)


def file_of(code: CodeType) -> str:
    """The file of a function, from the package's folder."""
    return Path(code.co_filename).relative_to(PACKAGE).as_posix()
