"""Opens a trajectory's file for one writer, and makes its name last."""

from __future__ import annotations

import os
from pathlib import Path

from zoopt.trajectory.format import TrajectoryError

try:
    import fcntl
except ImportError:  # Windows has no fcntl, and files are not locked there.
    fcntl = None  # type: ignore[assignment]


def locked(path: Path, flags: int) -> int:
    """Open a file for appending, locked against other processes.

    Raises:
        TrajectoryError: another process has locked it.
    """
    file = os.open(path, flags | os.O_APPEND, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise TrajectoryError(
            f"another process writes to {path}; let it end, or record to another file"
        ) from None
    return file


def sync_folder(path: Path) -> None:
    """Sync the file's folder to disk, so that the file's name survives a crash (POSIX only)."""
    if os.name != "posix":
        return
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
