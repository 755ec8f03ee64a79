"""QES: codes that move by whole steps, and the remainders that are carried."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zoopt
from tests.reference.qes_float64 import QES64
from tests.test_quantised import loss_of, model
from zoopt.nn import convert_to_quantised
from zoopt.nn.packing import unpack
from zoopt.noise import normal, stream


def quantised(bits: int = 4) -> Any:
    return convert_to_quantised(
        model(torch.float64), lambda name, module: True, bits=bits, group_size=8
    )


def codes_of(net: nn.Module, name: str) -> torch.Tensor:
    layer: Any = net.get_submodule(name)
    return unpack(layer.codes, layer.in_features, layer.bits)


@pytest.mark.parametrize("window", [4, 50])
def test_is_the_evolution_strategy(window: int) -> None:
    """Its codes are the transcription's, over more steps than a window; g in float64."""
    net = nn.Sequential(quantised(3)[2])
    layer: Any = net[0]
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (net(x) - 1.0).square().mean()

    scale = layer.scale.detach().repeat_interleave(8, 1)[:, :33].numpy()
    zero = layer.zero.repeat_interleave(8, 1)[:, :33].numpy().astype(float)

    def loss64(codes: np.ndarray) -> float:
        return float(np.mean((x.numpy() @ (scale * (codes - zero)).T - 1.0) ** 2))

    oracle = QES64(lr=0.6, sigma=0.5, levels=8, window=window)
    codes = codes_of(net, "0").numpy().astype(float)
    start = codes.copy()
    optimizer = zoopt.QES(net, lr=0.6, sigma=0.5, num_probes=2, window=window, seed=3)
    for number in range(12):
        zs = [
            normal(7 * 33, seed=3, stream=stream("qes 0"), draw=2 * number + j)
            .view(7, 33)
            .double()
            .numpy()
            for j in range(2)
        ]
        optimizer.step(loss)
        codes = oracle.step(loss64, codes, zs)
        assert np.array_equal(codes_of(net, "0").numpy(), codes), number
    assert 0.02 < np.mean(codes != start) < 0.98


def test_codes_learn_where_every_step_is_below_a_half() -> None:
    """Rounded without what is carried, nothing would move."""
    net = quantised()
    before = copy.deepcopy(net.state_dict())
    start = loss_of(net).item()
    optimizer = zoopt.QES(net, lr=0.8, num_probes=4, window=200, seed=0)
    largest = 0.0
    for _ in range(150):
        optimizer.step(lambda: loss_of(net))
        weights = [weight for _, weight in optimizer._steps[-1]]
        largest = max(largest, sum(weight**2 for weight in weights) ** 0.5)
    assert largest < 0.125  # 4 sigma of a step, which is normal, below a half
    assert loss_of(net).item() < 0.85 * start
    moved = {
        name for name, value in net.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"0.codes", "2.codes"}


def test_resume_is_exact_and_a_probe_leaves_no_trace() -> None:
    net = quantised()
    optimizer = zoopt.QES(net, lr=0.5, window=6, seed=0)
    for _ in range(5):
        optimizer.step(lambda: loss_of(net))
    other = quantised()
    other.load_state_dict(net.state_dict())
    resumed = zoopt.QES(other, lr=0.5, window=6, seed=9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(7):
        optimizer.step(lambda: loss_of(net))
        resumed.step(lambda: loss_of(other))
    assert torch.equal(net[0].codes, other[0].codes)
    before, logits = copy.deepcopy(net.state_dict()), loss_of(net)
    assert optimizer.step(lambda: float("nan")) != 0.0
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(loss_of(net), logits)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_refuses() -> None:
    with pytest.raises(ValueError, match="model must have layers of integer codes, got none"):
        zoopt.QES(model(), lr=1.0)
    for bad, message in (
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"sigma": 0.0}, "sigma must be a finite number > 0, got 0.0"),
        ({"window": 0}, "window must be a positive int, got 0"),
        ({"num_probes": 0}, "num_probes must be a positive int, got 0"),
        ({"max_projected_grad": 0.0}, "max_projected_grad must be a finite number > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            zoopt.QES(quantised(), **{"lr": 1.0, **bad})
    with pytest.raises(ValueError, match="state must be one of QES"):
        zoopt.QES(quantised(), lr=1.0).load_state_dict({})
