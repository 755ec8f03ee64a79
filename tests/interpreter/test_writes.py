"""Many writes in one pass, in Triton's interpreter: the bits of each made alone."""

from __future__ import annotations

import pytest
import torch

from tests.test_writes import DTYPES, NOISES, check
from tests.writes import RULES
from zoopt import kernels
from zoopt.kernels import NoiseKey, Write
from zoopt.kernels.noise import gpu


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_have_the_bits_of_each_made_alone(dtype: torch.dtype) -> None:
    """Of a block and some elements, of one element, and across 2^32 blocks of noise."""
    for noise, rules in zip(NOISES, (RULES, ("none",), ("none",), RULES), strict=True):
        blocks = gpu.BLOCK if rules == ("none",) else gpu.ADAM_BLOCK
        sizes = (blocks["density" in noise] + 37, 1, 800)
        check(dtype, noise, rules, "triton", count=21, sizes=sizes)


def test_a_buffer_is_not_ignored() -> None:
    theta, buffer = torch.zeros(3), torch.ones(3)
    write = Write((1,), (0.1,), rule="momentum", estimate_draws=(1,), gradients=(1.0,))
    with pytest.raises(ValueError, match=r"must be made by impl='numba' or 'reference', got"):
        kernels.write_each_(theta, [write], buffer=buffer, key=NoiseKey(1, 2), impl="triton")
    assert not theta.any()
