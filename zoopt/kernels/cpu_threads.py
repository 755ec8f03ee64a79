"""Threads for the kernels on the CPU: torch's own, where they can be had.

After each of torch's operations its OpenMP threads wait for the next one by spinning, for some
milliseconds: threads of anybody else's find no free core then, and those asleep take a tenth of a
millisecond to wake. So kernels run on the team that torch's operations run on, if that is of GNU's
OpenMP; else, and after a fork, whose child has no team, on a pool of threads.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

Span = tuple[int, int]


class Job:
    """Spans that any number of threads work off, each calling `task` on one at a time."""

    def __init__(self, task: Callable[[Span], None], spans: list[Span]) -> None:
        self._task = task
        self._spans = collections.deque(spans)
        self._errors: list[BaseException] = []

    def work(self) -> None:
        """Do spans until none are left."""
        while True:
            try:
                span = self._spans.popleft()
            except IndexError:
                return
            try:
                self._task(span)
            except BaseException as error:  # It is another thread's, or would be lost in C.
                self._errors.append(error)

    def check(self) -> None:
        """Raise what has been raised."""
        if self._errors:
            raise self._errors[0]


_Region = ctypes.CFUNCTYPE(None, ctypes.py_object)


_work = _Region(Job.work)
_PROCESS = os.getpid()


@functools.cache
def _parallel_region(process: int) -> Callable[..., None] | None:
    """GOMP_parallel of the library that is loaded already; None in a fork of the process."""
    if process != _PROCESS:
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        region: Any = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    region.argtypes = (_Region, ctypes.py_object, ctypes.c_uint, ctypes.c_uint)
    region.restype = None
    return region  # type: ignore[no-any-return]


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # Threads do not survive a fork, so the pool belongs to the process that made it.
    return ThreadPoolExecutor(threads, thread_name_prefix="zoopt")


def kind() -> str:
    """Whose threads kernels run on, in words."""
    own = _parallel_region(os.getpid()) is None
    return "threads of its own" if own else "torch's OpenMP threads"


def run(task: Callable[[Span], None], spans: list[Span]) -> None:
    """Call the task, which releases the GIL, on every span, in as many threads as can be had."""
    process = os.getpid()
    region, job = _parallel_region(process), Job(task, spans)
    if region is not None:
        region(_work, job, len(spans), 0)
    else:
        pool = _pool(process, torch.get_num_threads())
        others = [pool.submit(job.work) for _ in spans[1:]]
        job.work()
        for other in others:
            other.result()
    job.check()
