"""Adafactor in GaLore's subspace, and Adafactor itself against torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoopt
from zoopt.first_order.adafactor import factored_, root_mean_square


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng([seed, *shape]).standard_normal(shape))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "beta2_decay": -0.5, "d": 2.0, "eps": (1e-3, 1e-1)},
        {"lr": 1.0, "maximize": True},
    ],
    ids=["defaults", "all", "ascent"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_with_relative_steps_it_is_torchs(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """Over 6 steps, of weights around 1: a few roundings each."""
    shapes = [(6, 4), (3, 2, 3, 3), (7,), ()]
    ours, theirs = (
        [torch.nn.Parameter(normal(*shape, seed=1).to(dtype)) for shape in shapes] for _ in range(2)
    )
    optimizers = (
        zoopt.GaLoreAdafactor(ours, rank=None, relative_step=True, **options),
        torch.optim.Adafactor(theirs, **options),
    )
    for step in range(6):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for param in params:
                param.grad = normal(*param.shape, seed=step + 2).to(dtype)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@given(m=st.integers(1, 8), n=st.integers(1, 8), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_squares_of_rank_one_are_kept_whole(m: int, n: int, seed: int) -> None:
    """Then g / sqrt(v) is the signs; and v of other gradients has the squares' row and column sums.

    Both are the definition of the factors: v = row column / mean.
    """
    row, column = torch.zeros(m, 1).double(), torch.zeros(1, n).double()
    outer = normal(m, 1, seed=seed) * normal(1, n, seed=seed + 1)
    update = factored_(outer, row, column, mix=1.0, eps=1e-30)
    torch.testing.assert_close(update, outer.sign())
    gradient = normal(m, n, seed=seed + 2)
    update = factored_(gradient, row, column, mix=1.0, eps=1e-30)
    v = (gradient / update).square()
    torch.testing.assert_close(v.sum(0), gradient.square().sum(0))
    torch.testing.assert_close(v.sum(1), gradient.square().sum(1))


@pytest.mark.parametrize("rank", [None, 3])
def test_a_transposed_weight_has_the_transposed_update(rank: int | None) -> None:
    params = [
        torch.nn.Parameter(normal(9, 5, seed=1)),
        torch.nn.Parameter(normal(9, 5, seed=1).t()),
    ]
    optimizer = zoopt.GaLoreAdafactor(params, rank=rank, projector="svd", seed=1)
    for step in range(3):
        gradient = normal(9, 5, seed=step + 2)
        params[0].grad, params[1].grad = gradient, gradient.t()
        optimizer.step()
    torch.testing.assert_close(params[0], params[1].t())


def test_steps_are_clipped_in_the_subspace() -> None:
    """A gradient 100 times the ones before: RMS(U) would be 100 sqrt(s) of the second step."""
    param = torch.nn.Parameter(torch.zeros(12, 6).double())
    optimizer = zoopt.GaLoreAdafactor(
        [param], lr=1.0, rank=4, scale=1.0, d=1.5, beta2_decay=-3.0, seed=1
    )
    for size in (1.0, 100.0):
        before = param.detach().clone()
        param.grad = size * normal(12, 6, seed=int(size))
        optimizer.step()
        moved = (param.detach() - before) @ optimizer.bases(param)["basis"]
    assert float(root_mean_square(moved)) == pytest.approx(1.5)


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
@pytest.mark.parametrize("eps", [None, 0.0, 1e-30])
def test_without_a_gradient_nothing_moves(shape: tuple[int, ...], eps: float | None) -> None:
    """Where torch's divides 0 by 0."""
    param = torch.nn.Parameter(torch.ones(shape))
    optimizer = zoopt.GaLoreAdafactor([param], rank=None, eps=(eps, 1e-3))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, torch.ones(shape))
    param.grad.view(-1)[0] = 1e-3
    optimizer.step()
    assert bool(param.isfinite().all())
    assert param.view(-1)[0] < 1.0


def test_small_gradients_in_bfloat16_are_not_cut_at_its_epsilon() -> None:
    """Of 1e-4, below bfloat16's epsilon of 2^-7: the first step is of length lr all the same."""
    param = torch.nn.Parameter(torch.zeros(32, 16, dtype=torch.bfloat16))
    optimizer = zoopt.GaLoreAdafactor([param], lr=1.0, rank=None, seed=1)
    param.grad = (1e-4 * normal(32, 16, seed=1)).bfloat16()
    optimizer.step()
    assert float(root_mean_square(param.detach())) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("rank", [None, 48])
def test_an_average_in_codes_of_a_float64_weight(rank: int | None) -> None:
    """int8's levels are 1 / 64 of the largest apart at most, and the largest is 4 or so."""
    moved = []
    for state_dtype in ("float32", "int8"):
        param = torch.nn.Parameter(torch.zeros(96, 48).double())
        optimizer = zoopt.GaLoreAdafactor(
            [param], lr=1.0, rank=rank, beta1=0.5, state_dtype=state_dtype, scale=1.0, seed=1
        )
        for step in range(3):
            param.grad = normal(96, 48, seed=step)
            optimizer.step()
        moved.append(param.detach())
    assert 0.0 < float(root_mean_square(moved[0] - moved[1])) < 1 / 16


def test_refuses_what_has_no_meaning() -> None:
    weight = [torch.nn.Parameter(torch.ones(4, 4))]
    for options, message in (
        ({"beta2_decay": 0.1}, "beta2_decay must be a finite number <= 0, got 0.1"),
        ({"d": 0.5}, "d must be a finite number >= 1, got 0.5"),
        ({"beta1": 1.0}, "beta1 must be a finite number >= 0 and < 1, got 1.0"),
        ({"eps": (-1.0, 1e-3)}, r"eps\[0\] must be a finite number >= 0, got -1.0"),
        ({"rank": 0}, "rank must be a positive int, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            zoopt.GaLoreAdafactor(weight, **options)
    with pytest.raises(TypeError, match="eps must be a pair"):
        zoopt.GaLoreAdafactor(weight, eps=1e-8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="relative_step must be a bool, got 1"):
        zoopt.GaLoreAdafactor(weight, relative_step=1)  # type: ignore[arg-type]
