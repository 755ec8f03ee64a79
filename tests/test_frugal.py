"""FRUGAL: what has state, what has signs, and when the state begins anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoopt
from tests.first_order_table import backward, net
from zoopt.first_order.projected.columns import random_columns


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng([seed, *shape]).standard_normal(shape))


def stepped(gradient: torch.Tensor, **options: Any) -> tuple[torch.Tensor, zoopt.Frugal]:
    """By how much one step moves a weight of zeros, and the optimizer."""
    param = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = zoopt.Frugal([param], **{"lr": 1.0, "seed": 1, **options})
    param.grad = gradient
    optimizer.step()
    return param.detach(), optimizer


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    density=st.floats(0.05, 0.95),
    side=st.sampled_from(("std", "reverse_std", "left", "right")),
    projector=st.sampled_from(("columns", "orthogonal", "svd", "warm")),
)
@settings(deadline=None, max_examples=40)
def test_a_step_is_the_rule_inside_and_signs_outside(
    m: int, n: int, density: float, side: Any, projector: Any
) -> None:
    """The first step of momentum is R itself. Signs that rounding decides are left out."""
    gradient = normal(m, n, seed=3)
    moved, optimizer = stepped(
        gradient,
        rule="momentum",
        density=density,
        proj_type=side,
        projector=projector,
        sign_lr_scale=0.5,
    )
    basis = optimizer.bases(optimizer.param_groups[0]["params"][0])["basis"]
    left = side == "left" or (side == "std" and m < n) or (side == "reverse_std" and m >= n)
    assert basis.shape[0] == (m if left else n)
    assert torch.allclose(basis.t() @ basis, torch.eye(basis.shape[1]).double(), atol=1e-12)
    inside = basis @ (basis.t() @ gradient) if left else gradient @ basis @ basis.t()
    outside = gradient - inside
    exact = projector == "columns" or basis.shape[0] == basis.shape[1]
    if basis.shape[0] == basis.shape[1]:
        outside = torch.zeros_like(gradient)
    clear = (outside.abs() > 1e-9) | ((outside == 0) & torch.tensor(exact))
    expected = -inside - 0.5 * outside.sign()
    torch.testing.assert_close(moved[clear], expected[clear])


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_columns_are_moved_by_the_rule_alone_and_all_others_by_signs(proj_type: Any) -> None:
    gradient = normal(8, 12, seed=1)
    moved, optimizer = stepped(gradient, rule="momentum", proj_type=proj_type, sign_lr_scale=0.1)
    basis = optimizer.bases(optimizer.param_groups[0]["params"][0])["basis"]
    chosen = basis.sum(1) > 0
    if proj_type == "left":
        moved, gradient = moved.t(), gradient.t()
    assert int(chosen.sum()) == (2 if proj_type == "left" else 3)
    assert torch.equal(moved[:, chosen], -gradient[:, chosen])
    assert torch.equal(moved[:, ~chosen], -0.1 * gradient[:, ~chosen].sign())


def test_the_first_step_of_adam_or_lion_is_signsgd() -> None:
    gradient = normal(9, 7, seed=1)
    for rule in ("adam", "lion"):
        moved, _ = stepped(gradient, rule=rule, eps=0.0)
        torch.testing.assert_close(moved, -gradient.sign())


@pytest.mark.parametrize("options", [{"density": None}, {"density": 1.0, "projector": "svd"}])
def test_without_a_subspace_it_is_the_rule(options: dict[str, Any]) -> None:
    models = net(), net()
    shared: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1, "seed": 1}
    optimizers = (
        zoopt.Frugal(models[0].named_parameters(), **shared, **options, update_proj_gap=2),
        zoopt.AdamW(models[1].named_parameters(), **shared),
    )
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model)
            optimizer.step()
    for ours, adamw in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, adamw)


@pytest.mark.parametrize("projector", ["columns", "svd"])
@pytest.mark.parametrize("stagger", [True, False])
def test_moments_begin_anew_with_each_subspace_and_only_then(projector: Any, stagger: bool) -> None:
    """After the first step of a subspace, and no other, m is (1 - b1) R."""
    params = [torch.nn.Parameter(normal(12, 8, seed=i)) for i in range(2)]
    optimizer = zoopt.Frugal(
        params, update_proj_gap=4, projector=projector, stagger=stagger, seed=1, betas=(0.9, 0.99)
    )
    changed: list[list[int]] = [[], []]
    fresh: list[list[int]] = [[], []]
    bases: list[torch.Tensor | None] = [None, None]
    for step in range(10):
        for i, param in enumerate(params):
            param.grad = normal(12, 8, seed=100 * i + step)
        optimizer.step()
        for i, param in enumerate(params):
            basis = optimizer.bases(param)["basis"].clone()
            last = bases[i]
            if last is None or not torch.equal(basis, last):
                changed[i].append(step)
            bases[i] = basis
            assert param.grad is not None
            reduced = param.grad @ basis
            state = optimizer.state[param]
            if torch.allclose(state["exp_avg"], 0.1 * reduced):
                assert torch.allclose(state["exp_avg_sq"], 0.01 * reduced.square())
                fresh[i].append(step)
    assert fresh == changed == [[0, 4, 8], [0, 2, 6] if stagger else [0, 4, 8]]


def test_random_columns_are_distinct_ordered_and_equally_likely() -> None:
    """600 draws of 5 of 20: each is there 150 times, give or take 4 sqrt(600 / 4 * 3 / 4) = 42."""
    counts = torch.zeros(20)
    for draw in range(600):
        columns = random_columns(20, 5, seed=1, stream=2, draw=draw, device=torch.device("cpu"))
        assert (columns.diff() > 0).all()
        counts[columns] += 1
    assert (counts - 150).abs().max() <= 42


def test_betas_are_those_of_the_groups_rule() -> None:
    model = net()
    optimizer = zoopt.Frugal(
        [
            {"params": [model[0].weight]},
            {"params": [model[2].weight], "rule": "lion"},
            {"params": [model[5].weight], "rule": "lion", "betas": (0.5, 0.6)},
        ]
    )
    betas = [group["betas"] for group in optimizer.param_groups]
    assert betas == [(0.9, 0.999), (0.9, 0.99), (0.5, 0.6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.25, None])
def test_memory_layout_does_not_matter(dtype: torch.dtype, density: float | None) -> None:
    weight = normal(6, 4, 3, 3, seed=1).to(dtype)
    gradient = normal(6, 4, 3, 3, seed=2).to(dtype)
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(weight.clone(memory_format=layout))
        optimizer = zoopt.Frugal([param], density=density, rule="lion", weight_decay=0.1, seed=1)
        param.grad = gradient.clone(memory_format=layout)
        optimizer.step()
        moved.append(param.detach().contiguous())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], weight)


@pytest.mark.parametrize("projector", ["columns", "svd"])
def test_a_gradient_that_is_not_finite_makes_no_subspace(projector: Any) -> None:
    param = torch.nn.Parameter(normal(8, 8, seed=1))
    optimizer = zoopt.Frugal([param], update_proj_gap=2, projector=projector, seed=1)
    for step in range(2):
        param.grad = normal(8, 8, seed=step)
        optimizer.step()
    before = param.detach().clone(), str(optimizer.state_dict())
    param.grad = torch.full_like(param, torch.inf)
    optimizer.step()
    assert torch.equal(param, before[0])
    assert str(optimizer.state_dict()) == before[1]


def test_refuses_what_has_no_meaning() -> None:
    weight = [torch.nn.Parameter(torch.ones(4, 4))]
    for options, message in (
        ({"rule": "sgd"}, "rule must be one of 'adam', 'lion', 'momentum', got 'sgd'"),
        ({"density": 0.0}, "density must be a finite number > 0 and <= 1, got 0.0"),
        ({"density": 1.5}, "density must be a finite number > 0 and <= 1, got 1.5"),
        ({"projector": "random"}, "projector must be one of 'columns', 'orthogonal', 'svd'"),
        ({"proj_type": "full"}, "proj_type must be one of 'std', 'reverse_std', 'right', 'left'"),
        ({"momentum": 1.0}, "momentum must be a finite number >= 0 and < 1, got 1.0"),
        ({"sign_lr_scale": -1.0}, "sign_lr_scale must be a finite number >= 0, got -1.0"),
        ({"update_proj_gap": 0}, "update_proj_gap must be a positive int, got 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a finite number >= 0 and < 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            zoopt.Frugal(weight, **options)
