"""Batches in Triton's interpreter: tables of addresses, and the reference's bits."""

from __future__ import annotations

import pytest
import torch

from tests.test_batch import DTYPES, OPERATIONS, agree, batch_of, perturb_agrees
from zoopt.kernels.noise import gpu


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_batch_is_its_tensors_one_by_one(operation: str) -> None:
    agree(operation, "triton", batch_of(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb(dtype: torch.dtype) -> None:
    perturb_agrees("triton", batch_of(dtype, "rademacher", 0.3, offset=2**32 - 5))


def test_hints_may_be_fewer_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model has one hint for many blocks; programs walk from there to their tensor."""
    monkeypatch.setattr(gpu, "_MAX_HINTS", 2)
    gpu._table.cache_clear()
    agree("apply 1", "triton", batch_of(torch.float32))
    gpu._table.cache_clear()
