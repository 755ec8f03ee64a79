"""Adam's and the product's Triton kernels in Triton's interpreter, beside the reference."""

from __future__ import annotations

import pytest
import torch

from tests.test_kernels_adam import DTYPES, FORMATS, KEY, agree, moments, trajectory
from tests.test_kernels_product import CASES, difference
from zoopt import kernels

# The interpreter computes with numpy, which warns of infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    ("numel", "offset", "draw", "bad"),
    [(2, 3, 7, False), (2305, 8, 7, False), (2305, 2**32 - 5, 7, True), (700, 0, None, True)],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_adam_has_the_references_bits(
    form: str, dtype: torch.dtype, numel: int, offset: int, draw: int | None, bad: bool
) -> None:
    case = (numel, form, dtype, dtype == torch.float16, offset, draw, bad)
    pairs = zip(trajectory("triton", *case), trajectory("reference", *case), strict=True)
    assert all(agree(a, b) for a, b in pairs)


@pytest.mark.parametrize(("rows", "r"), [(3, 5), (20, 128), (3, 700)])
def test_norms(rows: int, r: int) -> None:
    gradient, norms = torch.randn(rows, r), torch.empty(2, rows)
    out = kernels.adam_(
        gradient,
        *moments(rows * r, "int8"),
        betas=(0.9, 0.999),
        scale=1.0,
        eps=1e-8,
        norms=norms,
        impl="triton",
        key=KEY,
    )
    expected = torch.stack((out, gradient)).double().square().sum(2)
    assert ((norms.double() - expected).abs() <= r * 2.0**-24 * expected).all()


@pytest.mark.parametrize("terms", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r", "offset"), [(70, 40, 5, 8), (33, 129, 40, 3)])
def test_product(dtype: torch.dtype, terms: str, m: int, n: int, r: int, offset: int) -> None:
    error, bound = difference("triton", dtype, terms, m, n, r, offset)
    assert (error <= bound).all()


@pytest.mark.parametrize("narrow", ["left", "right", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_a_factor_of_thetas_dtype(dtype: torch.dtype, narrow: str) -> None:
    error, bound = difference("triton", dtype, "product", 70, 40, 5, narrow=narrow)
    assert (error <= bound).all()
