"""How far a step raises the resident set of its process beyond a forward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

import zoopt
from zoopt.memory import resident


def beyond_forward(step: Callable[[], Any], forwards: Callable[[int], None]) -> int:
    """The peak of one step less that of one forward pass, in a process that does nothing else."""
    # Whatever compiles or loads on first use does so now, on something small.
    small = torch.nn.Parameter(torch.zeros(1 << 16))
    zoopt.MeZO([small], perturbation="inplace").step(lambda: float(small[0]))
    key: dict[str, Any] = {"seed": 0, "stream": 0, "draw": 0}
    zoopt.kernels.perturb(small, 1e-3, **key)
    rows = torch.zeros(8, dtype=torch.int64)
    zoopt.kernels.perturb_rows(small.view(256, 256), rows, 1e-3, **key)
    forwards(2)
    gc.collect()
    resident.forget_peak()
    forwards(1)
    forward = resident.peak()
    resident.forget_peak()
    step()
    return resident.peak() - forward
