"""The command line: help, errors, the doctor, and the benchmarks through it."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import torch

import zoopt
from zoopt.bench import common, compare, methods, step
from zoopt.cli import bench, main
from zoopt.doctor import diagnosis as doctor
from zoopt.doctor import machine, selftest
from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.kernels.runtime import threads as cpu_threads

RESULTS = machine.ROOT / "bench" / "results"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "noise_v1.json").read_text())


def exit_status(argv: list[str]) -> int:
    """Of the command, whether it returns or exits."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("command", [[], ["doctor"], ["bench"], ["plan"]], ids=" ".join)
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
        "reason": f"numba {report['versions']['numba']} is installed; {cpu_threads.kind()}",
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


def document(path: Path, *rows: dict, **content: object) -> str:
    """A results file of the benchmark "step"."""
    machine = dict.fromkeys(compare.SAME_MACHINE, "same")
    whole = {"schema": 1, "benchmark": "step", "machine": machine, "arguments": {}, **content}
    path.write_text(json.dumps({**whole, "rows": rows}))
    return str(path)


def test_rows_have_median_and_interquartile_range() -> None:
    row = common.measured("a", [4.0, 1.0, 2.0, 3.0, 100.0], "s", ratio=2.0, peak=7)
    expected = {"median": 3.0, "spread": 2.0, "min": 1.0, "max": 100.0, "repeats": 5}
    assert row == {"name": "a", "unit": "s", "ratio": 2.0, "peak": 7, **expected}
    assert common.measured("a", [1.0], "s")["spread"] is None
    assert common.counted("a", 12, "bytes")["spread"] == 0.0


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        # Medians 3 and 3.1, 0.5 apart at most by chance: the spreads add up to 0.1 + 0.1.
        ([2.9, 2.95, 3.0, 3.05, 3.1], [3.0, 3.05, 3.1, 3.15, 3.2], "within noise"),
        ([2.9, 2.95, 3.0, 3.05, 3.1], [3.9, 3.95, 4.0, 4.05, 4.1], "worse"),
        ([2.9, 2.95, 3.0, 3.05, 3.1], [1.9, 1.95, 2.0, 2.05, 2.1], "better"),
        # 3 % is below the threshold, however small the spreads.
        ([3.0, 3.0, 3.001], [3.09, 3.09, 3.091], "within noise"),
        # 20 % is nothing where rounds differ by 30 %.
        ([2.0, 3.0, 4.0], [2.6, 3.6, 4.6], "within noise"),
        ([3.0], [6.0], "noise unknown"),
    ],
)
def test_what_changed_beyond_noise(before: list, after: list, verdict: str) -> None:
    rows = [{"rows": [common.measured("AdamW", times, "s")]} for times in (before, after)]
    [change] = compare.compare(*rows, 0.05)
    assert change.verdict == verdict


def test_what_is_counted_has_no_noise(tmp_path: Path) -> None:
    a, b = (common.counted("AdamW", value, "bytes") for value in (10**9, 10**9 + 1))
    assert compare.verdict(a, b, compare.noise_of(a, b, 0.05)) == "worse"
    assert compare.verdict(a, a, compare.noise_of(a, a, 0.05)) == "within noise"


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = document(
        tmp_path / "a.json",
        common.measured("AdamW", [3.0, 3.0, 3.1], "s"),
        common.counted("AdamW", 1000, "bytes"),
        common.measured("LOZO", [1.0, 1.0], "s"),
        common.failed("SGD", "s", "out of memory"),
    )
    new = document(
        tmp_path / "b.json",
        common.measured("AdamW", [4.0, 4.0, 4.1], "s"),
        common.counted("AdamW", 900, "bytes"),
        common.measured("SGD", [1.0, 1.0], "s"),
        common.measured("MeZO", [1.0, 1.0], "s"),
        arguments={"model": "tiny"},
    )
    assert main(["bench", "compare", old, new]) == 1
    text = capsys.readouterr().out
    assert "\x1b" not in text
    verdicts = {tuple(line.split()[:2]): line for line in text.splitlines() if line}
    assert verdicts["AdamW", "s"].rstrip().endswith("+33.3 %  0.15   worse")
    assert verdicts["AdamW", "bytes"].rstrip().endswith("better")
    assert verdicts["LOZO", "s"].rstrip().endswith("gone")
    assert verdicts["MeZO", "s"].rstrip().endswith("new")
    assert verdicts["SGD", "s"].rstrip().endswith("better")
    assert "note: arguments: model was None, is tiny" in text
    assert "1 worse, 2 better, 1 new, 1 gone" in text
    assert main(["bench", "compare", old, old]) == 0
    capsys.readouterr()
    assert main(["bench", "compare", new, old, "--json", "-"]) == 1
    changes = json.loads(capsys.readouterr().out)
    assert [change["verdict"] for change in changes] == ["better", *["worse"] * 2, "gone", "new"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "must be a result of zoopt bench with schema 1, got None; measure again"),
        ('{"schema": 99}', "must be a result of zoopt bench with schema 1, got 99"),
        ('{"schema": 1, "benchmark": "kernels"}', "A and B must be of one benchmark"),
    ],
)
def test_compare_refuses(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "b.json"
    if content is not None:
        other.write_text(content)
    assert main(["bench", "compare", document(tmp_path / "a.json"), str(other)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("zoopt: error: ")
    assert message in line


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of seconds and bytes for each method, inference first, and a chart."""
    chart = tmp_path / "step.png"
    names = ["LoRA + AdamW", "adamw-checkpointed", "mezo-in-place", "mezo-published"]
    sizes = ["--model", "tiny", "--batch", "2", "--seq", "16", "--repeats", "2", "--threads", "1"]
    argv = ["bench", "step", *sizes, "--json", "-", "--plot", str(chart), "--optimizers", *names]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["command"] == shlex.join(["zoopt", *argv])
    assert result["machine"]["torch"] == torch.__version__
    assert result["arguments"]["seq"] == 16
    rows = {(row["name"], row["unit"]): row for row in result["rows"]}
    methods = ["inference", "LoRA + AdamW", "AdamW, checkpointed", "MeZO, in place"]
    methods.append("MeZO, published")
    assert list(rows) == [(name, unit) for name in methods for unit in ("s", "bytes")]
    for name in methods:
        row = rows[name, "s"]
        assert row["median"] == statistics.median(row["rounds"])
        assert row["min"] <= row["median"] <= row["max"]
        assert row["repeats"] == 2
        assert name in err
    assert rows["inference", "s"]["ratio"] == 1.0
    assert rows["MeZO, in place", "bytes"]["beyond"] == 0
    # Two moments and a gradient, float32, of all 198,400 parameters, and of the adapters alone.
    assert rows["AdamW, checkpointed", "bytes"]["median"] >= 12 * result["parameters"]
    assert rows["LoRA + AdamW", "bytes"]["median"] < 12 * result["parameters"]
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("too little"), "out of memory"),
        (ModuleNotFoundError("No module named 'peft'"), "No module named 'peft'"),
    ],
    ids=["memory", "package"],
)
def test_what_cannot_be_measured_is_a_row(
    error: Exception,
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = step.Bench.peak_bytes

    def full(self: step.Bench, entry: methods.Entry) -> int:
        if entry.name == "SGD":
            raise error
        return real(self, entry)

    monkeypatch.setattr(step.Bench, "peak_bytes", full)
    sizes = ["--model", "tiny", "--batch", "1", "--seq", "8", "--repeats", "1", "--threads", "1"]
    assert main(["bench", "step", *sizes, "--optimizers", "sgd", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [row["median"] for row in json.loads(out)["rows"] if row["name"] == "SGD"] == [None] * 2
    assert reason in err


def test_memory_of_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    """What the benchmark's own processes do: two real steps, and what their peak was made of."""
    sizes = ["--model", "tiny", "--batch", "1", "--seq", "8", "--threads", "1"]
    found = {}
    for name in ("inference", "mezo-in-place", "sm3"):
        assert main(["bench", "memory", *sizes, "--child", name]) == 0
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["mezo-in-place"]["peak"] == found["inference"]["peak"]
    assert found["mezo-in-place"]["state"] == 0 < found["sm3"]["state"]
    assert found["sm3"]["categories"]["gradients"] > 0
    assert sum(found["sm3"]["categories"].values()) == found["sm3"]["peak"]


def test_every_first_order_optimizer_is_measured() -> None:
    """Those that the package exports, however the table of methods names them."""
    classes = [
        name
        for name in zoopt.__all__
        if isinstance(getattr(zoopt, name), type)
        and issubclass(getattr(zoopt, name), FirstOrderOptimizer)
    ]
    names = [entry.name.removeprefix("zoopt.") for entry in methods.table().values()]
    for name in classes:
        for ending in ("", ", checkpointed"):
            assert any(n.startswith(name) and n.endswith(ending) for n in names)


def test_groups_of_optimizers() -> None:
    chosen = list(methods.chosen(["baselines", "mezo", "sgd"]))
    assert chosen[:3] == ["inference", "SGD", "AdamW"]
    assert {"AdamW, checkpointed", "zoopt.AdamW, int8 state", "MeZO, published"} < set(chosen)
    assert chosen[-1] == "MeZO"
    assert chosen.count("SGD") == 1


def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, chart = tmp_path / "kernels.json", tmp_path / "kernels.png"
    options = ["--numel", "2**12", "--dtype", "float32", "--repeats", "1", "--threads", "1"]
    argv = ["bench", "kernels", *options, "--json", str(file), "--plot", str(chart)]
    assert main(argv) == 0
    result = json.loads(file.read_text())
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names)
    assert "apply_ 10 draws rademacher, float32" in names
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "perturb in place" in capsys.readouterr().out
    assert main(["bench", "compare", str(file), str(file)]) == 0


@pytest.mark.parametrize(
    "file", [*RESULTS.glob("*_cpu.json"), *RESULTS.glob("*/summary*.json"), RESULTS / "sass.json"],
    ids=lambda file: file.name,
)  # fmt: skip
def test_committed_results_can_be_compared(file: Path) -> None:
    result = common.load_document(file)
    names = [(row["name"], row["unit"]) for row in result["rows"]]
    assert names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [*bench.INSTALLED, *bench.CHECKOUT])
def test_help_of_the_benchmarks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["bench", name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: zoopt bench {name} ")
    assert f"example:\n  zoopt bench {name} " in text
    assert "--json" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["step", "--optimizers", "adam"], "argument --optimizers: expected one of baselines, "),
        (["step", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["step", "--json", "/no/where.json"], "--json: cannot write to the folder '/no'"),
        (["step", "--plot", "/"], "--plot: "),
        (["step", "--repeats", "0"], "argument --repeats: expected a positive integer, got '0'"),
        (["kernels", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["compare", "a.json"], "the following arguments are required: B.json"),
        (["compare", "a", "b", "--threshold", "5"], "argument --threshold: expected a number in"),
    ],
    ids=" ".join,
)
def test_errors_of_the_benchmarks(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["bench", *argv]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"zoopt bench {argv[0]}: error: {message}")


def test_without_a_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    for name in bench.CHECKOUT:
        assert main(["bench", name]) == 2
        expected = f"zoopt: error: zoopt bench {name} needs a checkout"
        assert capsys.readouterr().err.startswith(expected)


def test_advice_on_waiting_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "OMP_WAIT_POLICY" not in {row.package for row in doctor.advice()}
    monkeypatch.delenv("OMP_WAIT_POLICY")
    [advice] = [row for row in doctor.advice() if row.package == "OMP_WAIT_POLICY"]
    assert advice.remedy == "export OMP_WAIT_POLICY=PASSIVE before Python"


def test_benchmarks_start_again_with_sleeping_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as a program, and only where nothing else has been asked for."""
    started = []

    def execv(program: str, arguments: list[str]) -> None:
        started.append((program, arguments, os.environ["OMP_WAIT_POLICY"]))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "bin/zoopt", "bench", "step", "--help"])
    monkeypatch.setattr(sys, "argv", ["bin/zoopt", "bench", "step", "--help"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(SystemExit):
        main()
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert exit_status(["bench", "step", "--help"]) == 0
    assert not started
    with pytest.raises(SystemExit):
        main()
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]], "PASSIVE")]
    monkeypatch.undo()
