"""Shaped updates of batches in Triton's interpreter: the reference's bits."""

from __future__ import annotations

import pytest
import torch

from tests.test_batch import batch_of
from tests.test_batch_descent import CASES, agree, indexed, masks_agree, state_agrees, whole


@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_a_batch_is_its_tensors_one_by_one(shape: str, rule: str) -> None:
    agree(shape, rule, "triton", whole(batch_of(torch.bfloat16)))


def test_random_masks_and_indices() -> None:
    agree("plain", "adam", "triton", batch_of(torch.float32, "rademacher", 0.3, offset=2**32 - 5))
    agree("plain", "adam", "triton", indexed(batch_of(torch.float16, offset=5)))


def test_state_and_masks() -> None:
    state_agrees("triton", batch_of(torch.float32, offset=3))
    masks_agree("triton", whole(batch_of(torch.bfloat16)))
