"""Layers that take the place of others: what cannot be replaced, copies, and dual numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import zoopt
from tests.compare import same
from zoopt.nn import (
    convert_to_gradnorm,
    convert_to_lora_sb,
    convert_to_quantised,
    convert_to_sltrain,
    convert_to_sparse_delta,
)
from zoopt.noise import normal, stream


class Experts(nn.Module):
    """Matrices in a bare parameter, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 12, 4, generator=generator) / 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.einsum("bi,eio->bo", x, self.experts).tanh())
        return out


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))


def loss_of(model: nn.Module) -> torch.Tensor:
    dtype = next(p.dtype for p in model.parameters())
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    return (model(x) - torch.sin(3 * x[:, :4])).square().mean()


def sparse_deltas(model: nn.Module) -> None:
    """With positions and values that are not 0."""
    convert_to_sparse_delta(model, ["*"], density=0.2)
    loss_of(model).backward()
    for name, param in model.named_parameters():
        if name.endswith("delta"):
            param.data.copy_(torch.linspace(-1.0, 1.0, param.numel()))


CONVERT: dict[str, Callable[[nn.Module], Any]] = {
    "quantised": convert_to_quantised,
    "log scales": lambda model: convert_to_quantised(model, form="log"),
    "sparse delta": sparse_deltas,
    "SLTrain": lambda model: convert_to_sltrain(model, rank=2, seed=0),
    "GradNorm": lambda model: convert_to_gradnorm(model, rank=2, seed=0),
    "GradNorm of rows": lambda model: convert_to_gradnorm(model, rank=2, norm="output", seed=0),
    "LoRA-SB": lambda model: convert_to_lora_sb(model, [lambda: loss_of(model)], rank=2, lr=1e-2),
}


@pytest.mark.parametrize("make", [mlp, Experts])
@pytest.mark.parametrize("kind", CONVERT)
def test_forward_gradients_of_own_layers_are_those_of_backward_passes(
    kind: str, make: Callable[[], nn.Module]
) -> None:
    model = make().double()
    CONVERT[kind](model)
    model.zero_grad()
    loss_of(model).backward()
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    slope = 0.0
    for name, param in named:
        z = normal(param.numel(), seed=1, stream=stream(name), draw=0).double()
        assert param.grad is not None
        slope += float(z @ param.grad.flatten())
        param.grad = None
    optimizer = zoopt.ForwardGrad(named, lr=0.0, seed=1)
    optimizer.step(lambda: loss_of(model))
    assert optimizer.last_step is not None
    # Sums of some hundred products in float64.
    assert optimizer.last_step.projected_grads[0] == pytest.approx(slope, rel=1e-11, abs=1e-13)


class Product(torch.autograd.Function):
    """Somebody's operator without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.t()


def test_slopes_that_an_operator_would_lose_are_told() -> None:
    model = mlp()
    optimizer = zoopt.ForwardGrad(model.named_parameters(), lr=1.0, seed=1)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"parameter of shape \(20, 12\) where no forward deriv"):
        optimizer.step(lambda: model[2](Product.apply(torch.ones(2, 12), model[0].weight)).sum())
    assert same(before, model)


@pytest.mark.parametrize("mode", ["inplace", "virtual"])
def test_a_sparse_delta_without_positions_does_not_move_in_silence(mode: Any) -> None:
    model = mlp()
    named = convert_to_sparse_delta(model, ["*"], density=0.2)
    optimizer = zoopt.MeZO(named, lr=1.0, perturbation=mode)
    with pytest.raises(RuntimeError, match="a sparse delta must have positions before its values"):
        optimizer.step(lambda: loss_of(model))
    assert not any(param.any() for _, param in named)
    loss_of(model).backward()
    model.zero_grad()
    optimizer.step(lambda: loss_of(model))
    assert optimizer.last_step is not None
    assert optimizer.last_step.projected_grads[0]


def test_a_frozen_sparse_delta_is_copied_and_goes_on() -> None:
    options: dict[str, Any] = {"lr": 1e-2, "update_gap": 3, "window": 2, "seed": 0}

    def deltas(model: nn.Module) -> Any:
        return [(n, p) for n, p in model.named_parameters() if n.endswith("delta")]

    def train(model: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    model = mlp()
    first = zoopt.SparseDeltaAdamW(convert_to_sparse_delta(model, ["*"], density=0.2), **options)
    train(model, first, 4)
    model.requires_grad_(False)
    copied = copy.deepcopy(model)
    for own in (model, copied):
        for _, delta in deltas(own):
            delta.requires_grad_(True)
    second = zoopt.SparseDeltaAdamW(deltas(copied), **options)
    second.load_state_dict(first.state_dict())
    train(model, first, 7)
    train(copied, second, 7)
    assert same(model, copied)
    assert torch.equal(model[0].index, copied[0].index)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CONVERT)
@pytest.mark.parametrize("hook", ["before", "after", "of accelerate"])
def test_layers_with_hooks_are_not_replaced(hook: str, kind: str) -> None:
    """They would no longer be called."""
    model = mlp()
    if hook == "before":
        model[2].register_forward_pre_hook(lambda *_: None)
    elif hook == "after":
        model[2].register_forward_hook(lambda *_: None)
    else:
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(model[2], hooks.ModelHook())
    kept = list(model)
    with pytest.raises(ValueError, match=r"a layer to convert must have no hooks, .* got '2'"):
        CONVERT[kind](model)
    assert list(model) == kept
    if hook == "of accelerate":
        hooks.remove_hook_from_module(model[2])
        CONVERT[kind](model)


@pytest.mark.parametrize("how", ["parametrized", "pruned", "spectral"])
def test_weights_that_are_computed_are_no_weights_of_layers(how: str) -> None:
    """Their layers are left alone: replaced, they would lose what computes the weight."""
    model = mlp()
    if how == "parametrized":
        parametrizations.weight_norm(model[0])
    elif how == "pruned":
        prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    else:
        nn.utils.spectral_norm(model[0])
    first = model[0]
    [matrices, others] = zoopt.lowrank.param_groups(model, rank=2)
    assert [param is model[2].weight for _, param in matrices["params"]] == [True]
    assert len(others["params"]) == len(list(model.parameters())) - 1
    with pytest.raises(ValueError, match="whose weight is a parameter"):
        convert_to_quantised(model, ["0"])
    convert_to_quantised(model)
    assert model[0] is first
    assert isinstance(model[2], zoopt.nn.QuantisedLinear)


def test_attention_that_reads_its_weight_gets_no_sparse_delta() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match=r"a layer must be called by its owner.*'self_attn.out_pro"):
        convert_to_sparse_delta(model, "self_attn.out_proj")
    assert dict(model.named_modules()) == before
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "largest", "fits"),
    [(torch.float32, 3e38, False), (torch.bfloat16, 3e38, False), (torch.float16, 6e4, True)],
)
def test_ranges_that_overflow_are_not_quantised(
    dtype: torch.dtype, largest: float, fits: bool
) -> None:
    weight = torch.zeros(2, 8, dtype=dtype)
    weight[0, 0], weight[0, 1] = largest, -largest
    if not fits:
        with pytest.raises(ValueError, match="NaN or an infinite range"):
            zoopt.nn.QuantisedLinear(weight)
        return
    assert zoopt.nn.QuantisedLinear(weight, bits=8).materialise().isfinite().all()


@pytest.mark.parametrize(("make", "size", "other"), [(mlp, 4, 5), (Experts, 2, 3)])
@pytest.mark.parametrize("differs", ["form", "group_size"])
def test_codes_of_other_groups_or_scales_are_not_loaded(
    differs: str, make: Callable[[], nn.Module], size: int, other: int
) -> None:
    """They have the same shapes: 4 or 5 of a row of 12 are three groups, 2 or 3 of one of 4 two."""
    saved = convert_to_quantised(make(), group_size=size).state_dict()
    changed: dict[str, Any] = {"form": "log"} if differs == "form" else {"group_size": other}
    model = convert_to_quantised(make(), **{"group_size": size, **changed})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="must have the bits, the group size and the form"):
        model.load_state_dict(saved)
    if make is mlp:
        assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    alike = convert_to_quantised(make(), group_size=size)
    alike.load_state_dict({k: v for k, v in saved.items() if not k.endswith("_extra_state")})
    alike.load_state_dict(saved)


def test_candidates_come_from_the_gradient_that_is_stepped() -> None:
    """Not from one thrown away before it: of a bad batch, or of an overflow under a GradScaler."""
    models = [mlp(), mlp()]
    for number, model in enumerate(models):
        named = convert_to_sparse_delta(model, ["*"], density=0.2)
        optimizer = zoopt.SparseDeltaAdamW(named, lr=1e-2, update_gap=3, window=2, seed=0)
        for step in range(7):
            for bad in (-3.0, math.inf) if number and step in (1, 4) else ():
                (loss_of(model) * bad).backward()
                optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(*models)
    for own, other in zip(*(model.buffers() for model in models), strict=True):
        assert torch.equal(own, other)
