"""The wheel: what is in it works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoopt.doctor.machine import ROOT

SOURCES = ("zoopt", "pyproject.toml", "README.md", "LICENSE")
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


def run(*command: str, folder: Path, **environment: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds an installation of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    run(*pip, *build, folder=source)
    [wheel] = folder.glob("*.whl")
    target = folder / "installed"
    run(
        *pip,
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
        folder=folder,
    )
    return target


def test_a_step_is_measured_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    options = ["--batch", "1", "--seq", "8", "--repeats", "1", "--threads", "1"]
    methods = ["mezo-in-place", "mezo-published", "adamw-checkpointed"]
    text = run(
        *(str(installed / "bin" / "zoopt"), "bench", "step", "--model", "config.json"),
        *(*options, "--optimizers", *methods, "--json", "-"),
        folder=tmp_path,
        PYTHONPATH=str(installed),
    )
    result = json.loads(text)
    assert result["machine"]["commit"] is None  # an installation, not the checkout
    seconds = {row["name"]: row["median"] for row in result["rows"] if row["unit"] == "s"}
    assert len(seconds) == 1 + len(methods)
    assert all(value > 0 for value in seconds.values())


def test_the_wheel_has_the_package_and_nothing_else(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names <= {"zoopt", "bin", "__pycache__"}
    assert (installed / "zoopt" / "py.typed").exists()
    sources = {path.relative_to(ROOT) for path in (ROOT / "zoopt").rglob("*.py")}
    assert {path.relative_to(installed) for path in (installed / "zoopt").rglob("*.py")} == sources
