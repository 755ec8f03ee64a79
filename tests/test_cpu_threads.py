"""Threads for the CPU kernels: every span is done once, whoever does it, and errors come back."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from zoopt import kernels
from zoopt.kernels import cpu, cpu_threads
from zoopt.kernels.cpu_threads import Span

NUMEL = 1 << 19


@pytest.fixture(autouse=True, params=["OpenMP", "pool"])
def region(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both kinds of threads; the team exists where torch is built with GNU's OpenMP."""
    if request.param == "pool":
        monkeypatch.setattr(cpu_threads, "_parallel_region", lambda process: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(before)


THETA = torch.zeros(NUMEL)


def perturbed(out: torch.Tensor | None = None) -> torch.Tensor:
    return kernels.perturb(THETA, 1.0, seed=1, stream=2, draw=3, out=out, impl="numba")


def total(out: torch.Tensor) -> float:
    """Without torch's own operations, even to fill new memory: they have no threads in a fork."""
    return float(perturbed(out).numpy().sum(dtype="float64"))


def send_total(connection: multiprocessing.connection.Connection, out: torch.Tensor) -> None:
    connection.send(total(out))


def test_every_span_is_done_once() -> None:
    spans = [(10 * i, 10 * i + 10) for i in range(7)]
    done: list[Span] = []
    cpu_threads.run(done.append, spans)
    assert sorted(done) == spans


def test_torchs_own_threads_are_used_where_they_can_be(region: str) -> None:
    names: set[str] = set()
    together = threading.Barrier(2, timeout=60.0)

    def task(span: Span) -> None:
        together.wait()
        names.add(threading.current_thread().name)

    cpu_threads.run(task, [(0, 1), (1, 2)])
    assert len(names) == 2
    openmp = "OpenMP" in torch.__config__.parallel_info() and region == "OpenMP"
    gnu = cpu_threads._parallel_region(os.getpid()) is not None
    assert any(name.startswith("zoopt") for name in names) != (openmp and gnu)
    assert cpu_threads.kind() == ("torch's OpenMP threads" if gnu else "threads of its own")


def test_errors_come_back_once_all_is_done() -> None:
    done: list[Span] = []

    def task(span: Span) -> None:
        done.append(span)
        if span == (1, 2):
            raise KeyError("no such moment")

    with pytest.raises(KeyError, match="no such moment"):
        cpu_threads.run(task, [(0, 1), (1, 2), (2, 3)])
    assert len(done) == 3


def test_bits_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MIN_PER_THREAD", 1 << 14)
    parallel = perturbed()
    torch.set_num_threads(1)
    assert parallel.equal(perturbed())


def test_several_python_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MIN_PER_THREAD", 1 << 14)
    expected, found = perturbed(), list[torch.Tensor]()
    workers = [threading.Thread(target=lambda: found.append(perturbed())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(expected.equal(tensor) for tensor in found)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's team is not there, and waiting for it would take forever."""
    monkeypatch.setattr(cpu, "MIN_PER_THREAD", 1 << 14)
    out = torch.empty_like(THETA)
    expected = total(out)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=send_total, args=(theirs, out))
    child.start()
    assert ours.poll(60.0)
    assert ours.recv() == expected
    child.join()
