"""The kernels: the definition in float64, equal bits from every implementation, honest errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoopt import kernels, noise
from zoopt.kernels.noise import philox, reference
from zoopt.kernels.noise.key import NoiseKey

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["normal", "rademacher"]
WORDS = {"seed": 0xFEDCBA9876543210, "stream": 0x89ABCDEF}
KEY = NoiseKey(**WORDS)
FAST = [impl for impl in kernels.available_impls() if impl != "reference"]
#: Only the reference has float64.
CASES = [(impl, dtype) for impl in kernels.available_impls() for dtype in DTYPES]
CASES.append(("reference", torch.float64))


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


def mask(numel: int, density: float, **key: int) -> Tensor:
    return noise.mask(numel, density=density, impl="reference", **key)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("width", [500, 1024])
def test_perturb_is_theta_plus_alpha_z(width: int, dtype: torch.dtype, distribution: str) -> None:
    theta = weights((3, width), dtype)
    got = kernels.perturb(theta, 1e-3, draw=5, key=NoiseKey(**WORDS, distribution=distribution))
    z = direction(3 * width, distribution, draw=5, **WORDS).view(3, width)
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
        expected += coefficient * direction(1000, "normal", draw=draw, **WORDS).double()
    got = theta.clone()
    result = kernels.apply_(got, coefficients, draws=draws, decay=0.9, rounding=rounding, key=KEY)
    assert result is got
    # Ten roundings (five products, four sums, decay) of numbers below 2^4 in magnitude.
    unit = torch.finfo(dtype).eps / 2
    assert (got.double() - expected).abs().max() <= 10 * 2**4 * unit


def test_apply_rounds_once() -> None:
    """Ten updates of a fifth of a bfloat16 spacing: together two spacings, one by one nothing."""
    theta = torch.ones(4096, dtype=torch.bfloat16)
    z = direction(4096, "rademacher", draw=1, **WORDS)
    step = 2.0**-7 / 5
    got = kernels.apply_(
        theta, [step] * 10, draws=[1] * 10, key=NoiseKey(**WORDS, distribution="rademacher")
    ).float()
    assert torch.equal(got[z > 0], torch.full_like(got[z > 0], 1 + 2.0**-6))
    assert (got[z < 0] < 1 - 2.0**-7).all()


def adam_window(theta: Tensor, coefficients: list[float], gradients: list[float], **key) -> Tensor:
    """Steps of two directions each, the last of one or two."""
    count = len(gradients)
    first, second = ([0.1 * (j + 1) for j in range(count)] for _ in range(2))
    closes = [j % 2 == 1 or j == count - 1 for j in range(count)]
    args = (coefficients, gradients, first, second, closes)
    return kernels.adam_window_(theta, *args, eps=1e-8, step_size=-0.1, **key)


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
    density=st.sampled_from([1.0, 0.5, 0.01]),
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
    density: float,
) -> None:
    theta = weights((numel,), dtype)
    key = NoiseKey(**WORDS, offset=offset, distribution=distribution, density=density)
    coefficients = [0.3 / (j + 1) for j in range(len(draws))]
    update = torch.linspace(1, -1, numel)
    got, expected = [], []
    for name, out in ((impl, got), ("reference", expected)):
        out.append(kernels.perturb(theta, -0.37, draw=draws[0], impl=name, key=key))
        whole = {"key": key, "draws": draws, "decay": decay, "rounding": rounding, "impl": name}
        out.append(kernels.apply_(theta.clone(), coefficients, **whole))
        buffer = torch.linspace(-1, 1, numel)
        gradients = [c * 2 for c in coefficients]
        target = theta.clone()
        kernels.momentum_(
            target, buffer, coefficients, gradients, momentum=0.9, step_size=-0.1, **whole
        )
        out += [target, buffer]
        out.append(kernels.add_(theta.clone(), update, coefficients, **whole))
        alone = {**whole, "draws": [], "rounding_draw": draws[0]}
        out.append(kernels.add_(theta.clone(), update, [], **alone))
        out.append(kernels.apply_(theta.clone(), [], **alone))
        out.append(adam_window(theta.clone(), coefficients, gradients, **whole))
    # Infinities times a decay of 0 make NaNs, whose payloads are nobody's business.
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert same_bits(a.nan_to_num(0.0), b.nan_to_num(0.0))


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("offset", [0, 3, 2**32 - 5])
def test_masked_elements_are_moved_as_without_a_mask_and_no_others(
    offset: int, distribution: str, dtype: torch.dtype, impl: str
) -> None:
    theta = weights((3000,), dtype)
    key = {**WORDS, "offset": offset}
    kind = {"key": NoiseKey(**key, distribution=distribution), "impl": impl}
    masked = {**kind, "key": NoiseKey(**key, distribution=distribution, density=0.25)}
    kept = mask(3000, 0.25, draw=5, **key)
    dense = kernels.perturb(theta, 0.1, draw=5, **kind)
    got = kernels.perturb(theta, 0.1, draw=5, **masked)
    assert same_bits(got, torch.where(kept, dense, theta))
    # Two directions, each with a mask of its own: where both are 0, theta's very bits, -0 too.
    theta[8:16] = -0.0
    draws, coefficients = [5, 6], [0.1, -0.2]
    neither = ~(kept | mask(3000, 0.25, draw=6, **key))
    got = kernels.apply_(theta.clone(), coefficients, draws=draws, **masked)
    assert same_bits(got[neither], theta[neither])
    one = kernels.apply_(theta.clone(), coefficients[:1], draws=draws[:1], **masked)
    alone = kept & ~mask(3000, 0.25, draw=6, **key)
    assert same_bits(got[alone], one[alone])


@pytest.mark.parametrize("impl", kernels.available_impls())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_elements_that_no_mask_keeps_are_rounded(dtype: torch.dtype, impl: str) -> None:
    """Stochastically, by the bits of the last draw, as if the coefficients were 0."""
    theta = torch.randn(3000).to(dtype)
    whole = {"draws": [1, 2], "decay": 0.99, "rounding": "stochastic", "impl": impl, "key": KEY}
    neither = ~(mask(3000, 0.1, draw=1, **WORDS) | mask(3000, 0.1, draw=2, **WORDS))
    got = kernels.apply_(
        theta.clone(), [0.1, 0.2], **{**whole, "key": NoiseKey(**WORDS, density=0.1)}
    )
    expected = kernels.apply_(theta.clone(), [0.0, 0.0], **whole)
    assert same_bits(got[neither], expected[neither])


def test_key_of_a_density() -> None:
    """Rounded once to a multiple of 2^-16, and handed on with the key's other arguments."""
    key = NoiseKey(1, 2, 3, "rademacher", 0.1)
    assert key.density == 6554 / 65536
    assert key.threshold == 6554
    assert key.shifted(8) == NoiseKey(1, 2, 11, "rademacher", 0.1)
    assert NoiseKey(1, 2).density == 1.0
    assert NoiseKey(1, 2, density=1 - 2**-20).threshold is None
    assert NoiseKey(1, 2, density=2**-17).threshold == 1


@pytest.mark.parametrize("impl", FAST)
def test_threads_do_not_matter(impl: str) -> None:
    theta = torch.randn(300_001)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.perturb(theta, 0.1, draw=1, impl=impl, key=KEY))
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
        theta, [0.0], draws=[3], decay=decay, rounding="stochastic", impl=impl, key=KEY
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
        z = direction(4096, "rademacher", draw=0, **WORDS)
        for draw in range(200):
            # The direction of draw 0 every time; a new draw of weight 0 moves the rounding bits.
            kernels.apply_(
                theta,
                [5e-6, 0.0],
                draws=[0, draw + 1],
                key=NoiseKey(**WORDS, distribution="rademacher"),
                rounding=rounding,
            )
        kept[rounding] = float(((theta.double() - start) * z).mean()) / (200 * 5e-6)
    assert kept["nearest"] < 0.5
    assert abs(kept["stochastic"] - 1) < 0.05


def test_exact_numbers_survive_stochastic_rounding() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        theta = weights((5000,), dtype)
        theta = theta[theta.isfinite() & (theta != 0)]
        got = kernels.apply_(theta.clone(), [0.0], draws=[1], rounding="stochastic", key=KEY)
        assert same_bits(got, theta)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_momentum_is_two_weighted_sums(dtype: torch.dtype) -> None:
    theta, wide = torch.randn(777).to(dtype), torch.float64
    buffer = torch.randn(777, dtype=wide if dtype == wide else torch.float32)
    draws, coefficients, gradients = [4, 8], [0.25, 0.0], [1.5, -2.0]
    z = [direction(777, "normal", draw=draw, **WORDS).double() for draw in draws]
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
        key=KEY,
    )
    # Six roundings of numbers below 2^4, and one to the parameter's own dtype.
    accumulator = torch.finfo(buffer.dtype).eps
    assert (buffer.double() - expected_buffer).abs().max() <= 3 * 2**4 * accumulator
    bound = 3 * 2**4 * accumulator + expected.abs() * torch.finfo(dtype).eps
    assert ((theta.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_add_is_a_weighted_sum_and_an_update(dtype: torch.dtype, density: float) -> None:
    theta, wide = torch.randn(777).to(dtype), torch.float64
    update = torch.randn(777, dtype=wide if dtype == wide else torch.float32)
    before, draws, coefficients = update.clone(), [4, 8], [0.25, -1.5]
    expected = 0.99 * theta.double() + update.double()
    for coefficient, draw in zip(coefficients, draws, strict=True):
        z = direction(777, "normal", draw=draw, **WORDS).double()
        expected += coefficient * z * mask(777, density, draw=draw, **WORDS)
    got = theta.clone()
    args = {"draws": draws, "decay": 0.99, "key": NoiseKey(**WORDS, density=density)}
    assert kernels.add_(got, update, coefficients, **args) is got
    assert same_bits(update, before)
    # Six roundings of numbers below 2^4, and one to the parameter's own dtype.
    bound = 6 * 2**4 * torch.finfo(update.dtype).eps / 2
    bound = bound + expected.abs() * torch.finfo(dtype).eps
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("impl", kernels.available_impls())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_draw_names_the_bits(dtype: torch.dtype, impl: str) -> None:
    """Those of the last of the draws, or of the one that is given, with draws or without."""
    theta, update = torch.randn(3000).to(dtype), torch.randn(3000) * 1e-3
    whole = {"decay": 0.9, "rounding": "stochastic", "impl": impl, "key": KEY}
    # A direction of weight 0 brings its rounding bits and nothing else.
    by_seven = kernels.add_(theta.clone(), update, [0.0], draws=[7], **whole)
    got = kernels.add_(theta.clone(), update, [], draws=[], rounding_draw=7, **whole)
    assert same_bits(got, by_seven)
    got = kernels.add_(theta.clone(), update, [0.0], draws=[8], rounding_draw=7, **whole)
    assert same_bits(got, by_seven)
    by_eight = kernels.add_(theta.clone(), update, [0.0], draws=[8], **whole)
    assert not same_bits(by_eight, by_seven)
    decayed = kernels.apply_(theta.clone(), [], draws=[], rounding_draw=7, **whole)
    assert same_bits(decayed, kernels.apply_(theta.clone(), [0.0], draws=[7], **whole))
    # To nearest there is nothing to name.
    plain = {"draws": [], "decay": 0.9, "impl": impl, "key": KEY}
    got = kernels.add_(theta.clone(), update, [], rounding_draw=7, **plain)
    assert same_bits(got, kernels.add_(theta.clone(), update, [], **plain))


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_adam_window_is_adam_over_past_steps(
    dtype: torch.dtype, distribution: str, density: float
) -> None:
    """Two steps of two directions and one of one, two directions that only restore, in float64."""
    n, theta = 777, torch.randn(777).to(dtype)
    draws, closes = [9, 4, 0, 2, 7, 3, 1], [False, True, False, True, True, False, False]
    coefficients = [0.0, 0.0, 0.0, 0.0, 0.5, 0.0, -0.25]
    gradients = [1.5, -2.0, 0.5, 0.25, 3.0, 0.0, 0.0]
    first, second = [0.0, 0.25, 0.0, 0.5, 1.0, 0.0, 0.0], [-1.0, 0.125, -1.0, 0.5, 1.0, -1.0, -1.0]
    expected = 0.99 * theta.double()
    ghat, m, v = torch.zeros(3, n, dtype=torch.float64)
    for j, draw in enumerate(draws):
        z = direction(n, distribution, draw=draw, **WORDS).double()
        z = z * mask(n, density, draw=draw, **WORDS)
        expected += coefficients[j] * z
        ghat = ghat + gradients[j] * z
        if closes[j]:
            m, v, ghat = m + first[j] * ghat, v + second[j] * ghat**2, torch.zeros_like(ghat)
    ratio = m / (v.sqrt() + 1e-3)
    expected += -0.1 * ratio
    got = theta.clone()
    args = (coefficients, gradients, first, second, closes)
    numbers = {"eps": 1e-3, "step_size": -0.1, "decay": 0.99}
    key = NoiseKey(**WORDS, distribution=distribution, density=density)
    noise_of = {"draws": draws, "key": key}
    assert kernels.adam_window_(got, *args, **numbers, **noise_of) is got
    # With u half the accumulator's spacing at 1, and every |ghat| below 2^5 (|z| < 4.36, |g| sums
    # to 3.5): m errs by 8 roundings of numbers below 2^6, v by 9 of numbers below 2^9 (a ghat that
    # errs by 3 2^5 u squares to 2^5 times that and more), and its root by that over 2 sqrt(v),
    # sqrt(v) by no more than the root of the error. The quotient errs by both over its denominator,
    # and by 3 roundings of its own; theta by 6 roundings of numbers below 2^4.
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    error_m, error_v = 8 * 2**6 * u, 2**4 * 2**9 * u
    error_root = torch.minimum(error_v / v.sqrt(), torch.tensor(error_v).sqrt())
    denominator = (v.sqrt() + 1e-3 - error_root).clamp(min=1e-3)
    error = 0.1 * (error_m + ratio.abs() * error_root) / denominator + 0.3 * ratio.abs() * u
    bound = error + 6 * 2**4 * u + expected.abs() * torch.finfo(dtype).eps
    assert ((got.double() - expected).abs() <= bound).all()


def test_adam_window_of_nothing_is_decay() -> None:
    theta = torch.randn(100)
    for args in (([], [], [], [], []), ([0.0], [2.0], [1.0], [1.0], [False])):
        got = kernels.adam_window_(
            theta.clone(),
            *args,
            eps=1e-8,
            step_size=-1.0,
            draws=[3][: len(args[0])],
            decay=0.5,
            key=KEY,
        )
        assert same_bits(got, theta * 0.5)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(5, 1000), (700, 3), (130, 4, 8), (3,)])
def test_rows_have_scales_of_their_own(
    shape: tuple[int, ...], density: float, distribution: str, impl: str, dtype: torch.dtype
) -> None:
    """theta_i + (alpha c_i) z_i: each row is `perturb` with the product as its alpha."""
    theta, wide = weights(shape, dtype), torch.float64 if dtype == torch.float64 else torch.float32
    scales = torch.linspace(-1.0, 2.0, shape[0], dtype=wide)
    key = NoiseKey(**WORDS, offset=77, distribution=distribution, density=density)
    options = {"draw": 5, "key": key, "impl": impl}
    got = kernels.perturb(theta, 0.3, row_scale=scales, **options)
    size = theta[0].numel()
    for i, scale in enumerate(scales * torch.tensor(0.3, dtype=wide)):
        if i < 9 or i > shape[0] - 3:
            own = {**options, "key": key.shifted(i * size), "impl": "reference"}
            assert same_bits(got[i], kernels.perturb(theta[i], float(scale), **own))
    before = theta.clone()
    assert kernels.perturb(theta, 0.3, row_scale=scales, out=theta, **options) is theta
    assert same_bits(theta, got)
    strided = torch.stack((before, before), -1)[..., 0]
    assert same_bits(kernels.perturb(strided, 0.3, row_scale=scales, **options), got)


@pytest.mark.parametrize("impl", kernels.available_impls())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_gathered_rows_are_rows(
    density: float, dtype: torch.dtype, distribution: str, impl: str
) -> None:
    weight = weights((40, 37), dtype)
    rows = torch.tensor([[0, 39, 7], [7, 7, 1]])
    noise_key = NoiseKey(**WORDS, offset=11, distribution=distribution, density=density)
    key = {"draw": 2, "key": noise_key}
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
    dense = kernels.perturb(base, 0.5, draw=1, key=KEY)
    for view in (base.t().contiguous().t(), torch.cat((base, base), 1)[:, :10]):
        assert not view.is_contiguous()
        assert same_bits(kernels.perturb(view, 0.5, draw=1, key=KEY), dense)
        in_place = view.clone(memory_format=torch.preserve_format)
        kernels.perturb(view, 0.5, draw=1, out=in_place, key=KEY)
        assert same_bits(in_place.contiguous(), dense)
        kernels.apply_(view, [0.5], draws=[1], key=KEY)
        assert same_bits(view.contiguous(), dense)
    assert kernels.perturb(torch.empty(0, 3), 1.0, draw=0, key=KEY).shape == (0, 3)
    kernels.apply_(torch.empty(0), [1.0], draws=[0], key=KEY)
    scalar = kernels.perturb(torch.tensor(2.0), 1.0, draw=0, key=KEY)
    assert scalar.shape == ()
    assert scalar == 2.0 + direction(1, "normal", draw=0, **WORDS)[0]


def test_out_can_be_theta_and_no_draws_only_decay() -> None:
    theta = torch.randn(100)
    expected = kernels.perturb(theta, 0.1, draw=1, key=KEY)
    assert kernels.perturb(theta, 0.1, draw=1, out=theta, key=KEY) is theta
    assert same_bits(theta, expected)
    kernels.apply_(theta, [], draws=[], decay=0.5, key=KEY)
    assert same_bits(theta, expected * 0.5)


def test_autograd_is_left_alone() -> None:
    theta = torch.randn(10, requires_grad=True)
    assert not kernels.perturb(theta, 0.1, draw=1, key=KEY).requires_grad
    with torch.no_grad():
        kernels.apply_(theta, [0.1], draws=[1], key=KEY)
    assert theta.requires_grad
    assert theta.grad_fn is None


THETA = torch.zeros(4)
UPDATE = torch.zeros(4)


def adam_one(theta: Tensor, second=(1.0,), closes=(True,), eps: float = 1e-8) -> Tensor:
    args = ([0.0], [1.0], [1.0], list(second), closes)
    return kernels.adam_window_(theta, *args, eps=eps, step_size=-0.1, draws=[0], key=KEY)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.perturb([1.0], 1.0, draw=0, key=KEY), TypeError, "theta must be a tensor"),
        (
            lambda: kernels.perturb(THETA.long(), 1.0, draw=0, key=KEY),
            TypeError,
            "theta must have one of the dtypes float32, bfloat16, float16, float64, got",
        ),
        (
            lambda: kernels.perturb(THETA.to_sparse(), 1.0, draw=0, key=KEY),
            TypeError,
            "theta must be a dense tensor",
        ),
        (
            lambda: kernels.perturb(THETA, 1.0, draw=0, out=torch.zeros(5), key=KEY),
            ValueError,
            r"out must be a torch.float32 tensor of shape \(4,\)",
        ),
        (
            lambda: kernels.perturb(
                THETA, 1.0, draw=0, key=NoiseKey(**WORDS, distribution="cauchy")
            ),
            ValueError,
            "distribution must be one of 'normal', 'rademacher', got 'cauchy'",
        ),
        (
            lambda: kernels.perturb(THETA.double(), 1.0, draw=0, impl="numba", key=KEY),
            ValueError,
            "impl='numba' has no float64 kernel; use impl='reference'",
        ),
        (
            lambda: kernels.apply_(torch.zeros(1).expand(4), [1.0], draws=[0], key=KEY),
            ValueError,
            r"theta is expanded.*pass theta.clone\(\)",
        ),
        (
            lambda: kernels.apply_(THETA, [1.0], draws=[0, 1], key=KEY),
            ValueError,
            "coefficients and draws must have equal lengths, got 1 and 2",
        ),
        (
            lambda: kernels.apply_(THETA, [], draws=[], rounding="stochastic", key=KEY),
            ValueError,
            "rounding='stochastic' needs at least one draw or a rounding_draw, got none",
        ),
        (
            lambda: kernels.add_(THETA, UPDATE, [], draws=[], rounding="stochastic", key=KEY),
            ValueError,
            "rounding='stochastic' needs at least one draw or a rounding_draw, got none",
        ),
        (
            lambda: kernels.add_(THETA, UPDATE, [], draws=[], rounding_draw=2**32, key=KEY),
            ValueError,
            r"rounding_draw must be an int in \[0, 2\^32\), got 4294967296",
        ),
        (
            lambda: kernels.add_(THETA, UPDATE.double(), [], draws=[], key=KEY),
            ValueError,
            "update must be a torch.float32 tensor",
        ),
        (
            lambda: kernels.add_(THETA.half(), UPDATE.half(), [], draws=[], key=KEY),
            ValueError,
            "update must be a torch.float32 tensor",
        ),
        (
            lambda: kernels.add_(THETA, [0.0] * 4, [], draws=[], key=KEY),
            TypeError,
            "update must be a tensor, got list",
        ),
        (
            lambda: kernels.add_(torch.zeros(2, 2), UPDATE.view(2, 2).t(), [], draws=[], key=KEY),
            ValueError,
            r"update must be contiguous; pass update.contiguous\(\)",
        ),
        (
            lambda: adam_one(THETA, closes=[]),
            ValueError,
            "closes and draws must have equal lengths, got 0 and 1",
        ),
        (
            lambda: adam_one(THETA, second=[-1.0]),
            ValueError,
            r"second must be at least 0 where closes, got \[-1.0\]",
        ),
        (
            lambda: adam_one(THETA, eps=1e-50),
            ValueError,
            "eps must be positive in torch.float32, got 1e-50; use 1e-8",
        ),
        (
            lambda: kernels.apply_(THETA, [1.0], draws=[0], rounding="up", key=KEY),
            ValueError,
            "rounding must be one of 'nearest', 'stochastic', got 'up'",
        ),
        (
            lambda: kernels.perturb_rows(
                torch.zeros(3, 2), torch.tensor([3]), 1.0, draw=0, key=KEY
            ),
            IndexError,
            r"rows must lie in \[0, 3\), got values from 3 to 3",
        ),
        (
            lambda: kernels.perturb(THETA, 1.0, draw=0, key=KEY, row_scale=torch.ones(1)),
            ValueError,
            r"row_scale must have one torch.float32 number on cpu for each row of a tensor of",
        ),
        (
            lambda: kernels.perturb_rows(THETA, torch.tensor([0]), 1.0, draw=0, key=KEY),
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
                key=KEY,
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
        assert kernels.perturb(THETA, 1.0, draw=0, impl="triton", key=KEY).shape == (4,)
        return
    with pytest.raises(ValueError, match="impl='triton' is not available here; remedy: "):
        kernels.perturb(THETA, 1.0, draw=0, impl="triton", key=KEY)


def test_sizes_of_the_definition_are_those_of_the_kernels() -> None:
    assert reference.CHUNK % philox.SIGNS_PER_BLOCK == 0
