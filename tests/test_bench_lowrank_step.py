"""The low-rank step's benchmark: its floor does the work it claims, and its figures add up."""

from __future__ import annotations

import math

import pytest
import torch

from bench import lowrank_step
from bench.lowrank_step import Drift, Floor, captured, method_rows, shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_the_floor_makes_both_products(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theta = torch.randn(shape).to(dtype)
    before = theta.double()
    floor = Floor(theta, 3)
    floor()
    gradient, basis = floor.gradient.double(), floor.basis.double()
    projected = gradient @ basis @ basis.t() if floor.right else basis @ basis.t() @ gradient
    # Two products and a sum, of numbers below 100, each rounded to dtype.
    tolerance = 4 * torch.finfo(dtype).eps * (1 + before.abs().max() + 1e-3 * 100)
    assert (theta.double() - before - 1e-3 * projected).abs().max() < tolerance
    assert floor.right == (shape[0] >= shape[1])
    assert [tuple(moment.shape) for moment in floor.moments] == [(max(shape), 3)] * 2


def test_a_layer_has_seven_matrices() -> None:
    size = lowrank_step.SIZES["7b"]
    counts = {kind: count for kind, (*_, count) in shapes(size).items()}
    assert counts == {"attention": 4, "up": 2, "down": 1}
    assert sum(m * n * count for m, n, count in shapes(size).values()) == (
        4 * 4096**2 + 3 * 4096 * 11008
    )


def test_as_many_layers_as_fit_are_stepped_together() -> None:
    small, large = lowrank_step.SIZES["60m"], lowrank_step.SIZES["7b"]
    assert lowrank_step.layers_held(small, 512, 512, 4) == small.layers == 8
    assert lowrank_step.layers_held(large, 4096, 4096, 4) == 1


def test_a_refresh_is_spread_over_its_steps() -> None:
    times = {"floor": [1e-3, 1e-3], "zoopt": [2e-3, 2e-3], "published": [4e-3, 4e-3]}
    rows = method_rows("x", times, {"zoopt": 0.2, "published": 2.0})
    floor, zoopt, published = rows
    assert (floor["ratio"], floor["refresh_ms"], floor["amortised_ratio"]) == (1.0, 0.0, 1.0)
    # A 200th of 200 ms is 1 ms, of 2 s 10 ms.
    assert zoopt["amortised_ms"] == pytest.approx(3.0)
    assert published["amortised_ms"] == pytest.approx(14.0)
    assert zoopt["published_over"] == pytest.approx(2.0)
    assert zoopt["amortised_published_over"] == pytest.approx(14 / 3)
    assert zoopt["unit"] == "ms"


def test_minibatches_share_a_signal_that_turns() -> None:
    torch.manual_seed(0)
    angle = 0.2
    drift = Drift(64, 16, angle, torch.device("cpu"))
    first, second = drift.minibatch(), drift.minibatch()
    signal = (drift.left * drift.values) @ drift.right.t()
    # The noise has the signal's norm, and two minibatches' noises are independent.
    assert float((first - signal).norm() / signal.norm()) == pytest.approx(1.0, rel=1e-4)
    noises = ((first - signal) * (second - signal)).sum() / signal.square().sum()
    assert abs(float(noises)) < 4 / 64
    assert captured(signal, drift.right) == pytest.approx(1.0, abs=1e-5)
    assert captured(second, drift.right[:, :4]) > captured(second, drift.right[:, 4:8])
    before = drift.right.clone()
    drift.advance()
    cosines = (before * drift.right).sum(0)
    # cos(angle), but for what of the fresh directions lies along the old ones: 1/8 of sin(angle).
    assert float((cosines - math.cos(angle)).abs().max()) < 4 * math.sin(angle) / 8
    assert (drift.right.t() @ drift.right - torch.eye(16)).abs().max() < 1e-5
