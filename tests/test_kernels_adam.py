"""Adam's kernels and their moments: honest codes, equal bits from every implementation."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.test_kernels import same_bits
from zoopt import kernels
from zoopt.kernels.adam.moments import (
    BLOCK,
    MIN_SCALE,
    SIGNED_LEVELS,
    UNSIGNED_LEVELS,
    Format,
    Moment,
    decode,
    encode,
)
from zoopt.kernels.noise.key import NoiseKey

FORMATS = get_args(Format)
CODED = ["int8", "int4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = NoiseKey(0xFEDCBA9876543210, 0x89ABCDEF)
FAST = [impl for impl in kernels.available_impls() if impl != "reference"]
#: A float32 operation's relative error.
UNIT = 2.0**-24


def empty(numel: int, form: str, *, signed: bool) -> Moment:
    """A moment of zeros."""
    if form == "float32":
        return Moment(torch.zeros(numel), None, numel, signed)
    if form == "bfloat16":
        return Moment(torch.zeros(numel, dtype=torch.bfloat16), None, numel, signed)
    scale = torch.zeros(-(-numel // BLOCK[form]))
    if form == "int8":
        codes = torch.zeros(numel, dtype=torch.int8 if signed else torch.uint8)
    else:
        codes = torch.zeros(-(-numel // 2), dtype=torch.uint8)
    return Moment(codes, scale, numel, signed)


def moments(numel: int, form: str) -> tuple[Moment, Moment]:
    return empty(numel, form, signed=True), empty(numel, form, signed=False)


def agree(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but for the payloads of NaNs."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and same_bits(a[~nan], b[~nan])


def values(numel: int, signed: bool, spread: float = 1.0) -> Tensor:
    x = torch.randn(numel) * 10.0 ** (spread * torch.randn(numel))
    return x if signed else x.square()


def spacing(x: Tensor, stored: Moment) -> tuple[Tensor, Tensor]:
    """The levels around each magnitude of x, in float64: below and above it."""
    assert stored.scale is not None
    block = BLOCK[stored.format]
    scale = stored.scale.double().repeat_interleave(block)[: x.numel()]
    low = (x.double().abs() / scale).sqrt().mul(stored.levels).floor()
    low = low.clamp(max=stored.levels - 1)
    return scale * (low / stored.levels) ** 2, scale * ((low + 1) / stored.levels) ** 2


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", CODED)
@settings(max_examples=15, deadline=None)
@given(numel=st.integers(2, 700), spread=st.sampled_from([0.0, 1.0, 3.0]))
def test_nearest_is_off_by_half_the_gap_at_most(
    form: str, signed: bool, numel: int, spread: float
) -> None:
    stored, x = empty(numel, form, signed=signed), values(numel, signed, spread)
    encode(x, stored)
    got = decode(stored)
    below, above = spacing(x, stored)
    bound = (above - below) / 2
    if not signed:
        # Nothing is stored as 0, so that what is below the lowest level goes up to it.
        bound = torch.where(below == 0.0, above, bound)
    # Six roundings of float32, in encoding and in decoding, of numbers up to the level above.
    assert ((got - x).double().abs() <= bound + 8 * UNIT * above).all()
    assert (got.sign() == x.sign()).logical_or(got == 0.0).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", CODED)
def test_the_largest_magnitude_is_exact_and_codes_are_kept(form: str, signed: bool) -> None:
    stored, x = empty(5000, form, signed=signed), values(5000, signed)
    encode(x, stored)
    once = decode(stored)
    for part, got in zip(x.split(BLOCK[form]), once.split(BLOCK[form]), strict=True):
        at = part.abs().argmax()
        assert got[at] == part[at]
    again = empty(5000, form, signed=signed)
    encode(once, again)
    assert torch.equal(again.codes, stored.codes)
    assert same_bits(again.scale, stored.scale)


@pytest.mark.parametrize("form", CODED)
def test_a_second_moment_is_zero_only_where_its_block_is(form: str) -> None:
    size = BLOCK[form]
    x = torch.zeros(5 * size)
    x[size : 2 * size] = values(size, False)
    x[2 * size] = 1.0
    x[3 * size] = MIN_SCALE / 2
    x[4 * size] = 1e-45
    stored = empty(x.numel(), form, signed=False)
    encode(x, stored)
    got = decode(stored)
    assert (got[:size] == 0.0).all()
    assert (got[size:] > 0.0).all()


@pytest.mark.parametrize("form", ["bfloat16", *CODED])
@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_has_the_value_as_its_expectation(form: str, signed: bool) -> None:
    """Over all 256 bit patterns of each value the mean is exact but for the patterns' number."""
    x = values(BLOCK.get(form, 256), signed, 0.3)
    total, count = torch.zeros(x.numel(), dtype=torch.float64), 256
    for pattern in range(count):
        stored = empty(x.numel(), form, signed=signed)
        bits = torch.full((x.numel(),), pattern if signed else pattern << 8)
        encode(x, stored, bits)
        total += decode(stored).double()
    if form == "bfloat16":
        # Bits that eight of sixteen random ones discard: the mean is short of one in 256.
        gap, short = x.double().abs() * 2.0**-7, 2.0**-8
        above = x.double().abs()
    else:
        below, above = spacing(x, stored)
        gap, short = above - below, 2.0**-9
        if not signed:
            keep = below > 0.0
            x, total, gap, above = x[keep], total[keep], gap[keep], above[keep]
    assert ((total / count - x.double()).abs() <= gap * short + 8 * UNIT * above).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", CODED)
def test_stochastic_rounding_is_unbiased_with_the_noise(form: str, signed: bool) -> None:
    """The mean of 10,000 roundings of one value, with the kernels' own bits: 4 standard errors."""
    top = (SIGNED_LEVELS if signed else UNSIGNED_LEVELS)[form]
    numel = 10_000 // BLOCK[form] * BLOCK[form]
    x = torch.full((numel,), (3.3 / top) ** 2)
    x[:: BLOCK[form]] = 1.0
    first, second = moments(numel, form)
    moment = first if signed else second
    # With beta 0 a moment is the gradient, or its square.
    gradient = x if signed else x.sqrt()
    kwargs: dict[str, Any] = {"scale": 1.0, "eps": 1.0, "moment_draw": 5, "key": KEY}
    kernels.adam_(gradient, first, second, betas=(0.0, 0.0), **kwargs)
    got = decode(moment)[x < 1.0].double()
    expected = (gradient if signed else gradient.square())[1].item()
    assert len(got.unique()) == 2
    error = got.std().item() / math.sqrt(got.numel())
    assert abs(got.mean().item() - expected) <= 4 * error


def trajectory(
    impl: str,
    numel: int,
    form: str,
    dtype: torch.dtype,
    wide_gradient: bool,
    offset: int,
    draw: int | None,
    bad: bool,
    device: str = "cpu",
) -> list[Tensor]:
    """theta, directions and moments of two steps of each operation."""
    torch.manual_seed(numel)
    theta = torch.randn(numel).to(dtype).to(device)
    first, second = moments(numel, form)
    if device != "cpu":
        first, second = (
            Moment(s.codes.to(device), None if s.scale is None else s.scale.to(device), numel, sign)
            for s, sign in ((first, True), (second, False))
        )
    results = []
    for step in range(2):
        gradient = (torch.randn(numel) * 10.0 ** torch.randint(-3, 1, (numel,))).to(dtype)
        if bad and step:
            gradient[numel // 2], gradient[0] = torch.nan, torch.inf
        gradient = (gradient.float() if wide_gradient else gradient).to(device)
        kwargs: dict[str, Any] = {
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "key": KEY.shifted(offset),
        }
        kwargs |= {"moment_draw": None if draw is None else draw + step, "impl": impl}
        rounding = None if draw is None else step
        kernels.adamw_(
            theta,
            gradient,
            first,
            second,
            scale=-0.01,
            decay=0.99,
            rounding_draw=rounding,
            **kwargs,
        )
        results.append(kernels.adam_(gradient, first, second, scale=0.5, **kwargs))
    tensors = [theta, first.codes, second.codes, first.scale, second.scale, *results]
    return [tensor.cpu() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=12, deadline=None)
@given(
    numel=st.one_of(st.integers(2, 5000), st.sampled_from([256, 2048, 2049, 4096, 8193])),
    dtype=st.sampled_from(DTYPES),
    wide_gradient=st.booleans(),
    offset=st.one_of(st.integers(0, 300), st.just(8), st.just(2**32 - 5), st.just(2**40 + 16)),
    draw=st.one_of(st.none(), st.just(2**32 - 2)),
    bad=st.booleans(),
)
def test_implementations_return_the_same_bits(
    impl: str,
    form: str,
    numel: int,
    dtype: torch.dtype,
    wide_gradient: bool,
    offset: int,
    draw: int | None,
    bad: bool,
) -> None:
    case = (numel, form, dtype, wide_gradient, offset, draw, bad)
    pairs = zip(trajectory(impl, *case), trajectory("reference", *case), strict=True)
    assert all(agree(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", FORMATS)
def test_threads_and_chunks_do_not_change_a_bit(form: str) -> None:
    numel = 3 * 2**15 + 5
    case = (numel, form, torch.bfloat16, False, 3, 7, False)
    expected = trajectory("reference", *case)
    before = torch.get_num_threads()
    for impl in FAST:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                got = trajectory(impl, *case)
            finally:
                torch.set_num_threads(before)
            assert all(agree(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("impl", kernels.available_impls())
@pytest.mark.parametrize(("rows", "r"), [(3, 5), (700, 4), (5, 3000), (1, 70_000), (40, 128)])
def test_norms_are_the_rows_sums_of_squares(impl: str, rows: int, r: int) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(rows, r)
    first, second = moments(rows * r, "float32")
    norms = torch.empty(2, rows)
    kwargs: dict[str, Any] = {"betas": (0.9, 0.999), "scale": 1.0, "eps": 1e-8, "key": KEY}
    out = kernels.adam_(gradient, first, second, norms=norms, impl=impl, **kwargs)
    expected = torch.stack((out, gradient)).double().square().sum(2)
    # Whatever the order, a sum of r positive terms is off by r - 1 roundings and the squares' own.
    assert ((norms.double() - expected).abs() <= r * UNIT * expected).all()
    in_place = gradient.clone()
    again = moments(rows * r, "float32")
    kernels.adam_(in_place, *again, norms=norms, out=in_place, impl=impl, **kwargs)
    assert same_bits(in_place, out)
    assert ((norms.double() - expected).abs() <= r * UNIT * expected).all()


@pytest.mark.parametrize("impl", kernels.available_impls())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_direction_may_be_of_the_gradients_dtype(impl: str, dtype: torch.dtype) -> None:
    """The same, rounded to nearest once, in the gradient's place or elsewhere; norms before."""
    gradient = torch.randn(700, 5).to(dtype)
    kwargs: dict[str, Any] = {"betas": (0.9, 0.999), "scale": 1.0, "eps": 1e-8, "key": KEY}
    norms, narrow_norms = torch.empty(2, 700), torch.empty(2, 700)
    wide = kernels.adam_(gradient, *moments(3500, "int8"), norms=norms, impl=impl, **kwargs)
    assert wide.dtype == torch.float32
    for in_place in (False, True):
        source, kept = gradient.clone(), moments(3500, "int8")
        out = source if in_place else torch.empty_like(source)
        got = kernels.adam_(source, *kept, out=out, norms=narrow_norms, impl=impl, **kwargs)
        assert got is out
        assert same_bits(got, wide.to(dtype))
        assert same_bits(narrow_norms, norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    """Ten steps of torch.optim.AdamW."""
    theta = torch.randn(999, dtype=dtype)
    expected = torch.nn.Parameter(theta.clone())
    reference = torch.optim.AdamW([expected], lr=1e-2, weight_decay=0.1)
    first, second = (Moment(torch.zeros_like(theta), None, 999, sign) for sign in (True, False))
    for step in range(1, 11):
        expected.grad = torch.randn(999, dtype=dtype)
        reference.step()
        root = math.sqrt(1 - 0.999**step)
        kernels.adamw_(
            theta,
            expected.grad,
            first,
            second,
            betas=(0.9, 0.999),
            scale=-1e-2 * root / (1 - 0.9**step),
            eps=1e-8 * root,
            decay=1 - 1e-2 * 0.1,
            key=KEY,
        )
    # Ten steps of some ten roundings of theta, below 8 in magnitude, and of moves below 0.1.
    assert (theta - expected).abs().max() <= 100 * 8 * torch.finfo(dtype).eps


def test_a_view_and_a_float64_gradient() -> None:
    theta = torch.randn(40, 30).t()
    gradient = torch.randn(30, 40).double()
    expected = theta.contiguous()
    kwargs: dict[str, Any] = {
        "betas": (0.9, 0.99),
        "scale": -0.1,
        "eps": 1e-8,
        "decay": 1.0,
        "key": KEY,
    }
    kernels.adamw_(theta, gradient, *moments(1200, "int8"), **kwargs)
    kernels.adamw_(expected, gradient.float(), *moments(1200, "int8"), **kwargs)
    assert same_bits(theta.contiguous(), expected)
    nothing = torch.empty(0)
    kernels.adamw_(nothing, nothing, *moments(0, "float32"), **kwargs)


def test_errors_name_the_value_and_the_remedy() -> None:
    gradient = torch.zeros(4, 4)
    kwargs: dict[str, Any] = {"betas": (0.9, 0.99), "scale": 1.0, "eps": 1e-8, "key": KEY}
    with pytest.raises(ValueError, match="numel must be 2 or more for codes, got 1"):
        empty(1, "int8", signed=True)
    with pytest.raises(ValueError, match="codes must have 4 values, got 3"):
        Moment(torch.zeros(3), None, 4, True)
    with pytest.raises(ValueError, match="scale must have a number for each 256 of 300"):
        Moment(torch.zeros(300, dtype=torch.int8), torch.zeros(1), 300, True)
    with pytest.raises(ValueError, match="codes and scale must be contiguous"):
        Moment(torch.zeros(4, 8).t(), None, 32, True)
    half, narrow = torch.zeros(4, 4).half(), gradient.bfloat16()
    with pytest.raises(ValueError, match=r"a contiguous torch\.float32 or torch\.bfloat16 tensor"):
        kernels.adam_(narrow, *moments(16, "float32"), out=half, **kwargs)
    with pytest.raises(ValueError, match="first and second must have one format"):
        kernels.adam_(
            gradient,
            empty(16, "int8", signed=True),
            empty(16, "float32", signed=False),
            **kwargs,
        )
    with pytest.raises(ValueError, match=r"norms must be .* of shape \(2, 4\)"):
        kernels.adam_(gradient, *moments(16, "float32"), norms=torch.empty(2, 5), **kwargs)
    with pytest.raises(ValueError, match="gradient must be a matrix for norms"):
        kernels.adam_(
            gradient.view(-1), *moments(16, "float32"), norms=torch.empty(2, 16), **kwargs
        )
