"""Runs compiled functions as plain Python, in which parameters can be replaced."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled functions run their Python code."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and the import is slow
        yield
        return
    lost = _lost_references()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _count_none(lost)


@functools.cache
def _lost_references() -> int:
    """How many references to None a stance wrongly drops: three in torch 2.6.

    After about ten thousand steps, Python 3.11 and earlier would free None and abort.
    """
    stances, before = 100, sys.getrefcount(None)
    for _ in range(stances):
        with torch.compiler.set_stance("force_eager"):
            pass
    lost = max(0, round((before - sys.getrefcount(None)) / stances))
    _count_none(stances * lost)
    return lost


def _count_none(references: int) -> None:
    for _ in range(references):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(None))
