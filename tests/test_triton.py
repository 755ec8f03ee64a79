"""The Triton kernels without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot, aot_moments
from bench.sass import report

ROOT = Path(__file__).parents[1]


def test_interpreter() -> None:
    """tests/interpreter passes in a process that interprets Triton kernels."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "tests/interpreter"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("variant", list(aot.variants()), ids=str)
def test_compiles_ahead_of_time(variant: aot.Variant, target: str) -> None:
    """Every kernel, for every target: no spills, and theta moves 128 bits at a time on NVIDIA."""
    counted = report(variant, target)
    assert counted.spills == 0
    if target.startswith("sm") and variant.kernel != "perturb_rows":
        assert counted.access_bits == 128
    if (variant.kernel, variant.dtype, variant.distribution) == ("perturb", "bf16", "normal"):
        assert counted.instructions_per_element <= 28


#: Those that use the most registers: bfloat16 with random bits, and norms.
FIRST_ORDER = [
    variant
    for variant in aot_moments.variants()
    if (variant.dtype, variant.rounding) == ("bf16", "stochastic") or variant.kernel == "adam_norms"
]


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("variant", FIRST_ORDER, ids=str)
def test_first_order_compiles_ahead_of_time(
    variant: aot_moments.FirstOrderVariant, target: str
) -> None:
    """No spills; theta, gradient and moments move 128 bits at a time, but for int4's 64."""
    counted = report(variant, target)
    assert counted.spills == 0
    if target.startswith("sm") and variant.format != "int4":
        assert counted.access_bits == 128
