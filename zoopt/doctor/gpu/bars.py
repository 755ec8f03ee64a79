"""What the package promises on a GPU, as ratios within one run, compared with the measurements."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoopt.bench.common import Row
from zoopt.bench.methods import INFERENCE, PUBLISHED
from zoopt.doctor.gpu import checks, first_order, kernels, zeroth_order
from zoopt.doctor.gpu.rows import find, of_section
from zoopt.doctor.machine import ROOT

MIB = 1 << 20
#: Limits as multiples of two forward passes, at each setting of a scale.
FORWARDS: Mapping[str, tuple[float | None, float | None, float | None]] = {
    zeroth_order.IN_PLACE: (1.12, 1.30, 1.08),
    zeroth_order.VIRTUAL: (1.20, 1.60, 1.12),
    "LOZO": (1.10, None, None),
    "ZOAdam, window": (1.25, None, None),
}
#: Limits as multiples of torch's fused AdamW.
FUSED_ADAMW = {
    "zoopt.AdamW, int8 state": 0.75,
    "zoopt.AdamW, bfloat16 state": 1.1,
    "SM3": 0.6,
    "Apollo": 1.3,
    "Fira": 2.0,
}
#: Limits as multiples of the floor of a GaLore step.
GALORE = {first_order.NEAREST: 1.2, "GaLoreAdamW": 1.4}
LARGE_BYTES, LARGE_STEP, IN_BACKWARD, OF_COPY = MIB, 1.1, 1.1, 0.85
#: Kernels that are bound by arithmetic: the start of the label, and the row in a checkout's
#: bench/results/sass.json with the instructions executed per element (in the loops: also per
#: direction). While an H100 moves four bytes, it can execute about 44 of them, an H200 about 32.
ARITHMETIC = {
    "apply_ 1 draw, stochastic normal": "apply, bf16, normal, stochastic, sm_90",
    "apply_ 10 draws normal": "apply, bf16, normal, nearest, sm_90",
    "apply_ 10 draws rademacher": "apply, bf16, rademacher, nearest, sm_90",
    "adam_window_ 10 draws normal": "adam_window, bf16, normal, nearest, sm_90",
    "adam_window_ 10 draws rademacher": "adam_window, bf16, rademacher, nearest, sm_90",
    "add_product_": "product, bf16, stochastic, sm_90",
}
#: Labels of kernels that are not ours, or are not a pass over memory.
OTHERS = ("copy_", "mul_", "published", "torch's", "addmm_")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A promise and its measurement.

    Attributes:
        promise: what is promised.
        figure: the measured value; None if it was not measured.
        limit: the greatest allowed value; for a share, the smallest.
        holds: whether the promise is kept; None if it was not measured.
        note: further information.
    """

    promise: str
    figure: float | None
    limit: float
    holds: bool | None
    note: str = ""


def judge(document: Mapping[str, Any]) -> list[Bar]:
    """Compare every promise with the document's figures."""
    rows: Sequence[Row] = document["rows"]
    names = [
        f"{setting['batch']} x {setting['seq']} {setting['dtype']}"
        for setting in document["scale"]["settings"]
    ]
    return [
        *_tests(rows),
        *_forwards(rows, names),
        *_published(rows, names),
        *_large(rows),
        *_first_order(rows),
        *_in_backward(rows),
        _kernels(rows),
    ]


def _at_most(promise: str, figure: float | None, limit: float, note: str = "") -> Bar:
    holds = None if figure is None else figure <= limit
    return Bar(promise, figure, limit, holds, note)


def _ratio(
    rows: Sequence[Row], setting: str, method: str, to: str, unit: str = "ms"
) -> float | None:
    """The ratio by rounds if the row has one to this method, otherwise the ratio of the medians."""
    own, other = find(rows, setting, method, unit), find(rows, setting, to, unit)
    if own is None or other is None:
        return None
    if own["ratio"] is not None and to in (INFERENCE, first_order.REFERENCE):
        return float(own["ratio"])
    return float(own["median"] / other["median"])


def _tests(rows: Sequence[Row]) -> Iterator[Bar]:
    for section in (checks.SELF_TESTS, checks.TESTS):
        row = find(rows, section, checks.FAILURES, checks.UNIT)
        failures = None if row is None else row["median"]
        note = ""
        if row is not None:
            note = f"{row['passed']} passed" + ("" if row["finished"] else ", then stopped")
            if row["failed"]:
                note += f"; {row['failed'][0]}"
            elif not row["finished"]:
                failures = None
        yield _at_most(f"{section}: no failure", failures, 0, note)


def _forwards(rows: Sequence[Row], names: Sequence[str]) -> Iterator[Bar]:
    for method, limits in FORWARDS.items():
        for setting, limit in zip(names, limits, strict=True):
            if limit is not None:
                ratio = _ratio(rows, setting, method, INFERENCE)
                yield _at_most(f"{setting}: {method} of two forward passes", ratio, limit)


def _published(rows: Sequence[Row], names: Sequence[str]) -> Iterator[Bar]:
    """The slowest of our methods, as a multiple of the published MeZO."""
    for setting in names:
        ratios = {m: _ratio(rows, setting, m, PUBLISHED) for m in zeroth_order.OURS}
        known = {m: ratio for m, ratio in ratios.items() if ratio is not None}
        slowest = max(known, key=known.__getitem__) if len(known) == len(ratios) else None
        yield _at_most(
            f"{setting}: every method of published MeZO",
            None if slowest is None else known[slowest],
            1.0,
            "" if slowest is None else f"slowest: {slowest}",
        )


def _large(rows: Sequence[Row]) -> Iterator[Bar]:
    peaks = [find(rows, "large", m, "bytes") for m in (INFERENCE, zeroth_order.IN_PLACE)]
    beyond = None
    if peaks[0] is not None and peaks[1] is not None:
        beyond = peaks[1]["median"] - peaks[0]["median"]
    yield _at_most("large model: bytes of MeZO in place beyond inference", beyond, LARGE_BYTES)
    times = [
        find(rows, "large", m, "ms")
        for m in (zeroth_order.IN_PLACE, INFERENCE, zeroth_order.PASSES)
    ]
    figure = None
    if all(row is not None for row in times):
        step, forwards, passes = (row["median"] for row in times if row is not None)
        figure = step / (forwards + passes)
    yield _at_most("large model: step of two forwards and three passes", figure, LARGE_STEP)


def _first_order(rows: Sequence[Row]) -> Iterator[Bar]:
    for method, limit in FUSED_ADAMW.items():
        ratio = _ratio(rows, first_order.SETTING, method, first_order.REFERENCE)
        yield _at_most(f"{method} of torch's fused AdamW", ratio, limit)
    for method, limit in GALORE.items():
        ratio = _ratio(rows, first_order.SETTING, method, first_order.FLOOR)
        yield _at_most(f"{method} of GaLore's floor", ratio, limit)


def _in_backward(rows: Sequence[Row]) -> Iterator[Bar]:
    for method in first_order.FUSED_METHODS:
        ratio = _ratio(rows, method, first_order.IN_BACKWARD, first_order.UNFUSED)
        yield _at_most(f"{method}: fused backward of all unfused", ratio, IN_BACKWARD)


def _kernels(rows: Sequence[Row]) -> Bar:
    """The slowest memory-bound kernel. The note names slow kernels that are bound by arithmetic."""
    shares: dict[str, float] = {}
    excused = []
    counts = instructions()
    for row in of_section(rows, kernels.SECTION):
        share = row.get("fraction_of_copy_bandwidth")
        if share is None or row["method"].startswith(OTHERS):
            continue
        bound = [name for start, name in ARITHMETIC.items() if row["method"].startswith(start)]
        if bound and share < OF_COPY:
            excused.append(f"{row['name']} {share:.2f} ({counts.get(bound[0], 'uncounted')})")
        else:
            shares[row["name"]] = share
    promise = "kernels' share of copy bandwidth, the least"
    if not shares:
        return Bar(promise, None, OF_COPY, None)
    least = min(shares, key=shares.__getitem__)
    below = sorted(name for name, share in shares.items() if share < OF_COPY)
    note = f"{len(below)} below: {'; '.join(below)}" if below else least
    if excused:
        note += f". Bounded by arithmetic: {'; '.join(excused)}"
    return Bar(promise, shares[least], OF_COPY, not below, note)


def instructions() -> dict[str, str]:
    """Executed instructions, by kernel, from a checkout's results; empty without a checkout."""
    path = ROOT / "bench" / "results" / "sass.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    counts = {row["name"]: row["executed_per_element"] for row in rows}
    return {
        name: f"{count:.0f} instructions an element"
        for name, count in counts.items()
        if count is not None
    }
