"""Batches of moments in Triton's interpreter: tables of addresses, and the reference's bits."""

from __future__ import annotations

import pytest
import torch

from tests.test_batch_adam import FORMATS, OPERATIONS, all_agree, run
from tests.test_kernels_adam import UNIT

# The interpreter computes with numpy, which warns of infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_batch_is_its_tensors_one_by_one(operation: str, form: str) -> None:
    for offset, draw, bad in ((0, 7, True), (5, 7, False), (0, None, False)):
        case = {"offset": offset, "draw": draw, "bad": bad}
        dtype = torch.bfloat16 if bad else torch.float16
        expected = run(operation, dtype, form, "reference", together=False, **case)
        assert all_agree(run(operation, dtype, form, "triton", together=True, **case), expected)


@pytest.mark.parametrize("operation", ["momentum", "lion"])
def test_a_tensor_alone(operation: str) -> None:
    expected = run(operation, torch.bfloat16, "int8", "reference", together=False, offset=3)
    got = run(operation, torch.bfloat16, "int8", "triton", together=False, offset=3)
    assert all_agree(got, expected)


def test_norms() -> None:
    *got, norms = run("norms", torch.float32, "int8", "triton", together=True)
    *expected, sums = run("norms", torch.float32, "int8", "reference", together=True)
    assert len(got) == len(expected)
    # Sums of 40 squares, in any order; the first step's norms lie among the rest.
    assert ((norms - sums).abs() <= 2 * 40 * UNIT * sums).all()
