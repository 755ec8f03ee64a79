"""SM3's Triton kernel in Triton's interpreter: the reference's bits."""

from __future__ import annotations

import pytest
import torch

from tests.test_sm3 import DTYPES, kernel_steps, same_bits


@pytest.mark.parametrize("shape", [(), (300,), (19, 13), (40, 16), (3, 4, 5), (2, 270)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows that begin anywhere in a Philox block, more of them than a program has, and columns."""
    results = (kernel_steps(impl, shape, dtype, steps=1) for impl in ("triton", "reference"))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(9, 13), (70, 8), (7,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_sparse_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    results = (
        kernel_steps(impl, shape, dtype, sparse=True, steps=1) for impl in ("triton", "reference")
    )
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
