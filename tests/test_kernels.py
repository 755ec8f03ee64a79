"""The kernels: the definition in float64, equal bits from every implementation, honest errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoopt import kernels, noise
from zoopt.kernels import philox, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["normal", "rademacher"]
KEY = {"seed": 0xFEDCBA9876543210, "stream": 0x89ABCDEF}
FAST = [impl for impl in kernels.available_impls() if impl != "reference"]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of all magnitudes that the dtype has, subnormals, zeros and infinities among them."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-9, 5, shape)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 6e-8, -6e-8, 65504.0, 1e-40])
    flat = x.flatten()
    flat[: min(8, flat.numel())] = special[: min(8, flat.numel())]
    return x.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(width), b.view(width))


def direction(numel: int, distribution: str, **key: int) -> Tensor:
    generate = noise.normal if distribution == "normal" else noise.rademacher
    return generate(numel, impl="reference", **key)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("width", [500, 1024])
def test_perturb_is_theta_plus_alpha_z(width: int, dtype: torch.dtype, distribution: str) -> None:
    theta = weights((3, width), dtype)
    got = kernels.perturb(theta, 1e-3, draw=5, distribution=distribution, **KEY)
    z = direction(3 * width, distribution, draw=5, **KEY).view(3, width)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    alpha = torch.tensor(1e-3, dtype=wide)
    expected = (theta.to(wide) + alpha * z.to(wide)).to(dtype)
    assert same_bits(got, expected)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_is_the_weighted_sum(dtype: torch.dtype, rounding: str) -> None:
    theta = torch.randn(1000).to(dtype)
    coefficients, draws = [0.5, -0.25, 1e-3, 2.0], [9, 3, 2**32 - 1, 0]
    expected = 0.9 * theta.double()
    for coefficient, draw in zip(coefficients, draws, strict=True):
        expected += coefficient * direction(1000, "normal", draw=draw, **KEY).double()
    got = theta.clone()
    result = kernels.apply_(got, coefficients, draws=draws, decay=0.9, rounding=rounding, **KEY)
    assert result is got
    # Ten roundings (five products, four sums, decay) of numbers below 2^4 in magnitude.
    unit = torch.finfo(dtype).eps / 2
    assert (got.double() - expected).abs().max() <= 10 * 2**4 * unit


def test_apply_rounds_once() -> None:
    """Ten updates of a fifth of a bfloat16 spacing: together two spacings, one by one nothing."""
    theta = torch.ones(4096, dtype=torch.bfloat16)
    z = direction(4096, "rademacher", draw=1, **KEY)
    step = 2.0**-7 / 5
    got = kernels.apply_(
        theta, [step] * 10, draws=[1] * 10, distribution="rademacher", **KEY
    ).float()
    assert torch.equal(got[z > 0], torch.full_like(got[z > 0], 1 + 2.0**-6))
    assert (got[z < 0] < 1 - 2.0**-7).all()


@pytest.mark.parametrize("impl", FAST)
@settings(max_examples=40, deadline=None)
@given(
    numel=st.one_of(st.integers(1, 9000), st.sampled_from([32, 2048, 4096, 6176])),
    offset=st.one_of(
        st.integers(0, 300),
        st.sampled_from([0, 128]),
        st.integers(2**32 - 9000, 2**32 + 9),
        st.just(2**40 + 5),
    ),
    dtype=st.sampled_from(DTYPES),
    distribution=st.sampled_from(DISTRIBUTIONS),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    draws=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    decay=st.sampled_from([1.0, 0.99, 0.0]),
)
def test_implementations_return_the_same_bits(
    impl: str,
    numel: int,
    offset: int,
    dtype: torch.dtype,
    distribution: str,
    rounding: str,
    draws: list[int],
    decay: float,
) -> None:
    theta = weights((numel,), dtype)
    key = {**KEY, "offset": offset, "distribution": distribution}
    coefficients = [0.3 / (j + 1) for j in range(len(draws))]
    got, expected, buffers = [], [], []
    for name, out in ((impl, got), ("reference", expected)):
        out.append(kernels.perturb(theta, -0.37, draw=draws[0], impl=name, **key))
        whole = {**key, "draws": draws, "decay": decay, "rounding": rounding, "impl": name}
        out.append(kernels.apply_(theta.clone(), coefficients, **whole))
        buffer = torch.linspace(-1, 1, numel)
        gradients = [c * 2 for c in coefficients]
        target = theta.clone()
        kernels.momentum_(
            target, buffer, coefficients, gradients, momentum=0.9, step_size=-0.1, **whole
        )
        out += [target, buffer]
        buffers.append(buffer)
    # Infinities times a decay of 0 make NaNs, whose payloads are nobody's business.
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert same_bits(a.nan_to_num(0.0), b.nan_to_num(0.0))


@pytest.mark.parametrize("impl", FAST)
def test_threads_do_not_matter(impl: str) -> None:
    theta = torch.randn(300_001)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.perturb(theta, 0.1, draw=1, impl=impl, **KEY))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_rounds_right(dtype: torch.dtype) -> None:
    """To nearest, all 16-bit values and the points between them: torch's own conversion."""
    grid = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).float()
    grid = grid[grid.isfinite()]
    between = torch.cat((grid, grid.nextafter(torch.tensor(torch.inf)), grid * (1 + 2.0**-9)))
    between = between[between.isfinite()]
    assert same_bits(reference.round_nearest(between, dtype), between.to(dtype))


@pytest.mark.parametrize("impl", kernels.available_impls())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e-6])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, scale: float, impl: str) -> None:
    """E[round(x)] = x, within 4 standard errors; the result is one of x's two neighbours."""
    n = 1 << 16
    start = torch.tensor(scale * 1.3, dtype=dtype)
    theta = start.expand(n).clone()
    # A constant added by decay: with coefficient 0 the direction itself adds nothing.
    decay = 1.0 + 2.0**-12
    exact = float(start) * float(torch.tensor(decay, dtype=torch.float32))
    got = kernels.apply_(
        theta, [0.0], draws=[3], decay=decay, rounding="stochastic", impl=impl, **KEY
    ).double()
    values = got.unique()
    assert len(values) == 2
    low, high = values.tolist()
    assert low <= exact <= high
    probability = (exact - low) / (high - low)
    sigma = (high - low) * math.sqrt(probability * (1 - probability) / n)
    # float16 discards at most 13 bits below its smallest normal number: a bias of 2^-13 steps.
    assert abs(got.mean() - exact) <= 4 * sigma + (high - low) * 2**-13


def test_stochastic_rounding_keeps_small_updates() -> None:
    """A thousand updates of 5e-6 on weights near 0.02: nearest loses them, stochastic does not."""
    kept = {}
    for rounding in ("nearest", "stochastic"):
        theta = torch.full((4096,), 0.02, dtype=torch.bfloat16)
        start = theta.double().mean()
        z = direction(4096, "rademacher", draw=0, **KEY)
        for draw in range(200):
            # The direction of draw 0 every time; a new draw of weight 0 moves the rounding bits.
            kernels.apply_(
                theta,
                [5e-6, 0.0],
                draws=[0, draw + 1],
                distribution="rademacher",
                rounding=rounding,
                **KEY,
            )
        kept[rounding] = float(((theta.double() - start) * z).mean()) / (200 * 5e-6)
    assert kept["nearest"] < 0.5
    assert abs(kept["stochastic"] - 1) < 0.05


def test_exact_numbers_survive_stochastic_rounding() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        theta = weights((5000,), dtype)
        theta = theta[theta.isfinite() & (theta != 0)]
        got = kernels.apply_(theta.clone(), [0.0], draws=[1], rounding="stochastic", **KEY)
        assert same_bits(got, theta)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_momentum_is_two_weighted_sums(dtype: torch.dtype) -> None:
    theta, wide = torch.randn(777).to(dtype), torch.float64
    buffer = torch.randn(777, dtype=wide if dtype == wide else torch.float32)
    draws, coefficients, gradients = [4, 8], [0.25, 0.0], [1.5, -2.0]
    z = [direction(777, "normal", draw=draw, **KEY).double() for draw in draws]
    expected_buffer = 0.9 * buffer.double() + 1.5 * z[0] - 2.0 * z[1]
    expected = 0.99 * theta.double() + 0.25 * z[0] - 0.01 * expected_buffer
    kernels.momentum_(
        theta,
        buffer,
        coefficients,
        gradients,
        momentum=0.9,
        step_size=-0.01,
        draws=draws,
        decay=0.99,
        **KEY,
    )
    # Six roundings of numbers below 2^4, and one to the parameter's own dtype.
    accumulator = torch.finfo(buffer.dtype).eps
    assert (buffer.double() - expected_buffer).abs().max() <= 3 * 2**4 * accumulator
    bound = 3 * 2**4 * accumulator + expected.abs() * torch.finfo(dtype).eps
    assert ((theta.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("impl", kernels.available_impls())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gathered_rows_are_rows(dtype: torch.dtype, distribution: str, impl: str) -> None:
    weight = weights((40, 37), dtype)
    rows = torch.tensor([[0, 39, 7], [7, 7, 1]])
    key = {**KEY, "draw": 2, "offset": 11, "distribution": distribution}
    got = kernels.perturb_rows(weight, rows, 0.1, impl=impl, **key)
    assert same_bits(got, kernels.perturb(weight, 0.1, impl="reference", **key)[rows])
    strided = torch.arange(12)[::3]
    assert same_bits(
        kernels.perturb_rows(weight, strided, 0.1, impl=impl, **key),
        kernels.perturb(weight, 0.1, impl="reference", **key)[strided],
    )
    assert kernels.perturb_rows(weight, rows[:0], 0.1, impl=impl, **key).shape == (0, 3, 37)


def test_shapes_and_strides() -> None:
    """Elements count row-major, whatever the memory layout; empty and 0-d tensors are tensors."""
    base = torch.randn(6, 10)
    dense = kernels.perturb(base, 0.5, draw=1, **KEY)
    for view in (base.t().contiguous().t(), torch.cat((base, base), 1)[:, :10]):
        assert not view.is_contiguous()
        assert same_bits(kernels.perturb(view, 0.5, draw=1, **KEY), dense)
        in_place = view.clone(memory_format=torch.preserve_format)
        kernels.perturb(view, 0.5, draw=1, out=in_place, **KEY)
        assert same_bits(in_place.contiguous(), dense)
        kernels.apply_(view, [0.5], draws=[1], **KEY)
        assert same_bits(view.contiguous(), dense)
    assert kernels.perturb(torch.empty(0, 3), 1.0, draw=0, **KEY).shape == (0, 3)
    kernels.apply_(torch.empty(0), [1.0], draws=[0], **KEY)
    scalar = kernels.perturb(torch.tensor(2.0), 1.0, draw=0, **KEY)
    assert scalar.shape == ()
    assert scalar == 2.0 + direction(1, "normal", draw=0, **KEY)[0]


def test_out_can_be_theta_and_no_draws_only_decay() -> None:
    theta = torch.randn(100)
    expected = kernels.perturb(theta, 0.1, draw=1, **KEY)
    assert kernels.perturb(theta, 0.1, draw=1, out=theta, **KEY) is theta
    assert same_bits(theta, expected)
    kernels.apply_(theta, [], draws=[], decay=0.5, **KEY)
    assert same_bits(theta, expected * 0.5)


def test_autograd_is_left_alone() -> None:
    theta = torch.randn(10, requires_grad=True)
    assert not kernels.perturb(theta, 0.1, draw=1, **KEY).requires_grad
    with torch.no_grad():
        kernels.apply_(theta, [0.1], draws=[1], **KEY)
    assert theta.requires_grad
    assert theta.grad_fn is None


THETA = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.perturb([1.0], 1.0, draw=0, **KEY), TypeError, "theta must be a tensor"),
        (
            lambda: kernels.perturb(THETA.long(), 1.0, draw=0, **KEY),
            TypeError,
            "theta must have one of the dtypes float32, bfloat16, float16, float64, got",
        ),
        (
            lambda: kernels.perturb(THETA.to_sparse(), 1.0, draw=0, **KEY),
            TypeError,
            "theta must be a dense tensor",
        ),
        (
            lambda: kernels.perturb(THETA, 1.0, draw=0, out=torch.zeros(5), **KEY),
            ValueError,
            r"out must be a torch.float32 tensor of shape \(4,\)",
        ),
        (
            lambda: kernels.perturb(THETA, 1.0, draw=0, distribution="cauchy", **KEY),
            ValueError,
            "distribution must be one of 'normal', 'rademacher', got 'cauchy'",
        ),
        (
            lambda: kernels.perturb(THETA.double(), 1.0, draw=0, impl="numba", **KEY),
            ValueError,
            "impl='numba' has no float64 kernel; use impl='reference'",
        ),
        (
            lambda: kernels.apply_(torch.zeros(1).expand(4), [1.0], draws=[0], **KEY),
            ValueError,
            r"theta is expanded.*pass theta.clone\(\)",
        ),
        (
            lambda: kernels.apply_(THETA, [1.0], draws=[0, 1], **KEY),
            ValueError,
            "coefficients and draws must have equal lengths, got 1 and 2",
        ),
        (
            lambda: kernels.apply_(THETA, [], draws=[], rounding="stochastic", **KEY),
            ValueError,
            "rounding='stochastic' needs at least one draw",
        ),
        (
            lambda: kernels.apply_(THETA, [1.0], draws=[0], rounding="up", **KEY),
            ValueError,
            "rounding must be one of 'nearest', 'stochastic', got 'up'",
        ),
        (
            lambda: kernels.perturb_rows(torch.zeros(3, 2), torch.tensor([3]), 1.0, draw=0, **KEY),
            IndexError,
            r"rows must lie in \[0, 3\), got values from 3 to 3",
        ),
        (
            lambda: kernels.perturb_rows(THETA, torch.tensor([0]), 1.0, draw=0, **KEY),
            ValueError,
            "weight must be a matrix",
        ),
        (
            lambda: kernels.momentum_(
                THETA.bfloat16(),
                THETA.bfloat16(),
                [],
                [],
                momentum=0.9,
                step_size=0.1,
                draws=[],
                **KEY,
            ),
            ValueError,
            "buffer must be a torch.float32 tensor",
        ),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    before = THETA.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(THETA, before)


def test_triton_without_a_gpu_says_what_to_do() -> None:
    if "triton" in kernels.available_impls():
        assert kernels.perturb(THETA, 1.0, draw=0, impl="triton", **KEY).shape == (4,)
        return
    with pytest.raises(ValueError, match="impl='triton' is not available here; remedy: "):
        kernels.perturb(THETA, 1.0, draw=0, impl="triton", **KEY)


def test_sizes_of_the_definition_are_those_of_the_kernels() -> None:
    assert reference.CHUNK % philox.SIGNS_PER_BLOCK == 0
