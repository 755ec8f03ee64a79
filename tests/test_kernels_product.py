"""theta plus a low-rank product: the formula in float64, from every implementation."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.meter import peak_bytes
from zoopt import kernels
from zoopt.kernels.dispatch import native_bfloat16
from zoopt.kernels.noise.key import NoiseKey

#: Which terms there are beside decay theta.
CASES = ["product", "by row", "by column", "scalar", "sign", "all", "none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def difference(
    impl: str,
    dtype: torch.dtype,
    terms: str,
    m: int,
    n: int,
    r: int,
    offset: int = 0,
    rounding_draw: int | None = 9,
    narrow: str | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """How far theta is from the formula in float64, and how far it may be: (m, n)."""
    torch.manual_seed(r)
    theta = torch.randn(m, n).to(dtype)
    left, right, alpha = torch.randn(m, r), torch.randn(n, r), 0.7
    if narrow in ("left", "both"):
        left = left.to(dtype)
    if narrow in ("right", "both"):
        right = right.to(dtype)
    away, back = torch.randn(m, r), torch.randn(n, r)
    gradient = torch.randn(n, m).to(dtype).t()
    kwargs: dict[str, Any] = {"decay": 0.9, "alpha": alpha}
    expected = 0.9 * theta.double()
    size = expected.abs()
    product = terms in ("product", "by row", "all")
    if product:
        expected = expected + alpha * left.double() @ right.double().t()
        size = size + left.double().abs() @ right.double().abs().t()
    shape = {"by row": (m, 1), "by column": (1, n), "scalar": (1, 1), "all": (m, 1)}.get(terms)
    if shape:
        scale = torch.randn(shape)
        kwargs |= {"gradient": gradient, "channel_scale": scale}
        expected = expected + scale.double() * gradient.double()
        size = size + (scale.double() * gradient.double()).abs()
    if terms in ("sign", "all"):
        rest = gradient.double() - away.double() @ back.double().t()
        # Signs of numbers that are not rounding errors.
        gradient = torch.where(rest.abs() < 1e-2, gradient + 1.0, gradient).to(dtype)
        rest = gradient.double() - away.double() @ back.double().t()
        kwargs |= {"gradient": gradient, "sign_of": (away, back), "sign_step": 0.25}
        if shape:
            expected = 0.9 * theta.double() + alpha * left.double() @ right.double().t()
            expected = expected + kwargs["channel_scale"].double() * gradient.double()
        expected = expected + 0.25 * rest.sign()
        size = size + 1.0
    moved = {
        name: tuple(t.to(device) for t in value)
        if isinstance(value, tuple)
        else (value.to(device) if isinstance(value, Tensor) else value)
        for name, value in kwargs.items()
    }
    got = kernels.add_product_(
        theta.to(device, copy=True),
        left.to(device) if product else None,
        right.to(device) if product else None,
        key=NoiseKey(5, 2**31 + 3, offset),
        rounding_draw=rounding_draw,
        impl=impl,
        **moved,
    )
    # Sums of r + 4 terms in any order; then less than a spacing of the dtype, or half of one.
    native = native_bfloat16(theta.to(device)) or (device == "cuda" and dtype == torch.float16)
    if product and (impl == "numba" or device == "cuda") and native:
        # Wide factors and, on the CPU (but where BLAS does all), their product are rounded to
        # 16 bits, each to 2^-8 of itself, or 2^-11 in float16.
        roundings = sum(factor.dtype != dtype for factor in (left, right)) + (impl == "numba")
        unit = torch.finfo(dtype).eps / 2
        rounded = 1.03 * roundings * unit * (left.double().abs() @ right.double().abs().t())
        size = size + rounded * 2.0**24 / (r + 8)
    form = torch.finfo(dtype)
    spacing = (0.0 if dtype == torch.float32 else form.eps) * (expected.abs() + form.tiny)
    bound = (r + 8) * 2.0**-24 * size + spacing * (1.0 if rounding_draw is not None else 0.5)
    return (got.cpu().double() - expected).abs(), bound


@pytest.mark.parametrize("impl", [i for i in kernels.available_impls() if i != "triton"])
@pytest.mark.parametrize("terms", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r"), [(70, 40, 5), (600, 700, 33)])
def test_the_formula(impl: str, dtype: torch.dtype, terms: str, m: int, n: int, r: int) -> None:
    for rounding_draw in (None, 9):
        error, bound = difference(impl, dtype, terms, m, n, r, 3, rounding_draw)
        assert (error <= bound).all()


@pytest.mark.parametrize("impl", [i for i in kernels.available_impls() if i != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", ["left", "right", "both"])
def test_a_factor_may_be_of_thetas_dtype(impl: str, dtype: torch.dtype, narrow: str) -> None:
    error, bound = difference(impl, dtype, "all", 600, 700, 33, narrow=narrow)
    assert (error <= bound).all()


@pytest.mark.parametrize("impl", [i for i in kernels.available_impls() if i != "triton"])
def test_a_sum_is_rounded_once(impl: str) -> None:
    """1 + (2^-8 + 2^-20) is nearer to 1 + 2^-7 than to 1; 1 + 2^-8, which the product alone would
    be rounded to, is a tie, and goes to 1."""
    theta, right = torch.ones(64, 48).bfloat16(), torch.ones(48, 2).bfloat16()
    left = torch.tensor([2.0**-8, 2.0**-20]).expand(64, 2).bfloat16()
    got = kernels.add_product_(theta, left, right, alpha=1.0, key=NoiseKey(0, 0), impl=impl)
    assert (got == 1.0 + 2.0**-7).all()


@pytest.mark.parametrize("rounding_draw", [None, 9])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_allocates_what_the_kernel_does(
    dtype: torch.dtype, narrow: bool, rounding_draw: int | None
) -> None:
    left, right = (torch.randn(size, 33).to(dtype if narrow else None) for size in (600, 700))
    tensors = [torch.randn(600, 700).to(dtype), left, right]
    peaks = []
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        known = tensors
        if isinstance(mode, FakeTensorMode):
            known = [mode.from_tensor(tensor) for tensor in tensors]
        options = {"alpha": 0.7, "key": NoiseKey(0, 0), "rounding_draw": rounding_draw}
        add = functools.partial(kernels.add_product_, *known, **options)
        with mode:
            peaks.append(peak_bytes(add, known))
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("impl", [i for i in kernels.available_impls() if i != "triton"])
def test_rounding_is_the_noises(impl: str) -> None:
    """Without terms the bits are `apply_`'s: the same random bits for the same elements."""
    theta = torch.randn(300, 1000).bfloat16()
    key = NoiseKey(5, 6, 11)
    expected = kernels.apply_(
        theta.clone(), [], draws=[], decay=0.7, rounding="stochastic", rounding_draw=4, key=key
    )
    got = kernels.add_product_(
        theta.clone(), None, None, decay=0.7, rounding_draw=4, impl=impl, key=key
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", kernels.available_impls())
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (0, 4), (4, 0), (3000, 700)])
def test_squares_are_the_sums_of_rows_and_columns(
    impl: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Of m n terms, a chunk's sums and the chunks' own: no more than as many roundings."""
    if impl != "reference" and dtype == torch.float64:
        with pytest.raises(ValueError, match="no float64 kernel"):
            kernels.squares(torch.ones(2, 2, dtype=dtype), 0, impl=impl)
        return
    for gradient in (torch.randn(shape).to(dtype), torch.randn(shape[::-1]).to(dtype).t()):
        for axis in (0, 1):
            got = kernels.squares(gradient, axis, impl=impl)
            expected = gradient.double().square().sum(axis)
            unit = torch.finfo(got.dtype).eps / 2
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert ((got.double() - expected).abs() <= (shape[axis] + 4) * unit * expected).all()


def test_squares_refuse_what_is_no_matrix() -> None:
    for gradient, axis in ((torch.ones(3), 0), (torch.ones(3, 3), 2), (torch.ones(3, 3), -1)):
        with pytest.raises(ValueError, match="must be a matrix and axis 0 or 1"):
            kernels.squares(gradient, axis)
