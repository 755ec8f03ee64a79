"""LDAdam: the basis that follows the gradient, the moments that follow the basis, the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoopt
from tests.first_order_table import backward, net
from tests.reference.ldadam_float64 import follow
from zoopt.first_order.projected.geometry import Geometry
from zoopt.first_order.projected.moving_basis import next_basis, rotated

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng([seed, *shape]).standard_normal(shape))


def orthogonal(n: int, r: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(n, r, seed=seed))[0]


@given(shape=SHAPES)
@settings(deadline=None, max_examples=30)
def test_a_power_step_is_the_definition_on_both_sides(shape: tuple[int, int, int, int]) -> None:
    """Against B formed whole. A (m, n) of a random matrix is of condition 1e4 here at the worst,
    and B^T B squares it: 1e-16 times 1e8."""
    m, n, r, seed = shape
    r = min(r, m, n)
    a, rest = normal(m, n, seed=seed), normal(m, n, seed=seed + 1)
    average, basis = normal(m, r, seed=seed), orthogonal(n, r, seed)
    expected = follow((a + rest).numpy(), average.numpy(), basis.numpy(), 0.7)
    right = next_basis([a, rest], average, basis, 0.7, Geometry(m, n, r, "right"))
    left = next_basis([a.t(), rest.t()], average, basis, 0.7, Geometry(n, m, r, "left"))
    for found in (right, left):
        assert torch.allclose(found.t() @ found, torch.eye(r, dtype=torch.float64), atol=1e-12)
        # The spaces: of nearly equal directions the bases themselves are not determined.
        difference = found @ found.t() - torch.tensor(expected @ expected.T)
        assert difference.abs().max() <= 1e-8


def test_power_steps_find_the_leading_directions() -> None:
    """A's singular values 2^-i: each step divides what is left outside rank 3 by 4."""
    u, v = orthogonal(12, 8, 1), orthogonal(9, 8, 2)
    a = u @ torch.diag(2.0 ** -torch.arange(8.0)).double() @ v.t()
    basis, geo = orthogonal(9, 3, 3), Geometry(12, 9, 3, "right")
    for _ in range(30):
        basis = next_basis([a], torch.zeros(12, 3).double(), basis, 0.9, geo)
    assert (v[:, :3] - basis @ (basis.t() @ v[:, :3])).abs().max() <= 1e-12


@given(channels=st.integers(1, 5), rank=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_rotated_moments_are_those_of_rotated_gradients(
    channels: int, rank: int, seed: int
) -> None:
    """Exactly, where the gradients' coordinates are uncorrelated: here by construction."""
    centred = normal(40, channels * rank, seed=seed)
    centred = torch.linalg.qr(centred - centred.mean(0))[0]
    centred = (centred - centred.mean(0)) * normal(channels * rank, seed=seed + 1)
    gradients = (centred + normal(channels * rank, seed=seed + 2)).view(40, channels, rank)
    change = orthogonal(rank, rank, seed)
    m, v = rotated(gradients.mean(0), gradients.square().mean(0), change, (1.0, 1.0))
    moved = gradients @ change
    torch.testing.assert_close(m, moved.mean(0))
    torch.testing.assert_close(v, moved.square().mean(0))


@given(rank=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_rotations_keep_the_sum_of_squares_and_permutations_keep_all(rank: int, seed: int) -> None:
    """C^2 of an orthogonal C is doubly stochastic; v >= m^2, so that no variance is negative."""
    m = normal(4, rank, seed=seed)
    v = m.square() + normal(4, rank, seed=seed + 1).square()
    _, square = rotated(0.5 * m, 0.2 * v, orthogonal(rank, rank, seed), (0.5, 0.2))
    torch.testing.assert_close(square.sum(1), 0.2 * v.sum(1))
    order = torch.tensor(np.random.default_rng(seed).permutation(rank))
    moved, square = rotated(0.5 * m, 0.2 * v, torch.eye(rank).double()[:, order], (0.5, 0.2))
    torch.testing.assert_close(moved, 0.5 * m[:, order])
    torch.testing.assert_close(square, 0.2 * v[:, order])


@given(shape=SHAPES)
@settings(deadline=None, max_examples=15)
def test_the_error_makes_up_for_the_subspace(shape: tuple[int, int, int, int]) -> None:
    """In the whole space, up(m) + (1 - b1) E <- b1 up(m) + (1 - b1) (G + E): Adam's recursion."""
    rows, columns, rank, seed = shape
    param = torch.nn.Parameter(normal(rows, columns, seed=seed))
    optimizer = zoopt.LDAdamW([param], rank=rank, betas=(0.9, 0.99), seed=1)

    def first_moment() -> torch.Tensor:
        """up(m)."""
        if not optimizer.state.get(param):
            return torch.zeros_like(param)
        average, basis = (optimizer.state[param][name] for name in ("exp_avg", "basis"))
        return average @ basis.t() if rows >= columns else basis @ average.t()

    for step in range(4):
        before = first_moment()
        error = optimizer.state[param]["error"].clone() if step else torch.zeros_like(param)
        param.grad = normal(rows, columns, seed=seed + step + 1)
        optimizer.step()
        after = first_moment() + 0.1 * optimizer.state[param]["error"]
        torch.testing.assert_close(after, 0.9 * before + 0.1 * (param.grad + error))


def test_at_full_rank_there_is_no_error_and_adam_runs_in_rotated_coordinates() -> None:
    """Gradients U S_t V^T of the same U and V: the basis is V, so Adam is that of G V, (m, n)."""
    u, v, start = orthogonal(9, 5, 1), orthogonal(5, 5, 2), normal(9, 5, seed=3)
    param, rotated_param = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start @ v)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "seed": 1}
    optimizer = zoopt.LDAdamW([param], rank=5, **options)
    adam = zoopt.AdamW([rotated_param], **options)
    for step in range(8):
        scale = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double() * (1.0 + 0.1 * step)
        param.grad = u @ torch.diag(scale) @ v.t()
        rotated_param.grad = param.grad @ v
        optimizer.step()
        adam.step()
        assert optimizer.state[param]["error"].abs().max() <= 1e-12
    # Off by the bases' rounding, 1e-15, over the smallest sqrt(v), 1e-2.
    torch.testing.assert_close(param @ v, rotated_param, atol=1e-12, rtol=0)


def test_rank_none_is_adamw() -> None:
    models = net(), net()
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "seed": 1}
    optimizers = (
        zoopt.LDAdamW(models[0].named_parameters(), rank=None, **options),
        zoopt.AdamW(models[1].named_parameters(), **options),
    )
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model)
            optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_that_is_not_finite_leaves_parameter_and_state() -> None:
    param = torch.nn.Parameter(normal(6, 4, seed=1).float())
    optimizer = zoopt.LDAdamW([param], rank=2, seed=1)
    param.grad = normal(6, 4, seed=2).float()
    optimizer.step()
    before = param.detach().clone(), str(optimizer.state_dict())
    param.grad[2, 1] = torch.nan
    optimizer.step()
    assert torch.equal(param, before[0])
    assert str(optimizer.state_dict()) == before[1]


def test_the_error_in_bfloat16_is_rounded_without_bias() -> None:
    """Rank 1 of 64 x 64: after a step with beta1 = 0 the error is G less its projection. Rounding
    is off by u = 2^-8 of an element at most; the mean over n = 4096 by 4 u / sqrt(n) of their rms.
    """
    param = torch.nn.Parameter(normal(64, 64, seed=1).bfloat16())
    optimizer = zoopt.LDAdamW([param], rank=1, betas=(0.0, 0.99), seed=1)
    param.grad = normal(64, 64, seed=2).bfloat16()
    optimizer.step()
    state = optimizer.state[param]
    gradient = param.grad.double()
    exact = gradient - gradient @ state["basis"].double() @ state["basis"].double().t()
    difference = state["error"].double() - exact
    assert state["error"].dtype == torch.bfloat16
    assert difference.abs().max() <= 2**-7 * exact.abs().max()
    bias = (difference * exact.sign()).mean().abs()
    assert bias <= 4 * 2**-8 / 64 * exact.square().mean().sqrt()


def test_refuses_what_has_no_meaning() -> None:
    weight = [torch.nn.Parameter(torch.ones(4, 4))]
    for options, message in (
        ({"rho": 1.0}, "rho must be a finite number >= 0 and < 1, got 1.0"),
        ({"proj_type": "full"}, "proj_type must be one of 'std', 'reverse_std', 'right', 'left'"),
    ):
        with pytest.raises(ValueError, match=message):
            zoopt.LDAdamW(weight, **options)
    with pytest.raises(TypeError, match="error_feedback must be a bool, got 1"):
        zoopt.LDAdamW(weight, error_feedback=1)  # type: ignore[arg-type]
