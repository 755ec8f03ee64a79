"""Batches of matrices in Triton's interpreter: a table of addresses, and the bits of each alone."""

from __future__ import annotations

import pytest
import torch

from tests.test_kernels_adam import agree
from tests.test_kernels_product import DTYPES
from tests.test_product_batches import FACTORS, SHAPES, TERMS, run, scaled


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_matrices_one_by_one(dtype: torch.dtype, terms: str) -> None:
    for shape in SHAPES:
        got = run("triton", dtype, terms, shape, together=True)
        expected = run("triton", dtype, terms, shape, together=False)
        assert all(map(torch.equal, got, expected))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities that are meant
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_each_by_its_factor(dtype: torch.dtype) -> None:
    for factors in FACTORS:
        expected = scaled(dtype, factors, "reference")
        assert all(map(agree, scaled(dtype, factors, "triton"), expected))
