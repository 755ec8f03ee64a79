"""The command line: help, errors, the doctor, and the benchmarks through it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import zoopt
from zoopt import doctor, selftest
from zoopt.cli import main

GOLDEN = json.loads((Path(__file__).parent / "golden" / "noise_v1.json").read_text())


def exit_status(argv: list[str]) -> int:
    """Of the command, whether it returns or exits."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("command", [[], ["doctor"], ["bench"]], ids=" ".join)
def test_help_is_complete(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {' '.join(['zoopt', *command])} ")
    assert "example:\n  zoopt" in text
    assert "\x1b" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--version"]) == 0
    assert capsys.readouterr().out == f"zoopt {zoopt.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "zoopt: error: the following arguments are required: COMMAND; see zoopt --help"),
        (["docter"], "zoopt: error: argument COMMAND: invalid choice: 'docter'"),
        (["doctor", "--jsn", "x"], "zoopt: error: unknown arguments --jsn x; see zoopt --help"),
        (["doctor", "--json"], "zoopt doctor: error: argument --json: expected one argument"),
        (["doctor", "--json", "/no/where.json"], "zoopt: error: --json: cannot write"),
    ],
    ids=str,
)
def test_errors_take_one_line(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selftest, "self_tests", lambda: iter(()))
    assert exit_status(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in (zoopt.__version__, "equal bits", "noise, reference on cpu", "self-tests pass"):
        assert expected in text
    assert "\x1b" not in text


def test_doctor_writes_json_alone_to_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "self_tests", lambda: iter([("sums", lambda: "1 + 1")]))
    assert main(["doctor", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["versions"]["zoopt"] == zoopt.__version__
    assert report["self_tests"][0]["passed"]
    assert report["kernels"][0] == {
        "device": "cpu",
        "operation": "noise",
        "impl": "numba",
        "reason": f"numba {report['versions']['numba']} is installed",
    }
    assert "1 of 1 self-tests pass" in err


def test_doctor_fails_if_a_self_test_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> str:
        raise RuntimeError("no [such] register\nand a long trace")

    monkeypatch.setattr(selftest, "self_tests", lambda: iter([("broken", broken)]))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "no [such] register" in text
    assert "long trace" not in text


def test_self_tests_find_a_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose last element is off fails, and so does noise of another seed."""
    real = selftest.perturb

    def off_by_one(*args, impl, **key):
        out = real(*args, impl=impl, **key)
        out[-1] += impl == "numba"
        return out

    monkeypatch.setattr(selftest, "perturb", off_by_one)
    tests = dict(selftest.self_tests())
    result = selftest.run("perturb", tests["perturb, numba on cpu"])
    assert not result.passed
    assert result.detail.startswith("case 1, torch.float32: ")
    monkeypatch.setattr(selftest, "GOLDEN", [])
    wrong = selftest.Golden(1, 0, 0, 0, (0,), "+" * 16)
    monkeypatch.setattr(selftest, "GOLDEN", [wrong])
    assert not selftest.run("noise", tests["noise, numba on cpu"]).passed


def test_numbers_of_the_self_test_are_those_of_the_golden_file() -> None:
    cases = {(c["seed"], c["stream"], c["draw"], c["offset"]): c for c in GOLDEN["cases"]}
    for own in selftest.GOLDEN:
        case = cases[own.seed, own.stream, own.draw, own.offset]
        bits = [bits & 0xFFFFFFFF for bits in case["normal_bits"]]
        assert list(own.normals) == bits[: len(own.normals)]
        assert [1.0 if sign == "+" else -1.0 for sign in own.signs] == case["signs"][:16]


def test_advice_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.machine, "version", lambda package: None)
    advice = {row.package: row for row in doctor.advice()}
    assert advice["numba"].remedy == "pip install 'zoopt-torch[cpu]'"
    assert "triton" not in advice


def test_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["doctor"]) == 2
    expected = "zoopt: error: the command line needs rich; pip install 'zoopt-torch[cli]'\n"
    assert capsys.readouterr().err == expected
