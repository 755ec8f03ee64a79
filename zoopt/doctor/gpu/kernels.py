"""The kernels' bandwidth as a share of that of a copy."""

from __future__ import annotations

import argparse

import torch

from zoopt.bench import kernels
from zoopt.doctor.gpu import rows
from zoopt.doctor.gpu.rows import Emit
from zoopt.doctor.gpu.scale import Scale

SECTION = "kernels"
DTYPES = ("bfloat16", "float32")


def measure(scale: Scale, device: torch.device, emit: Emit) -> None:
    """Emit a row of `zoopt bench kernels` for each kernel and dtype."""
    options = argparse.Namespace(numel=scale.numel, repeats=scale.repeats)
    for dtype in DTYPES:
        for row in kernels.measure(dtype, device, options):
            label = row["name"].removesuffix(f", {dtype}")
            emit({**row, "section": SECTION, "setting": dtype, "method": label})
        rows.forget(device)
