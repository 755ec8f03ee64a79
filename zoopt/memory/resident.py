"""The resident set of this process, as the system counts it: caches and workspaces included."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import zoopt


def now() -> int:
    """Bytes of this process in memory now."""
    import psutil  # type: ignore[import-untyped]

    gc.collect()
    size: int = psutil.Process().memory_info().rss
    return size


def peak() -> int:
    """The most bytes in memory at one time, since the last `forget_peak` if that is supported."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Start a new peak at the present size. Linux only, and only where it is permitted."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def beyond_forward(step: Callable[[], Any], forwards: Callable[[int], None]) -> int:
    """The peak of one step minus that of one forward pass, in a process that does nothing else."""
    # Let everything that compiles or loads on first use do so now, on something small.
    small = torch.nn.Parameter(torch.zeros(1 << 16))
    zoopt.MeZO([small], perturbation="inplace").step(lambda: float(small[0]))
    key: dict[str, Any] = {"key": zoopt.kernels.NoiseKey(0, 0), "draw": 0}
    zoopt.kernels.perturb(small, 1e-3, **key)
    rows = torch.zeros(8, dtype=torch.int64)
    zoopt.kernels.perturb_rows(small.view(256, 256), rows, 1e-3, **key)
    forwards(2)
    gc.collect()
    forget_peak()
    forwards(1)
    forward = peak()
    forget_peak()
    step()
    return peak() - forward
