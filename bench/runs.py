"""Results of runs on disk: a file for each run in a folder, or a line in the folder's archive.

An interrupted comparison continues with the missing runs. `pack` moves the files into one
compressed file beside the folder, runs.jsonl.xz, which is committed. Both are read.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class Run(Protocol):
    """A method at a learning rate, a seed and a budget; equal runs are the same run."""

    @property
    def method(self) -> str:
        """The method's name."""

    @property
    def file(self) -> str:
        """The name of its result file, ending in .json."""

    def __hash__(self) -> int: ...


R = TypeVar("R", bound=Run)


def config_hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def load(path: Path) -> dict[str, Any] | None:
    """The result in the file, or None if it is missing or incomplete."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def archive(folder: Path) -> Path:
    """The compressed file of a folder of runs."""
    return folder.with_name(f"{folder.name}.jsonl.xz")


def unpack(path: Path) -> dict[str, dict[str, Any]]:
    """Results by the names of their original files; empty if there is no archive."""
    if not path.exists():
        return {}
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return dict(map(json.loads, lines))


def pack(folder: Path) -> int:
    """Move the folder's results into its archive; returns how many the archive holds."""
    files = sorted(folder.glob("*.json"))
    results = unpack(archive(folder))
    results |= {path.name: result for path in files if (result := load(path)) is not None}
    draft = archive(folder).with_suffix(".draft")
    with lzma.open(draft, "wt", encoding="utf-8", preset=9) as lines:
        for item in sorted(results.items()):
            lines.write(json.dumps(item) + "\n")
    draft.replace(archive(folder))
    for path in files:
        path.unlink()
    return len(results)


def store(result: Mapping[str, Any], path: Path) -> None:
    """Write the result atomically: an interruption leaves no partial file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(finite(result), indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def finite(value: Any) -> Any:
    """The value, with None instead of numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Store(Generic[R]):
    """The results of finished runs, each read once: files in a folder, or lines of its archive.

    Args:
        folder: where the files are; the archive is beside it.
        configuration: run -> everything that its figures depend on.
    """

    def __init__(self, folder: Path, configuration: Callable[[R], Mapping[str, Any]]) -> None:
        self.folder = folder
        self._configuration = configuration
        self._packed = unpack(archive(folder))
        self._found: dict[R, Mapping[str, Any]] = {}

    def __call__(self, run: R) -> Mapping[str, Any] | None:
        if run not in self._found:
            wanted = config_hash(self._configuration(run))
            for result in (load(self.folder / run.file), self._packed.get(run.file)):
                if result is not None and result.get("config_hash") == wanted:
                    self._found[run] = result
                    break
        return self._found.get(run)
