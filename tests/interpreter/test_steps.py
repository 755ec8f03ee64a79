"""Whole steps in Triton's interpreter: passes that are made together leave the CPU's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoopt
from zoopt.kernels import dispatch

CASES: list[tuple[Any, dict[str, Any]]] = [
    (zoopt.MeZO, {"num_probes": 2, "weight_decay": 0.1}),
    (zoopt.MeZO, {"momentum": 0.9}),
    (zoopt.MeZO, {"mask": "random", "density": 0.5, "momentum": 0.5, "momentum_window": 3}),
    (zoopt.ZOAdam, {"state": "window", "window": 2}),
]


def trained(cls: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    """The weights after two steps; one parameter's memory is not in row-major order."""
    torch.manual_seed(3)
    params = [torch.randn(size) for size in (7, 300, 20)] + [torch.randn(6, 5).t()]
    params = [torch.nn.Parameter(param) for param in params]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-2}]
    optimizer = cls(groups, 1e-2, perturbation="inplace", seed=1, **options)
    for _ in range(2):
        optimizer.step(lambda: sum(param.square().sum() for param in params))
    return [param.detach() for param in params]


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_steps_have_the_bits_of_the_cpu(
    cls: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(cls, options)
    monkeypatch.setattr(dispatch, "_best", lambda theta: "triton")
    assert dispatch.launches(expected[0])
    got = trained(cls, options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
