"""AdamW and GaLore: against torch, in the subspace's coordinates, as published; the subspaces."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoopt
from tests.first_order_table import backward, net
from tests.reference.published_galore import PublishedGaLore
from zoopt.first_order.projected.subspace import Projector, orthonormal, subspace


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(m: int, n: int, factor: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix (m, n) with the singular values 1, factor, factor^2 ..."""
    k = min(m, n)
    u, v = torch.linalg.qr(randn(m, k)).Q, torch.linalg.qr(randn(n, k, seed=1)).Q
    return ((u * factor ** torch.arange(k, dtype=torch.float64)) @ v.T).to(dtype)


def basis_of(gradient: Tensor, rank: int, projector: Projector, **options: Any) -> Tensor:
    options = {"right": True, "previous": None, "seed": 1, "stream": 2, "draw": 3, **options}
    return subspace(gradient, rank, projector=projector, **options)


def sine(a: Tensor, b: Tensor) -> float:
    """The sine of the largest angle between two subspaces, from orthonormal bases (n, r)."""
    return torch.linalg.matrix_norm(b - a @ (a.T @ b), 2).item()


# Coefficients are made in Python's floats by both; torch divides by sqrt(v) / sqrt(1 - b2^t).
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_equals_torchs(dtype: torch.dtype, tolerance: float, maximize: bool) -> None:
    """On the same gradients: 12 steps round 12 times, to 2^-24 or 2^-53 of weights below 4."""
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.1, "maximize": maximize}
    ours, theirs = net(dtype), net(dtype)
    a, b = (
        zoopt.AdamW(ours.parameters(), **options),
        torch.optim.AdamW(theirs.parameters(), **options),
    )
    for _ in range(12):
        backward(theirs)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = q.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=tolerance * 4.0)


@pytest.mark.parametrize("right", [True, False])
def test_at_full_rank_is_adamw_in_the_bases_coordinates(right: bool) -> None:
    """Of W P or P^T W with one basis P: six steps' rounding of weights below 4, in float64."""
    shape = (12, 7) if right else (7, 12)
    weight = torch.nn.Parameter(randn(*shape, seed=5))
    start = weight.detach().clone()
    galore = zoopt.GaLoreAdamW([weight], rank=7, scale=1.0, eps=1e-8, weight_decay=0.1, seed=0)
    gradients = [randn(*shape, seed=10 + t) for t in range(6)]
    for gradient in gradients:
        weight.grad = gradient
        galore.step()
    basis = galore.bases(weight)["basis"]
    turned = torch.nn.Parameter(start @ basis if right else basis.T @ start)
    adamw = torch.optim.AdamW([turned], lr=1e-3, weight_decay=0.1)
    for gradient in gradients:
        turned.grad = gradient @ basis if right else basis.T @ gradient
        adamw.step()
    back = turned @ basis.T if right else basis @ turned
    torch.testing.assert_close(weight, back, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_the_published_algorithm(weight_decay: float) -> None:
    """Over three bases in float32, on the published algorithm's gradients.

    Both make bases by one function from one gradient. The rest is 12 steps' rounding of weights
    below 2, magnified where Adam divides by the root of small moments.
    """
    options = {"lr": 1e-2, "rank": 4, "update_proj_gap": 5, "scale": 0.25}
    options["weight_decay"] = weight_decay
    published, ours = (
        torch.nn.ParameterList([randn(20, 12), randn(10, 14), randn(9)]).float() for _ in range(2)
    )
    optimizer = zoopt.GaLoreAdamW(
        ours.parameters(),
        projector="svd",
        stagger=False,
        decay="after",
        eps_correction=False,
        **options,
    )
    reference = PublishedGaLore(published.parameters(), **options)
    for t in range(12):
        for i, (p, q) in enumerate(zip(ours, published, strict=True)):
            noise = randn(*p.shape, seed=100 * t + i, dtype=torch.float32)
            q.grad = q.detach() + 0.1 * noise
            p.grad = q.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(ours, published, strict=True):
            torch.testing.assert_close(p, q, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("projector", ["svd", "gram"])
def test_exact_subspaces_are_numpys(
    projector: Projector, shape: tuple[int, int], right: bool
) -> None:
    """Singular values halve. Angles err by eps ||G||^2 / (s_5^2 - s_6^2) = 2^-52 3e2 for a Gram
    matrix, and by less for an SVD."""
    gradient = decaying(*shape)
    u, _, vh = np.linalg.svd(gradient.numpy())
    expected = torch.from_numpy(vh[:5].T if right else u[:, :5])
    basis = basis_of(gradient, 5, projector, right=right)
    assert sine(expected, basis) < 1e-12


@pytest.mark.parametrize("right", [True, False])
def test_randomized_subspace_is_near_the_leading_one(right: bool) -> None:
    """Three products with G^T G leave (s_17 / s_6)^6 = 0.8^66 = 4e-7 of what lies outside a sketch
    of 6 + 10 columns, times a random constant of some tens; its square is what energy is lost."""
    gradient = decaying(60, 40, 0.8)
    basis = basis_of(gradient, 6, "randomized", right=right)
    exact = basis_of(gradient, 6, "svd", right=right)

    def energy(b: Tensor) -> float:
        return (gradient @ b if right else gradient.T @ b).square().sum().item()

    assert (1.0 - 1e-9) * energy(exact) <= energy(basis) <= (1.0 + 1e-12) * energy(exact)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("right", [True, False])
def test_warm_subspace_is_one_step_of_orthogonal_iteration(right: bool) -> None:
    """orth(G^T (G P)), the QR factorisation whose R has a positive diagonal: it is unique."""
    gradient = randn(30, 20)
    previous = torch.linalg.qr(randn(20 if right else 30, 4, seed=3)).Q
    basis = basis_of(gradient, 4, "warm", right=right, previous=previous)
    moved = gradient.T @ (gradient @ previous) if right else gradient @ (gradient.T @ previous)
    q, r = np.linalg.qr(moved.numpy())
    torch.testing.assert_close(
        basis, torch.from_numpy(q * np.sign(np.diag(r))), rtol=0.0, atol=1e-12
    )
    assert bool(((basis.T @ moved).diagonal() > 0).all())


def test_random_subspace_is_a_function_of_the_seed() -> None:
    """N(0, 1/r): P P^T is the identity on average, to 5 standard errors of 20000 samples."""
    draws = [basis_of(torch.zeros(6, 4), 5, "random", right=False, draw=d) for d in range(4000)]
    mean = torch.stack([p @ p.T for p in draws]).mean(0)
    assert (mean - torch.eye(6)).abs().max() < 5 * math.sqrt(2.0 / 20000)
    assert torch.equal(draws[7], basis_of(torch.ones(6, 4), 5, "random", right=False, draw=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
def test_orthonormal_of_ill_conditioned_columns(dtype: torch.dtype, condition: float) -> None:
    """Orthonormal to 1e3 eps, by Cholesky or, where it fails, by Householder."""
    columns = decaying(40, 6, condition ** (-1 / 5), dtype)
    basis = orthonormal(columns)
    eye = torch.eye(6, dtype=dtype)
    assert (basis.T @ basis - eye).abs().max() <= 1e3 * torch.finfo(dtype).eps


def test_orthonormal_of_dependent_columns() -> None:
    """Cholesky fails, Householder's columns span theirs and more."""
    columns = randn(20, 3)
    columns = torch.cat((columns, columns.sum(1, keepdim=True), torch.zeros(20, 1)), 1)
    basis = orthonormal(columns)
    torch.testing.assert_close(
        basis.T @ basis, torch.eye(5, dtype=columns.dtype), rtol=0, atol=1e-12
    )
    assert (columns - basis @ (basis.T @ columns)).abs().max() < 1e-12


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    rank=st.integers(1, 24),
    right=st.booleans(),
    projector=st.sampled_from(["svd", "gram", "randomized", "warm"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_subspaces_of_every_shape(
    m: int, n: int, rank: int, right: bool, projector: Projector, dtype: torch.dtype
) -> None:
    """Orthonormal columns, and at the matrix's own rank all of it."""
    rank = min(rank, m, n)
    gradient = randn(m, n, seed=m + 31 * n).to(dtype)
    basis = basis_of(gradient, rank, projector, right=right)
    basis = basis_of(gradient, rank, projector, right=right, previous=basis)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert basis.dtype == wide
    assert basis.shape == (n if right else m, rank)
    bound = 1e3 * torch.finfo(wide).eps
    assert (basis.T @ basis - torch.eye(rank, dtype=wide)).abs().max() <= bound
    if rank == (n if right else m):
        rest = gradient.to(wide) @ (torch.eye(n, dtype=wide) - basis @ basis.T) if right else None
        assert rest is None or rest.abs().max() <= 100 * bound


@pytest.mark.parametrize("stagger", [True, False])
def test_stagger_spreads_the_refreshes(stagger: bool) -> None:
    """Ten parameters, a gap of ten: one refresh a step, or all of them every tenth."""
    params = [torch.nn.Parameter(randn(6, 5, seed=i, dtype=torch.float32)) for i in range(10)]
    optimizer = zoopt.GaLoreAdamW(params, rank=2, update_proj_gap=10, stagger=stagger)
    counts = []
    before: list[Tensor] = []
    for t in range(31):
        for i, param in enumerate(params):
            param.grad = randn(6, 5, seed=50 * t + i, dtype=torch.float32)
        optimizer.step()
        bases = [optimizer.bases(param)["basis"].clone() for param in params]
        counts.append(sum(not torch.equal(a, b) for a, b in zip(bases, before, strict=False)))
        before = bases
    assert counts[1:] == ([1] * 30 if stagger else ([0] * 9 + [10]) * 3)


def test_gradients_keep_their_shape() -> None:
    """Where the released code leaves them projected."""
    weight = torch.nn.Parameter(randn(8, 6))
    weight.grad = randn(8, 6, seed=1)
    zoopt.GaLoreAdamW([weight], rank=2).step()
    assert torch.equal(weight.grad, randn(8, 6, seed=1))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stagger", 1, "stagger must be a bool, got 1"),
        ("eps_correction", None, "eps_correction must be a bool, got None"),
        ("decay", "last", "decay must be one of 'before', 'after', got 'last'"),
        ("projector", "qr", "projector must be one of"),
        ("scale", -1.0, "scale must be a finite number >= 0, got -1.0"),
        ("rank", 2.0, "rank must be a positive int, got 2.0"),
    ],
)
def test_refuses(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        zoopt.GaLoreAdamW(net().parameters(), **{name: value})


def test_a_float32_basis_is_compared_with_the_one_before() -> None:
    """Bases of gradients that have nothing in common do not agree, and the gap stays."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(40, 30, generator=generator))
    optimizer = zoopt.QGaLoreAdamW(
        [param], rank=2, basis_dtype="float32", update_proj_gap=1, queue_size=1, cos_threshold=0.9
    )
    for _ in range(3):
        param.grad = torch.randn(40, 30, generator=generator)
        optimizer.step()
    assert optimizer.state[param]["agreements"] == optimizer.state[param]["doublings"] == 0
