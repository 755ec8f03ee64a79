"""Projected methods at gradients of any finite size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoopt
from zoopt.first_order.projected.subspace import Projector, subspace

#: Powers of two, between where float32's entries lose bits and where their sums overflow.
SIZES = (2.0**-90, 2.0**-80, 2.0**-30, 2.0**30, 2.0**63, 2.0**110)
CLASSES: dict[str, dict[str, Any]] = {
    "GaLoreAdamW": {"rank": 4},
    "GaLoreAdafactor": {"rank": 4},
    "QGaLoreAdamW": {"rank": 4},
    "Apollo": {"rank": 4},
    "ApolloMini": {},
    "Fira": {"rank": 4},
    "LDAdamW": {"rank": 4},
    "Frugal": {"projector": "warm"},
    "GradNormLoRP": {"rank": 4},
}


def decaying(m: int, n: int) -> Tensor:
    """Of singular values from 1 to 1e-3, the largest entry between 0.1 and 1."""
    generator = torch.Generator().manual_seed(m)
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(d, k, generator=generator)).Q for d in (m, n))
    return (u * torch.logspace(0, -3, k)) @ v.t()


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("projector", ["svd", "gram", "randomized", "warm"])
def test_a_basis_does_not_depend_on_the_gradients_size(
    projector: Projector, size: float, right: bool
) -> None:
    """Powers of two change no rounding: the bits are those of the gradient itself."""
    gradient = decaying(40, 24)
    previous = torch.linalg.qr(torch.randn(24 if right else 40, 6)).Q
    options: dict[str, Any] = {"right": right, "projector": projector, "previous": previous}
    expected, found = (
        subspace(g, 6, seed=1, stream=2, draw=3, **options) for g in (gradient, gradient * size)
    )
    # An SVD may scale by itself, by numbers that are no powers of two.
    tolerance = 1e-4 if projector == "svd" else 0.0
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**63, 2.0**100, 2.0**120])
@pytest.mark.parametrize("name", CLASSES)
def test_a_finite_gradient_of_any_size_makes_a_finite_step(name: str, size: float) -> None:
    """After which ordinary gradients go on. Squares above 2^128 make a NaN of Adafactor, as of
    torch's own, and a step of 0 of Adam."""
    if name == "GaLoreAdafactor":
        size = min(size, 2.0**63)
    params = [torch.nn.Parameter(torch.randn(40, 24)), torch.nn.Parameter(torch.randn(12, 20))]
    optimizer = getattr(zoopt, name)(params, lr=1e-3, seed=1, **CLASSES[name])
    for gradient_size in (size, size, 1.0):
        for param in params:
            param.grad = decaying(*param.shape) * gradient_size
        optimizer.step()
        assert all(bool(param.isfinite().all()) for param in params)
    assert all(int(optimizer.state[param]["step"]) > 0 for param in params)


def test_an_svd_that_fails_has_a_substitute(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    gradient = decaying(30, 20)
    expected = subspace(
        gradient, 4, right=True, projector="gram", previous=None, seed=0, stream=0, draw=0
    )
    monkeypatch.setattr(torch.linalg, "svd", fails)
    weights = [torch.nn.Parameter(torch.zeros(30, 20)) for _ in range(2)]
    optimizer = zoopt.GaLoreAdamW(weights, rank=4, projector="svd")
    for weight in weights:
        weight.grad = gradient.clone()
    optimizer.step()
    for weight in weights:
        assert torch.equal(optimizer.bases(weight)["basis"], expected)
