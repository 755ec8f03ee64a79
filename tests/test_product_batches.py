"""Batches of matrices: a product, and what goes beside it, added to all as to each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_kernels_adam import agree
from tests.test_kernels_product import DTYPES
from zoopt import kernels
from zoopt.kernels.batch import Batch
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op_scale import scale_

IMPLS = [impl for impl in kernels.available_impls() if impl != "triton"]
#: What is added beside decay theta, as in `test_kernels_product`.
TERMS = ["product", "by row", "by column", "scalar", "sign", "all"]
#: Of one tile and some, of several, and of less than one.
SHAPES = [(70, 40), (150, 136), (3, 5)]


def run(
    impl: str | None,
    dtype: torch.dtype,
    terms: str,
    shape: tuple[int, int],
    *,
    together: bool,
    rounding_draw: int | None = 9,
    device: str = "cpu",
    count: int = 3,
) -> list[Tensor]:
    """The matrices after one call, or one each."""
    torch.manual_seed(3)
    (m, n), r = shape, 5

    def made(*size: int, wide: bool = True) -> list[Tensor]:
        drawn = [torch.randn(size) for _ in range(count)]
        return [t.to(torch.float32 if wide else dtype).to(device) for t in drawn]

    theta = made(m, n, wide=False)
    keys = [NoiseKey(5, 2**31 + i, 3 * (i == 1)) for i in range(count)]
    left = right = gradient = scale = sign_of = None
    if terms in ("product", "by row", "all"):
        left, right = made(m, r), made(n, r)
    size = {"by row": (m, 1), "by column": (1, n), "scalar": (1, 1), "all": (m, 1)}.get(terms)
    if terms != "product":
        gradient = made(m, n, wide=False)
    if size is not None:
        scale = made(*size)
    if terms in ("sign", "all"):
        sign_of = list(zip(made(m, r), made(n, r), strict=True))
    numbers: dict[str, Any] = {"alpha": 0.7, "decay": 0.9, "sign_step": 0.25}
    numbers |= {"rounding_draw": rounding_draw, "impl": impl}
    if together:
        operands = {"gradient": gradient, "channel_scale": scale, "sign_of": sign_of}
        batch = Batch(theta, keys)
        assert kernels.add_product_(batch, left, right, **operands, **numbers) is batch
        return theta
    for i, (own, key) in enumerate(zip(theta, keys, strict=True)):
        one = [
            None if part is None else part[i] for part in (left, right, gradient, scale, sign_of)
        ]
        alone = dict(zip(("gradient", "channel_scale", "sign_of"), one[2:], strict=True))
        kernels.add_product_(own, *one[:2], **alone, key=key, **numbers)  # type: ignore[call-overload]
    return theta


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_matrices_one_by_one(dtype: torch.dtype, terms: str, impl: str) -> None:
    for shape in SHAPES:
        for draw in (None, 9):
            got = run(impl, dtype, terms, shape, together=True, rounding_draw=draw)
            expected = run(impl, dtype, terms, shape, together=False, rounding_draw=draw)
            assert all(map(torch.equal, got, expected))


def scaled(dtype: torch.dtype, factors: Tensor, impl: str) -> list[Tensor]:
    """Tensors of several sizes, one of them not in row-major order, times their factors."""
    torch.manual_seed(3)
    tensors = [torch.randn(size).to(dtype) for size in (1, 4096 + 17, 0, 9000)]
    tensors[1][5], tensors[3][7] = torch.nan, torch.inf
    tensors.append(torch.randn(6, 5).to(dtype).t())
    keys = [NoiseKey(5, i, 3 * (i == 1)) for i in range(len(tensors))]
    scale_(Batch(tensors, keys), factors, impl=impl)
    return tensors


#: One for all, or one for each: of more digits than 16 bits have.
FACTORS = [torch.tensor([1.0 / 3.0]), torch.tensor([0.1, -1.0 / 7.0, 0.0, 1e3 / 3.0, 0.7])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_each_by_its_factor(dtype: torch.dtype, impl: str) -> None:
    for factors in FACTORS:
        before = scaled(dtype, torch.ones(1), impl)
        every = factors.expand(len(before))
        for own, x, factor in zip(scaled(dtype, factors, impl), before, every, strict=True):
            assert agree(own, (x.float() * factor).to(dtype))
    wrong = torch.ones(2)
    with pytest.raises(ValueError, match="factors must be one for each of the batch's 5 tensors"):
        scaled(dtype, wrong, impl)


def test_squares_of_several_are_those_of_each() -> None:
    several = [torch.randn(30, 20) for _ in range(3)]
    for axis in (0, 1):
        got = kernels.squares(several, axis)
        assert torch.equal(got, torch.stack([kernels.squares(one, axis) for one in several]))
    with pytest.raises(ValueError, match="matrices of one shape"):
        kernels.squares([torch.ones(3, 2), torch.ones(2, 3)], 0)


def test_refuses_operands_that_do_not_match_the_batch() -> None:
    theta = [torch.zeros(4, 3), torch.zeros(4, 3)]
    batch = Batch(theta, [NoiseKey(1, 2), NoiseKey(1, 3)])
    left, right = [torch.ones(4, 2)] * 2, [torch.ones(3, 2)] * 2
    wide = [torch.ones(4, 2), torch.ones(4, 1)]
    narrow = [torch.ones(3, 2), torch.ones(3, 1)]
    for operands, message in (
        ((left[:1], right), "left must be one for each of the batch's 2 tensors, got 1"),
        ((left, None), "must both be tensors or both be None"),
        ((right, right), r"must have shapes \(4, r\) and \(3, r\)"),
        ((wide, narrow), "left must be of one dtype and shape in a batch"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.add_product_(batch, *operands)
    mixed = Batch([torch.zeros(4, 3), torch.zeros(3, 4)], batch.keys)
    with pytest.raises(ValueError, match="must have one shape"):
        kernels.add_product_(mixed, None, None)
    assert not any(own.any() for own in theta)
