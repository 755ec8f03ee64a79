"""Batches of matrices in Triton's interpreter: a table of addresses, and the bits of each alone."""

from __future__ import annotations

import pytest
import torch

from tests.test_kernels_product import DTYPES
from tests.test_product_batches import SHAPES, TERMS, run


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_matrices_one_by_one(dtype: torch.dtype, terms: str) -> None:
    for shape in SHAPES:
        got = run("triton", dtype, terms, shape, together=True)
        expected = run("triton", dtype, terms, shape, together=False)
        assert all(map(torch.equal, got, expected))
