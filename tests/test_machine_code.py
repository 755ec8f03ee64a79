"""What bench/results/sass.json says of every kernel, without compiling any."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from bench.sass import row
from bench.stub_gpu import TARGETS
from bench.variants import Variant, variants
from zoopt.doctor.gpu import bars

ROOT = Path(__file__).parents[1]
FIGURES = runpy.run_path(str(ROOT / "docs" / "tools" / "figures.py"))
ROWS = {
    found["name"]: found
    for found in json.loads((ROOT / "bench" / "results" / "sass.json").read_text())["rows"]
}
NVIDIA = [found for found in ROWS.values() if found["target"].startswith("sm_")]
#: Kernels, or kernels with these moments, that arithmetic bounds on an H100 in some variant: four
#: directions; masks; rounding to float16 by random bits; signs of an update; a product with a
#: gradient's terms; two codes to a byte.
NAMED = {
    *("apply_4", "perturb", "perturb_out", "perturb_scaled", "apply"),
    *("adam_window", "writes_estimate", "descend_sign"),
    *("product_gradient", "product_gradient_batch", "adamw, fp16, int4", "adam, bf16, int4"),
}


def name_of(variant: Variant, target: str) -> str:
    return str(row({**vars(variant), "target": target, "instructions_per_element": 0.0})["name"])


def test_every_variant_is_counted() -> None:
    wanted = {name_of(v, target): v for v in variants() for target in TARGETS}
    assert set(ROWS) == set(wanted), "run: python -m bench.sass --json bench/results/sass.json"
    for name, variant in wanted.items():
        assert ROWS[name]["bytes_per_element"] == variant.bytes_per_element


def test_no_kernel_spills_or_moves_less_than_vectors() -> None:
    assert [found["name"] for found in NVIDIA if found["spills"]] == []
    assert [found["name"] for found in NVIDIA if found["access_bits"] != 128] == []


def test_what_arithmetic_bounds_is_named() -> None:
    """On an H100 at .85 of a copy's speed, by the room that is left for instructions."""
    room = 132 * 128 * 1.7e9 / (0.85 * 3.0e12)

    def bound(found: dict[str, Any]) -> bool:
        return bool(found["executed_per_element"] > room * found["bytes_per_element"])

    passes = (each for each in ROWS.values() if not each["kernel"].startswith("entries"))
    expected = [each["name"] for each in passes if each["target"] == "sm_90" and bound(each)]
    found = FIGURES["bound_by_arithmetic"]("H100")
    assert [each["name"] for each in found] == expected
    for each in found:
        plain = ", ".join((each["kernel"], each["dtype"], each["format"]))
        assert each["kernel"] in NAMED or plain in NAMED, plain
    lines = FIGURES["TABLES"]["arithmetic"]().splitlines()
    assert sum(" of " in cell for line in lines for cell in line.split("|")) == len(expected)


@pytest.mark.parametrize("label", [name for name in bars.ARITHMETIC if name != "add_product_"])
def test_what_is_excused_on_a_gpu_is_bound_by_arithmetic(label: str) -> None:
    """On an H200, whose memory is faster than an H100's; ten directions execute ten times that.

    `add_product_` multiplies matrices besides, which its instructions do not show."""
    found, directions = ROWS[bars.ARITHMETIC[label]], 10 if "10 draws" in label else 1
    room = FIGURES["ROOM"]["H200"] * found["bytes_per_element"]
    assert directions * found["executed_per_element"] > room


@pytest.mark.parametrize(("form", "bytes_"), [("int8", 10), ("int4", 8)])
def test_coded_moments_leave_room_for_a_copys_speed(form: str, bytes_: int) -> None:
    """An H100 executes 10.6 instructions a byte at .9 of a copy's speed."""
    for rounding in ("nearest", "stochastic"):
        found = ROWS[f"adamw, bf16, {form}, {rounding}, sm_90"]
        assert found["bytes_per_element"] == bytes_
        assert found["executed_per_element"] <= 10.6 * (
            bytes_ + 16 / (256 if form == "int8" else 128)
        )
