"""SM3 on batches in Triton's interpreter: a table of matrices, and the reference's bits."""

from __future__ import annotations

import pytest
import torch

from tests.test_batch_sm3 import all_agree, run

# The interpreter computes with numpy, which warns of infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_its_tensors_one_by_one(dtype: torch.dtype) -> None:
    for case in ({}, {"momentum": 0.5, "offset": 3}):
        expected = run(dtype, "reference", together=False, **case)
        assert all_agree(run(dtype, "triton", together=True, **case), expected)
