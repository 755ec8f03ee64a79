"""The machine and the software, to identify a measurement or a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

#: The folder that holds the package: the checkout, if it is one.
ROOT = Path(__file__).resolve().parent.parent.parent


def identity(device: torch.device) -> dict[str, Any]:
    """The machine and the software of a measurement on the device."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "driver": driver() if cuda else None,
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_average_1_minute": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "numba": version("numba"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit(),
    }


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int | None:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def driver() -> str | None:
    """The NVIDIA driver's version, or None without nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    return _line([tool, "--query-gpu=driver_version", "--format=csv,noheader"])


def commit() -> str | None:
    """The checkout's commit, with "-dirty" after local changes; None for an installed package."""
    if not (ROOT / ".git").exists():
        return None
    return _line(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"])


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(command: Sequence[str]) -> str | None:
    """The first line that a program prints, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)
