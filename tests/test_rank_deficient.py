"""Gradients of a rank below the projection's: no step in a direction that has no energy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import zoopt

M, N, OWN = 48, 36, 5
ADAM = {"rank": 12, "scale": 1.0, "update_proj_gap": 3}
FRUGAL = {"density": 0.4, "rule": "momentum", "update_proj_gap": 3}
CASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "GaLoreAdamW svd": (zoopt.GaLoreAdamW, {**ADAM, "projector": "svd"}),
    "GaLoreAdamW gram": (zoopt.GaLoreAdamW, {**ADAM, "projector": "gram"}),
    "GaLoreAdamW randomized": (zoopt.GaLoreAdamW, {**ADAM, "projector": "randomized"}),
    "GaLoreAdamW warm": (zoopt.GaLoreAdamW, ADAM),
    "GaLoreAdamW full rank": (zoopt.GaLoreAdamW, {**ADAM, "rank": 1000}),
    "GaLoreAdamW reverse": (zoopt.GaLoreAdamW, {**ADAM, "proj_type": "reverse_std"}),
    "GaLoreAdamW two-sided": (zoopt.GaLoreAdamW, {**ADAM, "proj_type": "full"}),
    "GradNormLoRP": (zoopt.GradNormLoRP, ADAM),
    "QGaLoreAdamW": (zoopt.QGaLoreAdamW, {**ADAM, "basis_dtype": "float32"}),
    "Apollo svd": (zoopt.Apollo, {**ADAM, "projector": "svd"}),
    "Fira": (zoopt.Fira, ADAM),
    "GaLoreAdafactor": (zoopt.GaLoreAdafactor, ADAM),
    "GaLoreAdafactor full rank": (zoopt.GaLoreAdafactor, {**ADAM, "rank": 1000}),
    "LDAdamW": (zoopt.LDAdamW, {"rank": 12}),
    "Frugal svd": (zoopt.Frugal, {**FRUGAL, "projector": "svd"}),
    "Frugal warm": (zoopt.Frugal, {**FRUGAL, "projector": "warm"}),
}


def orthonormal(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(rows, OWN, generator=generator, dtype=torch.float64)
    q: Tensor = torch.linalg.qr(columns).Q
    return q


def gradients(dtype: torch.dtype, transposed: bool, count: int = 8) -> list[Tensor]:
    """Of rank OWN and the size 1e4, whose rounding is far above every eps; all of one row space and
    one column space. They are made as autograd makes them: products of thin factors, rounded."""
    left, right = orthonormal(M, 0), orthonormal(N, 1)
    made = []
    for seed in range(count):
        turned = 1e4 * (left @ orthonormal(OWN, 100 + seed))
        made.append(turned.to(dtype) @ right.to(dtype).t())
    return [g.t().contiguous() if transposed else g for g in made]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_directions_without_energy_are_not_stepped_in(
    case: str, dtype: torch.dtype, transposed: bool
) -> None:
    """An update lies in the gradients' row space (on the left: column space).

    To the rounding of singular vectors, of products, and of weights of up to 1e-2 that are moved by
    1e-3: some 100 eps, where steps of rounding alone made it 0.1 to 1.
    """
    cls, options = CASES[case]
    grads = gradients(dtype, transposed)
    weight = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = cls([weight], lr=1e-3, seed=1, **options)
    right = (weight.shape[0] >= weight.shape[1]) != (options.get("proj_type") == "reverse_std")
    inside = orthonormal(N, 1) if right != transposed else orthonormal(M, 0)
    for gradient in grads:
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
        moved = (weight.detach() - before).double()
        moved = moved if right else moved.t()
        lost = moved - moved @ inside @ inside.t()
        assert lost.norm() <= 1e3 * torch.finfo(dtype).eps * moved.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_firas_limiter_starts_with_the_first_part_outside(dtype: torch.dtype) -> None:
    """While the basis holds all of the gradient there is no norm that the next could grow from."""
    weight = torch.nn.Parameter(torch.zeros(M, N, dtype=dtype))
    optimizer = zoopt.Fira([weight], lr=1e-3, rank=12, seed=1)
    for gradient in gradients(dtype, False, 3):
        weight.grad = gradient
        optimizer.step()
        assert float(optimizer.state[weight]["update_norm"]) == 0.0
    weight.grad = gradient + torch.ones_like(gradient)
    optimizer.step()
    assert float(optimizer.state[weight]["update_norm"]) > 0.0


def test_what_is_not_finite_stays_so() -> None:
    """The rule silences numbers below a bound: NaN is below none."""
    for bad, step in itertools.product((torch.nan, torch.inf), (1, 2)):
        weight = torch.nn.Parameter(torch.zeros(M, N))
        optimizer = zoopt.GaLoreAdamW([weight], rank=12, seed=1)
        for t, gradient in enumerate(gradients(torch.float32, False, 3)):
            weight.grad = gradient
            if t == step:
                weight.grad[0, 0] = bad
            optimizer.step()
        assert not bool(weight[0].isfinite().all())
