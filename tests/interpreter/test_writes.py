"""Many writes in one pass, in Triton's interpreter: the bits of each made alone."""

from __future__ import annotations

import pytest
import torch

from tests.test_writes import DTYPES, NOISES, check
from tests.writes import RULES


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_have_the_bits_of_each_made_alone(dtype: torch.dtype) -> None:
    for noise, rules in zip(NOISES, (RULES, ("none",), ("none",), RULES), strict=True):
        check(dtype, noise, rules, "triton")
