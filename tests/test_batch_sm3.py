"""SM3 on batches: one pass over many tensors, with the bits of each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_batch_adam import all_agree
from zoopt import kernels
from zoopt.kernels import NoiseKey, sm3_
from zoopt.kernels.batch import Batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = [impl for impl in kernels.available_impls() if impl != "triton"]
#: Vectors and matrices with rows of whole vectors of memory and without, some empty, other shapes.
SHAPES = ((), (300,), (19, 13), (0, 5), (40, 16), (33, 512), (1, 7), (3, 4, 5), (70, 32))


def run(
    dtype: torch.dtype, impl: str, *, together: bool, momentum: float = 0.0, offset: int = 0
) -> list[Tensor]:
    """Two steps, in a batch or tensor by tensor: everything that is written."""
    torch.manual_seed(5)
    keys = [NoiseKey(2**63 + 5, 2**31 + i, offset * (i == 4)) for i in range(len(SHAPES))]
    theta = [torch.randn(shape).to(dtype) for shape in SHAPES]
    bounds = [[torch.zeros(size) for size in shape or (1,)] for shape in SHAPES]
    # What is NaN bounds nothing, in either axis or in both.
    bounds[2][0][3], bounds[4][1][5], bounds[4][0][2] = (torch.nan,) * 3
    buffers = [torch.zeros(shape) for shape in SHAPES] if momentum else None
    for step in range(2):
        gradients = [torch.randn(shape).to(dtype) for shape in SHAPES]
        options: dict[str, Any] = {"step_size": -0.1, "decay": 0.9, "momentum": momentum}
        options |= {"rounding_draw": step, "impl": impl}
        if together:
            sm3_(Batch(theta, keys), gradients, bounds, buffer=buffers, **options)
            continue
        for i, own in enumerate(theta):
            buffer = None if buffers is None else buffers[i]
            sm3_(own, gradients[i], bounds[i], buffer=buffer, key=keys[i], **options)
    return [*theta, *(vector for own in bounds for vector in own), *(buffers or [])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_tensors_one_by_one(dtype: torch.dtype, impl: str) -> None:
    for case in ({}, {"momentum": 0.5, "offset": 3}):
        expected = run(dtype, "reference", together=False, **case)
        assert all_agree(run(dtype, impl, together=True, **case), expected)
        assert all_agree(run(dtype, impl, together=False, **case), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_a_batch_may_differ_in_kind(impl: str) -> None:
    """One sparse in its rows, one of another dtype, one in other memory."""
    keys = [NoiseKey(1, i) for i in range(3)]
    rows = torch.sparse_coo_tensor(
        torch.tensor([[1, 3]]), torch.randn(2, 8), (5, 8), is_coalesced=True, check_invariants=True
    )
    gradients = [rows, torch.randn(5, 8), torch.randn(8, 5).bfloat16().t()]
    results = []
    for together in (True, False):
        theta = [torch.ones(5, 8).bfloat16() for _ in keys]
        bounds = [[torch.ones(5), torch.ones(8)] for _ in keys]
        if together:
            sm3_(Batch(theta, keys), gradients, bounds, step_size=-0.1, impl=impl)
        else:
            for i, own in enumerate(theta):
                alone = {"step_size": -0.1, "key": keys[i], "impl": impl}
                sm3_(own, gradients[i], bounds[i], **alone)
        results.append([*theta, *(vector for own in bounds for vector in own)])
    assert all_agree(*results)


def test_refuses_operands_that_do_not_match_the_batch() -> None:
    theta = [torch.zeros(4), torch.zeros(4)]
    batch = Batch(theta, [NoiseKey(1, 2), NoiseKey(1, 3)])
    ones, bounds = [torch.ones(4), torch.ones(4)], [[torch.zeros(4)], [torch.zeros(4)]]
    for operands, options, message in (
        ((ones[:1], bounds), {}, "gradient must be one for each of the batch's 2"),
        ((ones, bounds[:1]), {}, "accumulators must be one for each"),
        ((ones, bounds), {"buffer": ones[:1]}, "buffer must be one for each"),
        ((ones, [bounds[0], bounds[0]]), {}, "accumulators must not share memory"),
        ((ones, bounds), {"buffer": theta, "momentum": 0.5}, "must not share memory"),
    ):
        with pytest.raises(ValueError, match=message):
            sm3_(batch, *operands, step_size=-0.1, **options)
    assert not any(tensor.any() for tensor in theta)
