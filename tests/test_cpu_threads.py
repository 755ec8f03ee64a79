"""Threads for the CPU kernels: every span is done once, whoever does it, and errors come back."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from zoopt import kernels
from zoopt.kernels.runtime import threads as cpu_threads
from zoopt.kernels.runtime.intrinsics import jit
from zoopt.kernels.runtime.spread import spread

NUMEL = 1 << 19


@pytest.fixture(autouse=True, params=["OpenMP", "pool"])
def region(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both kinds of threads; the team exists where torch is built with GNU's OpenMP."""
    if request.param == "pool":
        monkeypatch.setattr(cpu_threads, "_parallel_region", lambda process: 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(before)


THETA = torch.zeros(NUMEL)


def perturbed(out: torch.Tensor | None = None) -> torch.Tensor:
    return kernels.perturb(THETA, 1.0, key=kernels.NoiseKey(1, 2), draw=3, out=out, impl="numba")


def total(out: torch.Tensor) -> float:
    """Without torch's own operations, even to fill new memory: they have no threads in a fork."""
    return float(perturbed(out).numpy().sum(dtype="float64"))


def send_total(connection: multiprocessing.connection.Connection, out: torch.Tensor) -> None:
    connection.send(total(out))


@jit
def _count(visits, limit, span):
    if span[0] == limit:
        raise ValueError
    for i in range(span[0], span[1]):
        visits[i] += span[1] - span[0]


@jit
def count(arguments, team):
    spread(_count, arguments, team)


@pytest.mark.parametrize(("length", "share"), [(70, 10), (70, 13), (70, 70), (70, 99), (0, 10)])
def test_every_span_is_done_once(length: int, share: int) -> None:
    visits = np.zeros(length, np.int64)
    cpu_threads.run(count, (visits, -1), length, share)
    ends = [min(start + share, length) - start for start in range(0, length, share)]
    assert visits.tolist() == [end for end in ends for _ in range(end)]


@pytest.mark.parametrize("limit", [0, 20, 60])
def test_errors_come_back_once_all_is_done(limit: int) -> None:
    visits = np.zeros(70, np.int64)
    with pytest.raises(MemoryError, match="scratch"):
        cpu_threads.run(count, (visits, limit), 70, 10)
    assert visits.sum() == 600


@pytest.mark.parametrize(("count", "unit", "least", "expected"), [
    (0, 16, 1, 16), (1, 16, 1, 16), (100, 16, 1000, 112), (100, 16, 1, 48), (3, 1, 1, 1),
])  # fmt: skip
def test_shares_are_whole_units_of_three_threads(
    count: int, unit: int, least: int, expected: int
) -> None:
    assert cpu_threads.share(count, unit, least) == expected


def test_torchs_own_threads_are_used_where_they_can_be(region: str) -> None:
    torch.ones(1 << 20).sum()  # The team is there now.
    before = {*os.listdir("/proc/self/task")}
    perturbed()
    new = {*os.listdir("/proc/self/task")} - before
    started = {thread.name for thread in threading.enumerate() if thread.name.startswith("zoopt")}
    gnu = cpu_threads._parallel_region(os.getpid()) != 0
    assert gnu == ("OpenMP" in torch.__config__.parallel_info() and region == "OpenMP")
    assert cpu_threads.kind() == ("torch's OpenMP threads" if gnu else "threads of its own")
    if gnu:
        assert not new
    else:
        assert started


def test_bits_do_not_depend_on_the_threads() -> None:
    parallel = perturbed()
    torch.set_num_threads(1)
    assert parallel.equal(perturbed())


def test_several_python_threads_at_once() -> None:
    expected, found = perturbed(), list[torch.Tensor]()
    workers = [threading.Thread(target=lambda: found.append(perturbed())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(expected.equal(tensor) for tensor in found)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """The parent's team is not there, and waiting for it would take forever."""
    out = torch.empty_like(THETA)
    expected = total(out)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=send_total, args=(theirs, out))
    child.start()
    assert ours.poll(300.0)
    assert ours.recv() == expected
    child.join()
