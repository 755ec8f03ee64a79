"""`zoopt doctor --gpu` without a GPU: the same work on tiny models, and what is made of figures."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from zoopt.bench.common import Row
from zoopt.bench.methods import INFERENCE, PUBLISHED
from zoopt.cli import doctor_gpu, main
from zoopt.doctor import machine
from zoopt.doctor.gpu import bars, checks, first_order, kernels, report, rows, zeroth_order
from zoopt.doctor.gpu.scale import FULL, TINY
from zoopt.doctor.gpu.sections import SECTIONS

CPU = torch.device("cpu")
MEASURED = [name for name in SECTIONS if name not in (checks.SELF_TESTS, checks.TESTS)]


@pytest.fixture(scope="module")
def tiny() -> list[Row]:
    """The rows of every section that measures, on the CPU."""
    found: list[Row] = []
    for name in MEASURED:
        SECTIONS[name].measure(TINY, CPU, found.append)
    return found


def document(found: list[Row], scale: Any = TINY) -> dict[str, Any]:
    return {"rows": found, "scale": dataclasses.asdict(scale), "unfinished": {}}


def test_every_section_measures_what_it_says(tiny: list[Row]) -> None:
    failed = {row["name"]: row["reason"] for row in tiny if row["median"] is None}
    # torchao compiles its steps with what a test's process forbids; it is not ours to mend.
    assert failed.keys() <= {"step: AdamW, int8 state (torchao)"}, failed
    names = [(row["name"], row["unit"]) for row in tiny]
    assert len(set(names)) == len(names)
    assert {row["section"] for row in tiny} == set(MEASURED)
    for setting in TINY.settings:
        for method in (INFERENCE, PUBLISHED, *zeroth_order.OURS):
            assert rows.find(tiny, setting.name, method, "ms") is not None
    for method in (*first_order.OURS, first_order.NEAREST, first_order.FLOOR):
        assert rows.find(tiny, first_order.SETTING, method, "ms") is not None
    large = {m: rows.find(tiny, "large", m, "bytes") for m in (INFERENCE, zeroth_order.IN_PLACE)}
    # Exact on a CPU, where every tensor is counted.
    assert large[INFERENCE]["median"] == large[zeroth_order.IN_PLACE]["median"]
    for name in first_order.PLANNED:
        measured = rows.find(tiny, name, "measured", "bytes")
        # How good a plan is, test_memory says; here both are of the same steps of the same model.
        assert measured["ratio"] == pytest.approx(1.0, abs=0.05)


def test_every_promise_has_its_figure(tiny: list[Row]) -> None:
    """All but the tests', which are not among the rows here."""
    judged = bars.judge(document(tiny))
    assert [bar.promise for bar in judged if bar.holds is None] == [
        f"{name}: no failure" for name in (checks.SELF_TESTS, checks.TESTS)
    ]


def ideal() -> list[Row]:
    """Rows of a GPU that keeps every promise with something to spare."""
    found: list[Row] = []

    def add(section: str, setting: str, method: str, ms: float, to: float | None = None) -> None:
        reference = None if to is None else [to / 1e3]
        found.append(rows.timed(section, setting, method, [ms / 1e3], to=reference))

    for setting in FULL.settings:
        add(zeroth_order.SECTION, setting.name, INFERENCE, 50.0, 50.0)
        add(zeroth_order.SECTION, setting.name, PUBLISHED, 75.0, 50.0)
        for method in zeroth_order.OURS:
            add(zeroth_order.SECTION, setting.name, method, 52.0, 50.0)
    for method, ms, size in ((INFERENCE, 20.0, 26e9), (zeroth_order.IN_PLACE, 50.0, 26e9 + 1000)):
        add(zeroth_order.LARGE, "large", method, ms, 20.0)
        found.append(rows.counted(zeroth_order.LARGE, "large", method, size, "bytes"))
    add(zeroth_order.LARGE, "large", zeroth_order.PASSES, 30.0)
    times = dict.fromkeys(first_order.OURS, 20.0)
    times |= {first_order.REFERENCE: 36.0, first_order.FLOOR: 54.0, first_order.NEAREST: 60.0}
    for method, ms in times.items():
        add(first_order.SECTION, first_order.SETTING, method, ms, 36.0)
    for name in first_order.FUSED_METHODS:
        add(first_order.FUSED, name, first_order.UNFUSED, 100.0)
        add(first_order.FUSED, name, first_order.IN_BACKWARD, 105.0)
    for method, share in (("perturb in place normal", 0.9), ("apply_ 10 draws normal", 0.2)):
        row = rows.timed(kernels.SECTION, "bfloat16", method, [1.0], dtype="bfloat16")
        found.append({**row, "fraction_of_copy_bandwidth": share})
    for section in (checks.SELF_TESTS, checks.TESTS):
        told = {"failed": [], "passed": 9, "finished": True}
        found.append(rows.counted(section, section, checks.FAILURES, 0, checks.UNIT, **told))
    return found


def test_promises_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "ROOT", tmp_path)
    assert "apply_ 10 draws normal 0.20 (uncounted)" in bars.judge(document(ideal(), FULL))[-1].note
    name = bars.ARITHMETIC["apply_ 10 draws normal"]
    counted = {"name": name, "median": 20.0, "executed_per_element": 15.1}
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "sass.json").write_text(json.dumps({"rows": [counted]}))
    judged = bars.judge(document(ideal(), FULL))
    assert [bar for bar in judged if bar.holds is not True] == []
    assert "apply_ 10 draws normal 0.20 (15 instructions an element)" in judged[-1].note
    # Every bar once.
    assert len({bar.promise for bar in judged}) == len(judged) == 2 + 8 + 3 + 2 + 5 + 2 + 2 + 1


@pytest.mark.parametrize(
    ("setting", "method", "promise"),
    [
        (FULL.settings[0].name, zeroth_order.IN_PLACE, "MeZO, in place of two forward"),
        (FULL.settings[2].name, zeroth_order.VIRTUAL, "MeZO, virtual of two forward"),
        (FULL.settings[0].name, "LOZO", "LOZO of two forward"),
        (FULL.settings[1].name, "SubZero", "every method of published MeZO"),
        ("large", zeroth_order.IN_PLACE, "step of two forwards and three passes"),
        (first_order.SETTING, "SM3", "SM3 of torch's fused AdamW"),
        (first_order.SETTING, "GaLoreAdamW", "GaLoreAdamW of GaLore's floor"),
        (first_order.FUSED_METHODS[0], first_order.IN_BACKWARD, "fused backward of all unfused"),
    ],
)
def test_promises_that_are_broken(setting: str, method: str, promise: str) -> None:
    """A method that takes ten times as long breaks the promises about it, and no other."""
    found = ideal()
    row = rows.find(found, setting, method, "ms")
    row["median"] *= 10
    if row["ratio"] is not None:
        row["ratio"] *= 10
    broken = [bar for bar in bars.judge(document(found, FULL)) if bar.holds is False]
    assert any(promise in bar.promise for bar in broken)
    assert len(broken) <= 2  # a setting's own, and that all are faster than the published
    found.remove(row)
    unknown = [bar for bar in bars.judge(document(found, FULL)) if bar.holds is None]
    assert any(promise in bar.promise for bar in unknown)


def test_what_else_breaks_a_promise() -> None:
    def broken(**changes: Any) -> list[str]:
        found = copy.deepcopy(ideal())
        for row in found:
            if row["name"] in changes:
                row.update(changes[row["name"]])
        judged = bars.judge(document(found, FULL))
        return [bar.promise for bar in judged if bar.holds is not True]

    more = {f"large: {zeroth_order.IN_PLACE}": {"median": 26e9 + 2 * bars.MIB}}
    assert "large model: bytes of MeZO in place beyond inference" in broken(**more)
    slow = {"bfloat16: perturb in place normal": {"fraction_of_copy_bandwidth": 0.8}}
    assert broken(**slow) == ["kernels' share of copy bandwidth, the least"]
    name = f"{checks.TESTS}: {checks.FAILURES}"
    assert broken(**{name: {"median": 1, "failed": ["test_a"]}}) == ["GPU tests: no failure"]
    # Tests that were stopped show nothing until one fails.
    assert broken(**{name: {"finished": False}}) == ["GPU tests: no failure"]


def program(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


ROW = rows.timed("a section", "s", "a", [1.0, 2.0])


def test_a_section_leaves_what_it_has_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still until the section has begun a second row."""
    line, begun = json.dumps(ROW), tmp_path / "begun"
    text = f"import time; print('''{line}''', flush=True); print('{{', end='', flush=True); "
    wait = f"open({str(begun)!r}, 'w').close(); time.sleep(600)"
    with monkeypatch.context() as patch:
        clock = types.SimpleNamespace(monotonic=lambda: 2.0 * begun.exists(), sleep=time.sleep)
        patch.setattr(report, "time", clock)
        found, reason = report.run_section(program(text + wait), 2.0)
    assert (found, reason) == ([ROW], "stopped after 2 s")
    assert report.run_section(program(text + "raise ValueError('no luck')"), 60.0) == (
        [ROW],
        "ValueError: no luck",
    )
    assert report.run_section(program(f"print('''{line}''')"), 60.0) == ([ROW], None)


def test_a_report_is_written_whatever_the_limit(tmp_path: Path) -> None:
    said: list[str] = []

    def command(section: str, scale: str, device: str) -> list[str]:
        assert (scale, device) == ("tiny", "cpu")
        mine = [row for row in ideal() if row["section"] == section]
        return program("".join(f"print('''{json.dumps(row)}''');" for row in mine))

    options: dict[str, Any] = {"progress": said.append, "command": command}
    whole, path = report.run(TINY, CPU, 600.0, tmp_path, **options)
    assert path.name == f"gpu_{report.slug(machine.cpu_model())}.json"
    assert json.loads(path.read_text()) == whole
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {row["name"] for row in whole["rows"]} == {row["name"] for row in ideal()}
    assert report.missing(whole) == []
    assert len(said) == 2 * len(SECTIONS)

    none, path = report.run(TINY, CPU, 1.0, tmp_path, **options)
    assert json.loads(path.read_text()) == none
    assert none["rows"] == []
    assert report.missing(none) == [f"{name}: not begun, for lack of time" for name in SECTIONS]


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU it says what it would do; else the status tells whether all is kept."""
    monkeypatch.setattr(doctor_gpu.torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--gpu"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("zoopt: error: --gpu needs a GPU, and torch ")
    assert all(name in line for name in SECTIONS)
    assert "--dry-run" in line

    with monkeypatch.context() as patch:
        patch.setattr(doctor_gpu, "NEEDED", ("matplotlib", "no_such_package"))
        assert main(["doctor", "--gpu"]) == 2
    expected = "--gpu needs no_such_package; pip install 'zoopt-torch[demo]'"
    assert expected in capsys.readouterr().err

    found = ideal()

    def run(scale: Any, *args: Any, **options: Any) -> tuple[dict[str, Any], Path]:
        whole = {**document(found, FULL), "machine": {"device": "a device"}}
        return {**whole, "bars": [dataclasses.asdict(b) for b in bars.judge(whole)]}, tmp_path

    monkeypatch.setattr(doctor_gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "run", run)
    assert main(["doctor", "--gpu", "--output", str(tmp_path)]) == 0
    assert "25 of 25 promises are kept" in capsys.readouterr().out
    found.pop()
    assert main(["doctor", "--gpu", "--output", str(tmp_path)]) == 1
    assert "24 of 25 promises are kept, 1 were not measured" in capsys.readouterr().out
    assert main(["doctor", "--gpu", "--output", "/no/where"]) == 2
    assert "--output: cannot write to the folder '/no/where'" in capsys.readouterr().err


def test_self_tests_are_told_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> str:
        raise AssertionError("3 bytes differ")

    tests = [("sums", lambda: "1 + 1"), ("noise", wrong)]
    monkeypatch.setattr(checks.selftest, "self_tests", lambda: iter(tests))
    told: list[Row] = []
    checks.run_self_tests(TINY, CPU, told.append)
    assert [(row["passed"], row["median"], row["finished"]) for row in told] == [
        *((1, 0, False), (1, 1, False), (1, 1, True)),
    ]
    assert told[-1]["failed"] == ["noise: 3 bytes differ"]


def test_tests_are_counted_as_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_right():\n    pass\n\ndef test_wrong():\n    assert 1 == 2\n"
    )
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    told: list[Row] = []
    checks.run_tests(dataclasses.replace(TINY, tests=("test_it.py",)), CPU, told.append)
    assert [(row["passed"], row["median"], row["finished"]) for row in told] == [
        *((1, 0, False), (1, 1, False), (1, 1, True)),
    ]
    assert told[-1]["failed"] == ["test_it.py::test_wrong"]

    checks.run_tests(dataclasses.replace(TINY, tests=("test_no.py",)), CPU, told.append)
    assert told[-1]["median"] is None
    assert told[-1]["reason"].startswith("a checkout of the repository is needed")
