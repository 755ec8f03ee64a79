"""Opens a trajectory's file for one writer, and makes it and its name last."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from zoopt.trajectory.format import TrajectoryError

try:
    import fcntl
except ImportError:  # Windows has no fcntl, and files are not locked there.
    fcntl = None  # type: ignore[assignment]

#: What a file system answers that has no locks, or nothing to sync.
_HELD = (errno.EAGAIN, errno.EACCES)
_NOTHING_TO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def locked(path: Path, flags: int) -> int:
    """Open a file for appending, locked against other processes where the file system has locks.

    Raises:
        TrajectoryError: another process has locked it.
    """
    file = os.open(path, flags | os.O_APPEND, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            os.close(file)
            raise TrajectoryError(
                f"another process writes to {path}; let it end, or record to another file"
            ) from None
    return file


def sync(file: int) -> None:
    """Force what was written to the disk, if the file system can."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _NOTHING_TO_SYNC:
            raise


def sync_folder(path: Path) -> None:
    """Sync the file's folder to disk, so that the file's name survives a crash (POSIX only)."""
    if os.name != "posix":
        return
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        sync(folder)
    finally:
        os.close(folder)
