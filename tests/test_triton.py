"""The Triton kernels without a GPU, interpreted. `tests/launch` launches and compiles them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.name for path in (ROOT / "tests" / "interpreter").glob("test_*.py"))
#: The files that take longest have a process each.
LONG = ("test_steps.py", "test_writes.py", "test_triton.py")
PARTS = [[name] for name in LONG] + [[name for name in FILES if name not in LONG]]


@pytest.mark.parametrize("files", PARTS, ids=lambda files: files[0])
def test_interpreter(files: list[str]) -> None:
    """tests/interpreter passes in processes that interpret Triton kernels."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider"]
    paths = [f"tests/interpreter/{name}" for name in files]
    command = [sys.executable, "-m", "pytest", *options, *paths]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout)
