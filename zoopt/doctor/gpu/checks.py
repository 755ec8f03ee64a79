"""Checks that results are correct: the self-tests, and a checkout's tests for GPUs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from zoopt.doctor import selftest
from zoopt.doctor.gpu import rows
from zoopt.doctor.gpu.rows import Emit
from zoopt.doctor.gpu.scale import Scale
from zoopt.doctor.machine import ROOT, cores

SELF_TESTS, TESTS = "self-tests", "GPU tests"
#: The greatest number of processes that run tests.
WORKERS = 8
#: The figure of both sections: how many tests failed.
FAILURES, UNIT = "failures", "tests"


def run_self_tests(scale: Scale, device: torch.device, emit: Emit) -> None:
    """Compare noise with known answers, and kernels with the reference, on every device."""
    passed, failures = 0, list[str]()
    for name, test in selftest.self_tests():
        result = selftest.run(name, test)
        passed += result.passed
        if not result.passed:
            failures.append(f"{result.name}: {result.detail}")
        _tell(emit, SELF_TESTS, passed, failures, finished=False)
    _tell(emit, SELF_TESTS, passed, failures, finished=True)


def run_tests(scale: Scale, device: torch.device, emit: Emit) -> None:
    """Run the tests that need a GPU, and emit the count so far after each test."""
    missing = [name for name in scale.tests if not (ROOT / name).exists()]
    if missing:
        reason = f"a checkout of the repository is needed: {ROOT} has no {missing[0]}"
        emit(rows.failed(TESTS, TESTS, FAILURES, UNIT, reason))
        return
    try:
        import pytest
    except ImportError:
        emit(rows.failed(TESTS, TESTS, FAILURES, UNIT, "pytest is not installed"))
        return
    os.chdir(ROOT)

    class Told:
        def __init__(self) -> None:
            self.passed, self.failures = 0, list[str]()

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                self.failures.append(report.nodeid)
            self.passed += report.passed and report.when == "call"
            if report.when == "teardown":
                _tell(emit, TESTS, self.passed, self.failures, finished=False)

    told = Told()
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-q"]
    workers = min(WORKERS, (cores() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        # Most of the time goes into compiling kernels on the CPU.
        options += ["-n", str(workers)]
    status = pytest.main([*options, *scale.tests], plugins=[told])
    broken = [] if status in (0, 1) else [f"pytest ended with status {int(status)}"]
    _tell(emit, TESTS, told.passed, [*told.failures, *broken], finished=True)


def _tell(emit: Emit, setting: str, passed: int, failures: list[str], *, finished: bool) -> None:
    found = {"failed": failures, "passed": passed, "finished": finished}
    emit(rows.counted(setting, setting, FAILURES, len(failures), UNIT, **found))
