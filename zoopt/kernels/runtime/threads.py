"""Threads for the kernels on the CPU: torch's own OpenMP team where it can be used.

After each operation, torch's OpenMP threads spin for some milliseconds while they wait for the next
one. Other threads find no free core in that time, and sleeping threads take a tenth of a
millisecond to wake. So kernels run on the team that runs torch's operations, if GNU's OpenMP made
it. Otherwise they run on a thread pool; so does the child of a fork, which has no team.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

_PROCESS = os.getpid()


@functools.cache
def _parallel_region(process: int) -> int:
    """The address of GOMP_parallel in the library that torch has loaded; 0 without such a library,
    and in a fork of the process."""
    if process != _PROCESS:
        return 0
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # Threads do not survive a fork, so the pool belongs to the process that made it.
    return ThreadPoolExecutor(threads, thread_name_prefix="zoopt")


def kind() -> str:
    """Which threads kernels run on, in words."""
    own = not _parallel_region(os.getpid())
    return "threads of its own" if own else "torch's OpenMP threads"


def share(count: int, unit: int, least: int) -> int:
    """How many of `count` items a thread gets: a multiple of `unit`, and about `least` or more."""
    threads = max(1, min(torch.get_num_threads(), -(-count // least)))
    return max(1, -(-count // (threads * unit))) * unit


def run(kernel: Callable[..., None], arguments: tuple[Any, ...], count: int, share: int) -> None:
    """Run a kernel over items 0 ... count - 1 in spans of `share` items, one thread for each.

    Args:
        kernel: (arguments, team) -> None, compiled with `spread.spread`.
        arguments: the kernel's own.
    """
    process = os.getpid()
    region = _parallel_region(process)
    if count <= share:
        kernel(arguments, (0, 0, count, share))
    elif region:
        kernel(arguments, (region, 0, count, share))
    else:
        pool = _pool(process, torch.get_num_threads())
        futures = [
            pool.submit(kernel, arguments, (0, start, min(start + share, count), share))
            for start in range(0, count, share)
        ]
        # Wait for all before raising: after an error in one, the others still use this memory.
        wait(futures)
        for future in futures:
            future.result()
