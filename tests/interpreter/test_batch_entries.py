"""Operations on some entries in Triton's interpreter: tables of addresses, the reference's bits."""

from __future__ import annotations

import pytest
import torch

from tests.test_batch_entries import DTYPES, same_as_the_reference


# The interpreter computes with numpy, which warns of infinities that are meant.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_tensors_one_by_one(dtype: torch.dtype) -> None:
    same_as_the_reference("triton", dtype, together=True)
    same_as_the_reference("triton", dtype, together=False)
