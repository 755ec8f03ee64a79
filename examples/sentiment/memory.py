"""Peak memory of inference, MeZO and AdamW on one batch, each in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from .errors import InputError
from .model import Batch, Classifier
from .training import make_optimizer, step

METHODS = ("inference", "mezo", "adamw")
STEPS = 2
MARKER = "MEASURED "
MIB = 2**20
# glibc then gives freed tensors back at once, so that what is resident is what is in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
DESCRIPTION = (
    "peak_mib: size of the weights, plus the rise of resident memory above its level before the "
    f"first of {STEPS} steps on one batch to its highest during them; process_peak_mib: highest "
    "resident memory of the whole process in that time, with Python and its libraries; each "
    "method has its own process with the same weights, dtype and batch, and freed memory is "
    "returned to the system at once (glibc, MALLOC_MMAP_THRESHOLD_=65536)"
)


def resident_mib() -> float:
    """Resident memory of this process now."""
    return float(psutil.Process().memory_info().rss) / MIB


def reset_peak() -> bool:
    """Forget the peak so far; False where the system offers no way to."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float:
    """Highest resident memory of this process, since the last reset where one is possible."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (MIB if sys.platform == "darwin" else 1024)


def _return_free_memory() -> None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def _own_weights(model: torch.nn.Module) -> None:
    """Copy the weights out of the mapped file.

    Mapped pages count as resident only once they are read, which would charge the loading to the
    method measured.
    """
    with torch.no_grad():
        for param in model.parameters():
            param.data = param.data.clone()


def warm_up(classifier: Classifier, batch: Batch) -> None:
    """Load what a first step loads whatever the method: compiled kernels and thread pools."""
    with torch.no_grad():
        classifier.loss(Batch(batch.input_ids[:1, :2], batch.last[:1] * 0, batch.positive[:1]))
    for dtype in {param.dtype for _, param in classifier.trainable()}:
        weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
        optimizer: Any = make_optimizer("mezo", [("weight", weight)])
        optimizer.step(lambda weight=weight: (weight @ weight).float().mean())


def measure(method: str, load: Callable[[], tuple[Classifier, Batch]]) -> dict[str, Any]:
    """Load the classifier, do a few steps of ``method`` and return the figures, in MiB."""
    classifier, batch = load()
    _own_weights(classifier.model)
    warm_up(classifier, batch)
    _return_free_memory()
    before = resident_mib()
    was_reset = reset_peak()
    if method == "inference":
        with torch.no_grad():
            for _ in range(STEPS):
                float(classifier.loss(batch))
    else:
        optimizer = make_optimizer(method, classifier.trainable())
        for _ in range(STEPS):
            step(optimizer, classifier, batch)
    peak = peak_mib()
    weights = sum(p.numel() * p.element_size() for p in classifier.model.parameters()) / MIB
    return {
        "method": method,
        "peak_mib": round(weights + peak - before, 1),
        "weights_mib": round(weights, 1),
        "process_peak_mib": round(peak, 1),
        "peak_excludes_loading": was_reset,
        "batch_shape": list(batch.input_ids.shape),
    }


def print_measurement(figures: dict[str, Any]) -> None:
    """Hand the figures to the parent process."""
    print(MARKER + json.dumps(figures), flush=True)


def measure_all(
    command: Sequence[str], *, seconds_each: float, deadline: float = math.inf
) -> dict[str, Any]:
    """Run ``command --measure METHOD`` for each method and collect the figures.

    Args:
        command: the run's own command line.
        seconds_each: how long the first method will take at least.
        deadline: of ``time.perf_counter``; methods that would end later are named in ``left_out``.
    """
    results: dict[str, Any] = {"what": DESCRIPTION, "left_out": []}
    for number, method in enumerate(METHODS):
        started = time.perf_counter()
        left = deadline - started
        done = None
        if left > seconds_each:
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(
                    [*command, "--measure", method],
                    env={**os.environ, **ENVIRONMENT},
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=None if left == math.inf else left,
                )
        if done is None:
            # The others take longer still.
            results["left_out"] = list(METHODS[number:])
            break
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
        if done.returncode != 0 or not lines:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(
                f"measuring the memory of {method} failed with status {done.returncode} ({last}); "
                "leave it out with --no-memory"
            )
        results[method] = json.loads(lines[-1][len(MARKER) :])
        seconds_each = time.perf_counter() - started
    return results
