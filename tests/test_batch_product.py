"""Low-rank products added to a batch of matrices, against float64 and each matrix alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.test_batch import bits
from zoopt.kernels import NoiseKey, available_impls
from zoopt.kernels.batch import Batch
from zoopt.kernels.product.op_batch import add_products_

IMPLS = [impl for impl in available_impls() if impl != "triton"]
SHAPES = [(70, 40), (1, 9), (64, 64), (0, 5), (130, 3)]
#: D, r, and whether the right factors lie as their transposes.
FACTORS = [(1, 2, False), (1, 20, True), (3, 2, False)]


def operands(
    dtype: torch.dtype, count: int, r: int, transposed: bool
) -> tuple[Batch, list[Tensor], list[Tensor]]:
    torch.manual_seed(3)
    matrices = [torch.randn(shape).to(dtype) for shape in SHAPES]
    left = [torch.randn(count, m, r) for m, _ in SHAPES]
    right = [torch.randn(count, n, r) for _, n in SHAPES]
    if transposed:
        right = [each.mT.contiguous().mT for each in right]
    return Batch(matrices, [NoiseKey(7, i, 8 * i) for i in range(len(SHAPES))]), left, right


def is_the_formula(impl: str, dtype: torch.dtype, factors: tuple[int, int, bool]) -> None:
    """Within what float32 sums of D r products and one rounding can be off; stochastic rounding is
    off by one unit at most."""
    for draw in (None, 3):
        batch, left, right = operands(dtype, *factors)
        before = copy.deepcopy(batch.tensors)
        add_products_(batch, left, right, decay=0.5, rounding_draw=draw, impl=impl)
        for own, theta, a, b in zip(batch.tensors, before, left, right, strict=True):
            exact = 0.5 * theta.double() + (a.double() @ b.double().mT).sum(0)
            size = 0.5 * theta.double().abs() + (a.double().abs() @ b.double().abs().mT).sum(0)
            units = 1.0 if draw is None else 2.0
            error = 2.0**-22 * size * (1 + factors[0] * factors[1] / 4)
            # numba's bfloat16 products are multiplied as they are where a processor does so.
            error += units * torch.finfo(dtype).eps * exact.abs()
            assert ((own.double() - exact).abs() <= error + torch.finfo(dtype).eps * size).all()


def is_each_alone(impl: str, dtype: torch.dtype, factors: tuple[int, int, bool]) -> None:
    batch, left, right = operands(dtype, *factors)
    alone = [tensor.clone() for tensor in batch.tensors]
    add_products_(batch, left, right, decay=0.5, rounding_draw=3, impl=impl)
    for i, (tensor, key) in enumerate(zip(alone, batch.keys, strict=True)):
        own = Batch([tensor], [key])
        add_products_(own, [left[i]], [right[i]], decay=0.5, rounding_draw=3, impl=impl)
        assert torch.equal(bits(tensor), bits(batch.tensors[i]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", FACTORS)
def test_products(impl: str, dtype: torch.dtype, factors: tuple[int, int, bool]) -> None:
    is_the_formula(impl, dtype, factors)
    is_each_alone(impl, dtype, factors)


def test_refuses_factors_that_do_not_match() -> None:
    batch, left, right = operands(torch.float32, 1, 2, False)
    before = copy.deepcopy(batch.tensors)
    for a, b, error, message in [
        (left[1:], right, ValueError, "one tensor for each of the batch's 5"),
        (left, [each[:, 1:] for each in right], ValueError, "must have shapes"),
        ([each.double() for each in left], right, TypeError, "must be of torch.float32"),
        ([each.mT.contiguous().mT for each in left], right, ValueError, "left must be contiguous"),
    ]:
        with pytest.raises(error, match=message):
            add_products_(batch, a, b)
    assert all(torch.equal(a, b) for a, b in zip(before, batch.tensors, strict=True))
