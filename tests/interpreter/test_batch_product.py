"""Products added to batches in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.test_batch_product import FACTORS, is_each_alone, is_the_formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", FACTORS)
def test_products(dtype: torch.dtype, factors: tuple[int, int, bool]) -> None:
    is_the_formula("triton", dtype, factors)
    is_each_alone("triton", dtype, factors)
