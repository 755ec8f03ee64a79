"""The resident set of this process: what the system counts, caches and workspaces among it."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from pathlib import Path


def now() -> int:
    """Bytes of this process in memory now."""
    import psutil  # type: ignore[import-untyped]

    gc.collect()
    size: int = psutil.Process().memory_info().rss
    return size


def peak() -> int:
    """The most bytes in memory at one time, since the last `forget_peak` where it can forget."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Begin anew from what is in memory now; only Linux can, where it is allowed."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
