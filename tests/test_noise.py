"""The noise: published vectors, bits that never change, and a normal distribution."""

from __future__ import annotations

import ast
import ctypes
import ctypes.util
import json
import math
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import zoopt
from zoopt import noise
from zoopt.kernels import available_impls
from zoopt.kernels.noise import philox

GOLDEN = json.loads((Path(__file__).parent / "golden" / "noise_v1.json").read_text())
IMPLS = available_impls()

#: Random123's published known answers for Philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    (
        (0x00000000,) * 4,
        (0x00000000,) * 2,
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int], key: tuple[int], words: tuple[int]) -> None:
    got = noise.philox4x32(torch.tensor(counter), torch.tensor(key))
    assert got.tolist() == list(words)


def test_philox_broadcasts_the_key_over_counters() -> None:
    counters = torch.tensor([[answer[0] for answer in KNOWN_ANSWERS]] * 2)
    got = noise.philox4x32(counters, torch.tensor(KNOWN_ANSWERS[0][1]))
    assert got.shape == (2, 3, 4)
    assert got[1, 0].tolist() == list(KNOWN_ANSWERS[0][2])


def half_mask(numel: int, **key) -> Tensor:
    return noise.mask(numel, density=0.5, **key).float()


def bits(x: Tensor) -> list[int]:
    return x.view(torch.int32).tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_file(case: dict, impl: str) -> None:
    """Frozen: a change of any bit is a new version of the noise."""
    assert GOLDEN["noise_version"] == noise.NOISE_VERSION
    key = {name: case[name] for name in ("seed", "stream", "draw", "offset")}
    normals = noise.normal(len(case["normal_bits"]), impl=impl, **key)
    assert bits(normals) == case["normal_bits"]
    signs = noise.rademacher(len(case["signs"]), impl=impl, **key)
    assert signs.tolist() == case["signs"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", GOLDEN["masks"], ids=lambda case: case["name"])
def test_golden_masks(case: dict, impl: str) -> None:
    """The mask's 16 bits an element, made by an implementation in Python's integers."""
    key = {name: case[name] for name in ("seed", "stream", "draw")}
    index = case["offset"] + torch.arange(len(case["mask"]))
    halves = philox.halfwords(index, purpose=philox.PURPOSE_MASK, **key)
    assert halves.tolist() == case["halfwords"]
    place = {"offset": case["offset"], "density": case["density"], "impl": impl}
    mask = noise.mask(len(case["mask"]), **place, **key)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [bool(kept) for kept in case["mask"]]


def test_golden_words() -> None:
    case = GOLDEN["cases"][1]
    words = philox.words(
        torch.arange(4), seed=case["seed"], stream=case["stream"], draw=case["draw"]
    )
    assert words.flatten().tolist() == case["words"]


def test_golden_table() -> None:
    table = philox.normal_table(torch.device("cpu")).view(torch.int32)
    weights = torch.arange(1, 65537, dtype=torch.int64)
    assert int((table.long() * weights).sum()) == GOLDEN["table_checksum"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("generate", [noise.normal, noise.rademacher, half_mask])
@pytest.mark.parametrize("offset", [0, 1, 127, 2**32 - 3, 2**35 - 50, 2**40 + 7])
def test_any_slice_is_a_slice(generate, offset: int, impl: str) -> None:
    """Chunks, shards and tiles see the numbers of the whole tensor, beyond 2^32 too."""
    key = {"seed": 2**63 + 11, "stream": 0xFFFFFFFF, "draw": 0xFFFFFFFE, "impl": impl}
    whole = generate(700, offset=offset, **key)
    for start, stop in ((0, 1), (5, 6), (3, 300), (128, 700), (699, 700)):
        part = generate(stop - start, offset=offset + start, **key)
        assert bits(part) == bits(whole[start:stop])


def test_far_blocks_do_not_repeat() -> None:
    """The upper half of the block number is part of the counter."""
    key = {"seed": 1, "stream": 2, "draw": 3}
    near = noise.normal(64, offset=0, **key)
    far = noise.normal(64, offset=8 * 2**32, **key)
    assert bits(near) != bits(far)


def test_no_numbers() -> None:
    assert noise.normal(0, seed=0, stream=0, draw=0).shape == (0,)


def test_torch_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    noise.normal(1000, seed=0, stream=0, draw=0)
    noise.rademacher(1000, seed=0, stream=0, draw=0)
    assert torch.equal(before, torch.get_rng_state())


def test_fused_multiply_adds_of_the_table_are_exact() -> None:
    """The table's float64 products round as the C library's fmaf does, on every argument."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    fused = np.frompyfunc(fmaf, 3, 1)

    def fma(a, b, c):
        return fused(a, b, c).astype(np.float32)

    h = np.arange(65536, dtype=np.uint16).view(np.int16)
    x = h.astype(np.float32) + np.float32(0.5)
    q = fma(x, x, philox.Q_SHIFT).view(np.int32)
    u = fma(q.astype(np.float32), philox.U_SCALE, philox.U_SHIFT)
    f = ((q & 0x7FFFFF) | 0x3F800000).view(np.float32)
    c = fma(fma(fma(philox.C3, f, philox.C2), f, philox.C1), f, philox.C0)
    p = fma(fma(fma(philox.P4, u, philox.P3), u, philox.P2), u, philox.P1)
    expected = x * fma(p, u, c)
    assert bits(philox.normal_table(torch.device("cpu"))) == expected.view(np.int32).tolist()


def test_table_is_the_normal_quantile() -> None:
    """Of all 65,536 values: symmetric, increasing, of unit variance, close to Phi everywhere."""
    table = philox.normal_table(torch.device("cpu")).double()
    ordered = torch.cat((table[32768:], table[:32768]))
    assert torch.equal(ordered, -ordered.flip(0))
    assert (ordered.diff() > 0).all()
    assert abs((table**2).mean() - 1) < 1e-6
    assert abs((table**4).mean() - 3) < 5e-3
    assert 4.3 < table.max() < 4.4
    probability = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    assert (torch.special.ndtr(ordered) - probability).abs().max() < 1e-4


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return noise.normal(2**24, seed=42, stream=noise.stream("weight"), draw=0).double().numpy()


def test_moments(sample: np.ndarray) -> None:
    assert abs(sample.mean()) < 1e-3
    assert abs(sample.var() - 1) < 1e-3
    assert abs(stats.skew(sample)) < 5e-3
    assert abs(stats.kurtosis(sample)) < 0.02
    assert np.abs(sample).max() > 4


def test_kolmogorov_smirnov(sample: np.ndarray) -> None:
    assert stats.kstest(sample, "norm").pvalue > 0.01


def test_rademacher_is_fair() -> None:
    signs = noise.rademacher(2**24, seed=42, stream=7, draw=0)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert abs(float(signs.double().mean())) < 4 / math.sqrt(2**24)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01, 0.001])
def test_rate_of_the_mask(density: float) -> None:
    """Within 3 standard errors of the density, which is a multiple of 2^-16."""
    n = 2**24
    rate = float(noise.mask(n, seed=42, stream=7, draw=0, density=density).double().mean())
    density = round(density * 65536) / 65536
    assert abs(rate - density) <= 3 * math.sqrt(density * (1 - density) / n)


def test_extreme_densities() -> None:
    """From the least, a step of 2^-16, to what rounds to 1 and masks nothing."""
    n, key = 2**20, {"seed": 42, "stream": 7, "draw": 0}
    index = torch.arange(n)
    bits = philox.halfwords(index, purpose=philox.PURPOSE_MASK, **key)
    for density in (2**-16, 2**-17):
        assert torch.equal(noise.mask(n, density=density, **key), bits == 0)
    assert torch.equal(noise.mask(n, density=1 - 2**-16, **key), bits != 65535)
    for density in (1, 1.0, 1 - 2**-18):
        assert noise.mask(n, density=density, **key).all()
    assert noise.mask(0, density=0.5, **key).shape == (0,)


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_mask_is_independent(density: float) -> None:
    """Of the numbers that it masks, their magnitudes, and other masks: within 4 sigma of none."""
    n = 2**20
    key = {"seed": 1000, "stream": 500, "draw": 70}
    whole = noise.mask(n + 8, density=density, **key).double()
    mask, z = whole[:n], noise.normal(n, **key).double()
    others = [z, z.abs(), z**2, noise.rademacher(n, **key).double(), whole[1 : n + 1], whole[8:]]
    for what in ("seed", "stream", "draw"):
        others.append(noise.mask(n, density=density, **{**key, what: key[what] + 1}).double())
    for other in others:
        left, right = mask - mask.mean(), other - other.mean()
        sigma = math.sqrt(float((left**2).mean() * (right**2).mean()) / n)
        assert abs(float((left * right).mean())) <= 4 * sigma


@pytest.mark.parametrize("generate", [noise.normal, noise.rademacher])
@pytest.mark.parametrize("what", ["seed", "stream", "draw", "index"])
def test_no_correlation(generate, what: str) -> None:
    """Neighbouring seeds, streams, draws and indices: within 4 sigma of none."""
    n = 2**20
    key = {"seed": 1000, "stream": 500, "draw": 70}
    if what == "index":
        whole = generate(n + 9, **key).double()
        runs = [whole[lag : n + lag] for lag in range(9)]
        pairs = [(runs[0], run) for run in runs[1:]]
    else:
        runs = [generate(n, **{**key, what: key[what] + i}).double() for i in range(5)]
        pairs = [*list(pairwise(runs)), (runs[0], runs[-1])]
    for a, b in pairs:
        for f in (lambda x: x, lambda x: x**2 - 1, lambda x: x.abs() - x.abs().mean()):
            left, right = f(a), f(b)
            sigma = math.sqrt(float((left**2).mean() * (right**2).mean()) / n)
            assert abs(float((left * right).mean())) <= 4 * sigma


def test_purposes_do_not_share_bits() -> None:
    index = torch.arange(4096)
    key = {"seed": 3, "stream": 4, "draw": 5}
    purposes = (philox.PURPOSE_DIRECTION, philox.PURPOSE_ROUNDING, philox.PURPOSE_MASK)
    halves = [philox.halfwords(index, purpose=purpose, **key) for purpose in purposes]
    for a, b in combinations(halves, 2):
        assert (a == b).sum() < 5


def test_the_package_has_no_generator() -> None:
    """No call by which torch or numpy would draw from, or set, a stateful generator."""
    stateful = {
        *("manual_seed", "seed_all", "Generator", "default_rng", "RandomState", "normal_"),
        *("uniform_", "bernoulli_", "bernoulli", "random_", "exponential_", "multinomial"),
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
    }
    package = Path(zoopt.__file__).parent
    # The published MeZO, which is measured beside ours, draws as its authors do.
    for path in {*package.rglob("*.py")} - {package / "bench" / "published_mezo.py"}:
        tree = ast.parse(path.read_text())
        called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
        names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called}
        assert not names & stateful, path


def test_stream() -> None:
    assert noise.stream(17) == 17
    assert noise.stream("model.layers.0.weight") == GOLDEN["streams"]["model.layers.0.weight"]
    names = [f"layer.{i}.{kind}" for i in range(500) for kind in ("weight", "bias")]
    assert len({noise.stream(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"numel": -1}, ValueError, "numel must be a positive int, got -1"),
        ({"numel": 1.5}, TypeError, "numel must be a positive int, got 1.5"),
        ({"seed": -1}, ValueError, r"seed must be an int in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be an int in \[0, 2\^64\)"),
        ({"stream": 2**32}, ValueError, r"stream must be an int in \[0, 2\^32\)"),
        ({"draw": 2**32}, ValueError, r"draw must be an int in \[0, 2\^32\)"),
        ({"draw": True}, ValueError, "draw must be an int"),
        ({"offset": -1}, ValueError, r"offset must be an int in \[0, 2\^59\), got -1"),
        ({"impl": "cuda"}, ValueError, "impl must be None or one of 'reference', 'numba'"),
    ],
)
def test_errors(arguments: dict, error: type[Exception], message: str) -> None:
    valid = {"numel": 4, "seed": 0, "stream": 0, "draw": 0}
    with pytest.raises(error, match=message):
        noise.normal(**{**valid, **arguments})


@pytest.mark.parametrize(
    ("density", "error", "message"),
    [
        (0.0, ValueError, "density must be a finite number > 0 and <= 1, got 0.0"),
        (1.01, ValueError, "density must be a finite number > 0 and <= 1, got 1.01"),
        (math.nan, ValueError, "density must be a finite number > 0 and <= 1, got nan"),
        (True, TypeError, "density must be a finite number > 0 and <= 1, got True"),
        (
            2**-18,
            ValueError,
            r"density must be at least 2\^-17, got .*; pass 1.53e-05 for the least",
        ),
    ],
)
def test_density_errors(density: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise.mask(4, seed=0, stream=0, draw=0, density=density)


@pytest.mark.parametrize("name", [1.5, None, True])
def test_stream_errors(name: object) -> None:
    with pytest.raises(TypeError, match="name_or_position must be a str or an int"):
        noise.stream(name)  # type: ignore[arg-type]
