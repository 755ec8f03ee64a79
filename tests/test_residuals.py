"""APOLLO, Fira and Q-GaLore: what the contract and the oracles do not say of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoopt
from tests.first_order_table import net
from tests.reference.qgalore_float64 import agreement as agreement64
from tests.reference.qgalore_float64 import int4
from zoopt.first_order.projected import basis as basis_module
from zoopt.first_order.projected.basis_codec import decode_int4, encode_int4, int4_specs
from zoopt.first_order.projected.geometry import Geometry
from zoopt.first_order.projected.residuals import channel_norms
from zoopt.first_order.qgalore import agreement

LIMITED = [zoopt.Apollo, zoopt.ApolloMini, zoopt.Fira]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orth(n: int, r: int, seed: int) -> Tensor:
    q: Tensor = torch.linalg.qr(randn(n, r, seed=seed)).Q
    return q


def updates(cls: type[Any], gradients: list[Tensor], **options: Any) -> tuple[list[Tensor], Any]:
    """What each step moves a weight by, over -lr, and the state."""
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    options = {"lr": 1.0, "scale": 1.0, "seed": 3, **options}
    optimizer = cls([weight], **options)
    moved = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        moved.append((before - weight.detach()) / optimizer.param_groups[0]["lr"])
    return moved, optimizer.state[weight]


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("cls", [zoopt.Apollo, zoopt.ApolloMini])
def test_the_limiter_acts(cls: type[Any], shape: tuple[int, int]) -> None:
    """On a gradient that shrinks, which Adam's momentum makes long steps of, and then returns."""
    gradients = [randn(*shape) * size for size in (1.0, 1.0, 0.01, 3.0, 1.0, 1.0)]
    free, _ = updates(cls, gradients, norm_growth_limit=None)
    limited, state = updates(cls, gradients)
    norms = [u.norm().item() for u in limited]
    assert max(b / a for a, b in itertools.pairwise(norms)) <= 1.01 * (1 + 1e-12)
    growth = [b.norm() / a.norm() for a, b in itertools.pairwise(free)]
    assert max(growth) > 1.01
    # It shortens a step, and turns it nowhere.
    for a, b in zip(free, limited, strict=True):
        torch.testing.assert_close(a / a.norm(), b / b.norm(), rtol=0.0, atol=1e-12)
    assert float(state["update_norm"]) == pytest.approx(norms[-1], rel=1e-12)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_firas_limiter_acts_on_the_second_term_alone(shape: tuple[int, int]) -> None:
    gradients = [randn(*shape, seed=t) * size for t, size in enumerate((1.0, 0.01, 3.0, 1.0))]
    options = {"rank": 3, "projector": "svd", "scale": 0.25}
    limited, state = updates(zoopt.Fira, gradients, **options)
    galore, _ = updates(zoopt.GaLoreAdamW, gradients, **options)
    basis = state["basis"]
    second = [a - b for a, b in zip(limited, galore, strict=True)]
    for term in second:  # It lies outside the subspace.
        inside = term @ basis if shape[0] >= shape[1] else basis.T @ term
        assert inside.abs().max() < 1e-12 * term.norm()
    norms = [term.norm().item() for term in second]
    assert max(b / a for a, b in itertools.pairwise(norms)) <= 1.01 * (1 + 1e-12)


@settings(deadline=None, max_examples=30)
@given(m=st.integers(2, 12), n=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 9))
def test_firas_norm_is_the_explicit_residuals(m: int, n: int, rank: int, seed: int) -> None:
    """||G_j||^2 - ||R_j||^2 is off by a few eps ||G_j||^2, and its root by the root of that."""
    gradient = randn(m, n, seed=seed)
    [moved], state = updates(zoopt.Fira, [gradient], rank=rank, projector="svd", scale=0.0)
    turned = gradient if m >= n else gradient.T
    reduced = turned @ state["basis"]
    phi = (reduced / (reduced.abs() + 1e-6)).norm(dim=1) / reduced.norm(dim=1)
    bound = math.sqrt(32 * 2.0**-52) * (phi * turned.norm(dim=1)).norm().item()
    assert abs(float(state["update_norm"]) - moved.norm().item()) <= bound


def test_fira_at_full_rank_is_galore() -> None:
    """Nothing is outside but rounding, 1e-16 of the gradient, times a phi of 1 / |R_j|."""
    gradients = [randn(9, 6, seed=t) for t in range(5)]
    fira, _ = updates(zoopt.Fira, gradients, rank=6)
    galore, _ = updates(zoopt.GaLoreAdamW, gradients, rank=6)
    for a, b in zip(fira, galore, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("cls", LIMITED)
def test_steps_scale_with_lr_and_not_with_the_gradient(cls: type[Any]) -> None:
    """Powers of two change no rounding, and eps is 0."""
    gradients = [randn(10, 6, seed=t) for t in range(4)]
    options: dict[str, Any] = {"rank": 4, "eps": 0.0}
    plain, state = updates(cls, gradients, **options)
    for change, of in (({"lr": 0.25}, 1.0), ({}, 1024.0)):
        scaled, other = updates(cls, [of * g for g in gradients], **{**options, **change})
        for a, b in zip(plain, scaled, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(state["update_norm"], other["update_norm"], rtol=1e-12, atol=0)


def test_apollo_scales_channels_and_mini_the_tensor() -> None:
    gradient = randn(10, 6)
    for shaped in (gradient, gradient.T.contiguous()):
        [moved], _ = updates(zoopt.Apollo, [shaped], rank=3)
        ratio = moved / shaped if shaped.shape == (10, 6) else (moved / shaped).T
        torch.testing.assert_close(ratio, ratio[:, :1].expand(10, 6), rtol=1e-12, atol=0.0)
        assert ratio[:, 0].std() > 0.01
        [moved], _ = updates(zoopt.ApolloMini, [shaped])
        ratio = moved / shaped
        torch.testing.assert_close(ratio, ratio[:1, :1].expand(shaped.shape), rtol=1e-12, atol=0.0)


def test_defaults_are_the_papers() -> None:
    weight = torch.nn.Parameter(randn(300, 300, dtype=torch.float32))
    for cls, rank, scale in ((zoopt.Apollo, 256, 1.0), (zoopt.ApolloMini, 1, math.sqrt(128))):
        [group] = cls([weight]).param_groups
        assert (group["rank"], group["scale"]) == (rank, pytest.approx(scale))
        assert (group["update_proj_gap"], group["norm_growth_limit"]) == (200, 1.01)


def test_apollos_random_basis_is_redrawn_and_not_stored() -> None:
    weight = torch.nn.Parameter(randn(8, 6))
    optimizer = zoopt.Apollo([weight], rank=2, update_proj_gap=3)
    bases = []
    for t in range(7):
        weight.grad = randn(8, 6, seed=t)
        optimizer.step()
        bases.append(optimizer.bases(weight)["basis"])
    same = [torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert same == [True, True, False, True, True, False]
    assert sorted(optimizer.state[weight]) == ["exp_avg", "exp_avg_sq", "step", "update_norm"]


@pytest.mark.parametrize("cls", LIMITED)
def test_zero_channels_and_zero_gradients(cls: type[Any]) -> None:
    """A row without a gradient stays; a step without one leaves the limiter's norm."""
    gradient = randn(8, 6)
    gradient[3] = 0.0
    zero = torch.zeros_like(gradient)
    moved, state = updates(cls, [gradient, zero, 100.0 * gradient], rank=2)
    assert all(bool(u.isfinite().all()) for u in moved)
    assert not any(bool(u[3].any()) for u in moved)
    _, first = updates(cls, [gradient], rank=2)
    assert float(state["update_norm"]) <= 1.01 * float(first["update_norm"]) * (1 + 1e-12)


@pytest.mark.parametrize("cls", [*LIMITED, zoopt.QGaLoreAdamW])
def test_groups_without_a_rank_get_adamw(cls: type[Any]) -> None:
    a, b = (torch.nn.Parameter(randn(8, 6, dtype=torch.float32)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.1}
    projected = cls([{"params": [a], "rank": None}], state_dtype="float32", **options)
    plain = zoopt.AdamW([b], **options)
    for t in range(3):
        for param, optimizer in ((a, projected), (b, plain)):
            param.grad = randn(8, 6, seed=t, dtype=torch.float32)
            optimizer.step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("side", ["right", "left"])
def test_channel_norms_in_chunks(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoopt.kernels.product.reference.CHUNK", 20)
    gradient = randn(11, 6).bfloat16()
    norms = channel_norms(gradient, Geometry(11, 6, 2, side), torch.float32)
    expected = gradient.float().norm(dim=0 if side == "left" else 1)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0.0)


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 20),
    exponent=st.integers(-20, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    zeros=st.booleans(),
)
def test_int4_codec(m: int, n: int, exponent: int, dtype: torch.dtype, zeros: bool) -> None:
    """Within half a step of max / 7, which is stored in float32; the bytes; the oracle's values."""
    values = randn(m, n, seed=m + 50 * n, dtype=dtype) * 2.0**exponent
    if zeros:
        values.view(-1)[:256] = 0.0
    codes, scale = encode_int4(values)
    specs = int4_specs("basis", (m, n))
    for name, tensor in (("basis", codes), ("basis_scale", scale)):
        assert (tuple(tensor.shape), tensor.dtype) == (specs[name].shape, specs[name].dtype)
    assert codes.nbytes == math.ceil(m * n / 2)
    assert scale.nbytes == 4 * math.ceil(m * n / 256)
    decoded = decode_int4(codes, scale, (m, n), dtype)
    assert decoded.dtype == dtype
    groups = torch.nn.functional.pad(values.view(-1), (0, -m * n % 256)).view(-1, 256)
    step = (groups.abs().amax(1) / 7).repeat_interleave(256)[: m * n].view(m, n)
    assert bool(((values - decoded).abs() <= step * (0.5 + 1e-6)).all())
    expected = int4(values.double().numpy())
    # A value in the middle between two levels, to float32's rounding, may go either way.
    middle = torch.from_numpy(np.abs(decoded.double().numpy() - expected)) > 1e-6 * step
    assert bool(((values - decoded).abs()[middle] >= step[middle] * (0.5 - 1e-5)).all())
    again = encode_int4(decoded)
    torch.testing.assert_close(again[1], scale, rtol=1e-6, atol=0.0)
    assert torch.equal(again[0], codes)


def test_int4_bases_are_nearly_orthonormal() -> None:
    """Errors of half a step at most are independent: a column of n has n step^2 / 12, and a step is
    1 / 7 of the largest of 256 normals over sqrt(n), 3.3 of them at most on average: 0.019."""
    basis = orth(512, 16, seed=1)
    decoded = decode_int4(*encode_int4(basis), (512, 16), torch.float64)
    assert (decoded - basis).square().sum(0).max() < 0.03
    assert agreement(basis, decoded) > 0.98


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 30), rank=st.integers(1, 30), seed=st.integers(0, 99))
def test_agreement_is_of_subspaces(n: int, rank: int, seed: int) -> None:
    """In [0, 1], 1 for the same subspace, whatever its basis; the oracle's number."""
    rank = min(rank, n)
    a, b = orth(n, rank, seed), orth(n, rank, seed + 1000)
    turned = b @ orth(rank, rank, seed + 2000)
    assert agreement(a, b) == pytest.approx(agreement64(a.numpy(), b.numpy()), abs=1e-6)
    # The root of a difference of numbers up to 1.
    assert agreement(a, turned) == pytest.approx(float(agreement(a, b)), abs=1e-6)
    assert agreement(b, turned) == pytest.approx(1.0, abs=1e-6)
    assert 0.0 <= float(agreement(a, b)) <= 1.0 + 1e-6


def test_random_subspaces_do_not_agree() -> None:
    """Half of the dimensions, where the mean |cos| of random subspaces is 0.7 by chance."""
    found = [float(agreement(orth(64, 32, s), orth(64, 32, s + 100))) for s in range(20)]
    assert max(found) < 0.4


def lazy_run(
    gradients: list[Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[int], Any]:
    """In which steps a basis was made, and the state."""
    steps: list[int] = []
    made = basis_module.subspace
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = zoopt.QGaLoreAdamW([weight], rank=4, update_proj_gap=2, seed=1, **options)

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        steps.append(int(optimizer.state[weight]["step"]))
        return made(*args, **kwargs)

    monkeypatch.setattr(basis_module, "subspace", counted)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return steps, optimizer.state[weight]


def stable(steps: int) -> list[Tensor]:
    """Gradients of one row space, (24, 16) of rank 4."""
    rows = orth(16, 4, seed=7)
    return [randn(24, 4, seed=t) @ rows.T for t in range(steps)]


def test_a_stable_subspace_is_refreshed_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement at 2 and at 4: a gap of 4 from there, of 8 from 8, of 16 from 16."""
    steps, state = lazy_run(stable(40), monkeypatch, queue_size=2)
    assert steps == [0, 2, 4, 8, 16, 32]
    assert float(state["doublings"]) == 4
    assert state["doublings"].device.type == "cpu"


def test_a_moving_subspace_is_refreshed_as_often_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [randn(24, 16, seed=t) for t in range(20)]
    steps, state = lazy_run(gradients, monkeypatch, queue_size=2)
    assert steps == list(range(0, 20, 2))
    assert float(state["doublings"]) == 0


def test_one_disagreement_starts_the_count_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement at 2, a jump at 4, another subspace from there: 6 and 8 agree with it."""
    other = orth(16, 4, seed=8)
    gradients = stable(4) + [randn(24, 4, seed=t) @ other.T for t in range(9)]
    steps, state = lazy_run(gradients, monkeypatch, queue_size=2)
    assert steps == [0, 2, 4, 6, 8, 12]
    assert float(state["doublings"]) == 2


def test_lazy_refresh_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, state = lazy_run(stable(12), monkeypatch, cos_threshold=None)
    assert steps == list(range(0, 12, 2))
    assert not {"agreements", "doublings"} & state.keys()


def test_qgalore_keeps_a_fraction_of_galores_state() -> None:
    """(1024, 256) at rank 64: bases and moments in 8448 + 133120 bytes, not 65536 + 524288."""
    weight = torch.nn.Parameter(torch.zeros(1024, 256))
    ours = zoopt.QGaLoreAdamW([weight], rank=64).declared_state_bytes()
    assert ours == 16 + (8192 + 256) + 2 * (65536 + 1024)
    assert ours < 0.25 * zoopt.GaLoreAdamW([weight], rank=64).declared_state_bytes()


@pytest.mark.parametrize(
    ("cls", "name", "value", "message"),
    [
        (zoopt.Apollo, "norm_growth_limit", 0.9, "norm_growth_limit must be a finite number >= 1"),
        (zoopt.Apollo, "stagger", 0, "stagger must be a bool, got 0"),
        (zoopt.Apollo, "rank", 0, "rank must be a positive int, got 0"),
        (zoopt.ApolloMini, "projector", "qr", "projector must be one of"),
        (zoopt.Fira, "projector", "random", "projector must be one of 'svd', 'gram'"),
        (zoopt.Fira, "proj_type", "full", "proj_type must be one of 'std', 'reverse_std'"),
        (zoopt.Fira, "norm_growth_limit", "1", "norm_growth_limit must be a finite number >= 1"),
        (zoopt.QGaLoreAdamW, "cos_threshold", 1.5, "cos_threshold must be a finite number >= 0"),
        (zoopt.QGaLoreAdamW, "queue_size", 0, "queue_size must be a positive int, got 0"),
        (zoopt.QGaLoreAdamW, "basis_dtype", "int8", "basis_dtype must be one of 'float32', 'int4'"),
        (zoopt.QGaLoreAdamW, "projector", "warm", "projector must be one of 'svd', 'gram'"),
    ],
)
def test_refuses(cls: type[Any], name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cls(net().parameters(), **{name: value})
