"""Shared fixtures. Uninitialised tensors hold NaN in every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# The interpreter must be chosen before triton is imported: its tests have their own process.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
if not torch.cuda.is_available():
    collect_ignore.append("test_gpu.py")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin are filled with NaN (the largest value for integers)."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20261122)
