"""The Triton kernels in Triton's interpreter: the reference's bits.

Runs in a process of its own, with TRITON_INTERPRET=1 (tests/test_triton.py starts it).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoopt import kernels, noise
from zoopt.kernels.noise import philox
from zoopt.kernels.noise.key import NoiseKey

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTRIBUTIONS = ["normal", "rademacher"]
GOLDEN = Path(__file__).parents[1] / "golden" / "noise_v1.json"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(width), b.view(width))


def test_golden_file() -> None:
    for case in json.loads(GOLDEN.read_text())["cases"]:
        key = {name: case[name] for name in ("seed", "stream", "draw", "offset")}
        normals = noise.normal(len(case["normal_bits"]), impl="triton", **key)
        assert normals.view(torch.int32).tolist() == case["normal_bits"]
        signs = noise.rademacher(len(case["signs"]), impl="triton", **key)
        assert signs.tolist() == case["signs"]


def test_golden_masks() -> None:
    for case in json.loads(GOLDEN.read_text())["masks"]:
        key = {name: case[name] for name in ("seed", "stream", "draw", "offset", "density")}
        mask = noise.mask(len(case["mask"]), impl="triton", **key)
        assert mask.tolist() == [bool(kept) for kept in case["mask"]]


def test_all_values_of_the_table_occur_and_agree() -> None:
    """A million normals: all but e^-16 of the 65,536 values, each with the table's bits."""
    key = {"seed": 1, "stream": 2, "draw": 3}
    got = noise.normal(1 << 20, impl="triton", **key)
    expected = noise.normal(1 << 20, impl="reference", **key)
    assert same_bits(got, expected)
    assert len(got.unique()) > 65_500
    assert torch.isin(got, philox.normal_table(torch.device("cpu"))).all()


def adam_window(theta: torch.Tensor, **key) -> torch.Tensor:
    """A step of two directions, one of one, and a direction after the last step."""
    coefficients, gradients = [0.1, 0.0, 0.0, -0.2], [1.0, -2.0, 0.5, 1.0]
    first, second, closes = [0.0, 0.3, 1.0, 0.0], [0.0, 0.4, 1.0, 0.0], [False, True, True, False]
    args = (coefficients, gradients, first, second, closes)
    return kernels.adam_window_(theta, *args, eps=1e-8, step_size=-0.1, **key)


@pytest.mark.parametrize(("numel", "offset"), [(1, 3), (4096 + 17, 0), (600, 2**32 - 5)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_same_bits(
    density: float, dtype: torch.dtype, distribution: str, numel: int, offset: int
) -> None:
    key = NoiseKey(2**63 + 5, 2**31 + 1, offset, distribution, density)
    theta = (torch.randn(numel) * 10.0 ** torch.randint(-9, 5, (numel,))).to(dtype)
    # A zero keeps its sign where the mask is 0.
    theta[:1] = -0.0
    update = torch.linspace(1, -1, numel)
    results: dict[str, list[torch.Tensor]] = {"triton": [], "reference": []}
    for impl, out in results.items():
        out.append(kernels.perturb(theta, 1e-3, draw=9, impl=impl, key=key))
        scales = torch.linspace(0.5, 2.0, numel if numel < 600 else 13 if numel > 600 else 40)
        shaped = theta[: numel // len(scales) * len(scales)].view(len(scales), -1)
        out.append(kernels.perturb(shaped, 0.3, draw=9, impl=impl, key=key, row_scale=scales))
        for rounding in ("nearest", "stochastic"):
            whole = {"key": key, "draws": [1, 2**32 - 1], "decay": 0.99, "rounding": rounding}
            out.append(kernels.apply_(theta.clone(), [0.1, -0.2], impl=impl, **whole))
            target, buffer = theta.clone(), torch.linspace(-1, 1, numel)
            kernels.momentum_(
                target,
                buffer,
                [0.1, 0.0],
                [1.0, 2.0],
                momentum=0.9,
                step_size=-0.01,
                impl=impl,
                **whole,
            )
            out += [target, buffer]
            out.append(kernels.add_(theta.clone(), update, [0.1, -0.2], impl=impl, **whole))
            alone = {**whole, "draws": [], "rounding_draw": 7}
            out.append(kernels.add_(theta.clone(), update, [], impl=impl, **alone))
            out.append(adam_window(theta.clone(), impl=impl, **{**whole, "draws": [1, 3, 5, 9]}))
    for a, b in zip(*results.values(), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_rows(density: float, dtype: torch.dtype, distribution: str) -> None:
    weight, rows = torch.randn(20, 37).to(dtype), torch.tensor([[3, 19], [0, 3]])
    key = {"draw": 4, "key": NoiseKey(7, 8, 5, distribution, density)}
    got = kernels.perturb_rows(weight, rows, 0.1, impl="triton", **key)
    assert same_bits(got, kernels.perturb(weight, 0.1, impl="reference", **key)[rows])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_rows_of_whole_blocks(density: float, distribution: str) -> None:
    """Rows that begin and end at Philox blocks, and groups of eight that share a row's scale."""
    weight, rows = torch.randn(20, 256).bfloat16(), torch.tensor([3, 19, 0])
    scales = torch.randn(20)
    for offset in (0, 128):
        own = {"draw": 4, "key": NoiseKey(7, 8, offset, distribution, density)}
        expected = kernels.perturb(weight, 0.1, impl="reference", **own)[rows]
        assert same_bits(kernels.perturb_rows(weight, rows, 0.1, impl="triton", **own), expected)
        shaped = [
            kernels.perturb(weight, 0.1, row_scale=scales, impl=impl, **own)
            for impl in ("triton", "reference")
        ]
        assert same_bits(*shaped)
