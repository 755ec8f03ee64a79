"""GradNormLoRP: its layer, its optimizer, merging, and what both keep in memory."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import zoopt
from tests.reference.gradnormlorp_float64 import GradNormLoRP64, gradients, weight
from zoopt.first_order import gradnormlorp
from zoopt.nn import GradNormLinear


def layer(
    dtype: torch.dtype = torch.float64, bias: bool = True, norm: Any = "input"
) -> GradNormLinear:
    """All of its parameters away from their start."""
    linear = nn.Linear(6, 5, bias=bias, dtype=dtype)
    built = GradNormLinear(linear.weight, linear.bias, rank=3, norm=norm, seed=0)
    with torch.no_grad():
        built.left.copy_(torch.randn(5, 3) * 0.5)
        built.magnitude.mul_(torch.rand(built.magnitude.numel()) + 0.5)
    return built


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 70), nn.Tanh(), nn.LayerNorm(70), nn.Linear(70, 8))
    return gradnormlorp.convert(model.to(dtype), "0", rank=4, seed=5)  # type: ignore[return-value]


def backward(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 20, generator=generator)
    y = torch.tanh(x[:, :8] * x[:, 8:16])
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    loss = (model(x.to(dtype)) - y.to(dtype)).double().pow(2).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("norm", ["input", "output"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias: bool, norm: str) -> None:
    """Against finite differences in double precision, with x's shape of two and three dims."""
    built = layer(bias=bias, norm=norm)
    names = [name for name, p in built.named_parameters() if p.requires_grad]
    params = [p for p in built.parameters() if p.requires_grad]

    def function(x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(built, dict(zip(names, params, strict=True)), (x,))

    for shape in ((4, 6), (2, 3, 6)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (x, *params))


def test_equals_the_float64_oracle() -> None:
    """12 steps over two refreshes in float64. Adam's division by sqrt(v) magnifies the 1e-16 of
    rounding where v is small, by 1 / eps = 1e6 at most."""
    built = layer()
    optimizer = zoopt.GradNormLoRP(
        built.named_parameters(), lr=1e-2, rank=2, update_proj_gap=5, eps=1e-6, seed=3
    )
    theta = {name: p.detach().numpy().copy() for name, p in built.named_parameters()}
    w0 = theta.pop("weight")
    oracle = GradNormLoRP64(1e-2)
    x = torch.randn(7, 6, dtype=torch.float64)
    y = torch.randn(7, 5, dtype=torch.float64)
    for _ in range(12):
        optimizer.zero_grad()
        (0.5 * (built(x) - y).pow(2).sum()).backward()
        optimizer.step()
        i, j, m = (theta[name] for name in ("left", "right", "magnitude"))
        error = x.numpy() @ weight(w0, i, j, m).T + theta["bias"] - y.numpy()
        di, dj, dm = gradients(w0, i, j, m, error.T @ x.numpy())
        bases = {}
        for name in ("left", "right"):
            own = optimizer.bases(built.get_parameter(name))
            bases[name] = (own["basis_left"].numpy().copy(), own["basis"].numpy().copy())
        oracle.step(theta, {"left": di, "right": dj, "magnitude": dm, "bias": error.sum(0)}, bases)
    assert np.array_equal(built.weight.detach().numpy(), w0)
    for name, expected in theta.items():
        difference = np.abs(built.get_parameter(name).detach().numpy() - expected).max()
        assert difference <= 1e-9 * (1.0 + np.abs(expected).max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_conversion_leaves_the_function(dtype: torch.dtype) -> None:
    """Equal bits in float32 and float64, where M / ||W0|| is 1; bfloat16 rounds M to 2^-9."""
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    converted = gradnormlorp.convert(copy.deepcopy(model), rank=4)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before, after = model(ids).logits, converted(ids).logits
    if dtype == torch.bfloat16:
        # The norms of its layers keep the outputs' size; a few roundings of 2^-8 add up.
        assert (before - after).abs().max() <= 0.05 * before.abs().max()
    else:
        # The Conv1D multiplies by the transposed weight, whose products may be summed otherwise.
        eps = torch.finfo(dtype).eps
        assert (before - after).abs().max() <= 100 * eps * before.abs().max()
    linear = nn.Linear(6, 5, dtype=dtype)
    built = GradNormLinear(linear.weight, linear.bias, rank=2)
    if dtype != torch.bfloat16:
        x = torch.randn(3, 6, dtype=dtype)
        assert torch.equal(built(x), linear(x))


def test_a_norm_an_output_is_dora() -> None:
    """W = M (W0 + I J) / ||W0 + I J||, by rows, as peft has it; at the start the weight's own."""
    linear = nn.Linear(6, 5, dtype=torch.float64)
    start = GradNormLinear(linear.weight, linear.bias, rank=3, norm="output", seed=0)
    torch.testing.assert_close(start.materialise(), linear.weight.detach(), rtol=1e-15, atol=0)
    built = layer(norm="output")
    v = built.weight + built.left @ built.right
    expected = built.magnitude.unsqueeze(1) * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(built.materialise(), expected.detach(), rtol=1e-14, atol=1e-14)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    zoopt.nn.convert_to_gradnorm(model, rank=2, norm="output")
    assert [layer.magnitude.shape for layer in model] == [(4,), (3,)]
    assert gradnormlorp.convert is zoopt.nn.convert_to_gradnorm
    with pytest.raises(ValueError, match="norm must be one of 'input', 'output', got 'row'"):
        zoopt.nn.convert_to_gradnorm(nn.Sequential(nn.Linear(6, 4)), rank=2, norm="row")  # type: ignore[arg-type]


def test_merge_is_exact() -> None:
    """The merged layer's weight is the layer's own, bit for bit, and so are its outputs."""
    for dtype in (torch.float32, torch.bfloat16):
        built = layer(dtype)
        merged = built.merge()
        assert type(merged) is nn.Linear
        assert torch.equal(merged.weight, built.materialise())
        x = torch.randn(9, 6, dtype=dtype)
        assert torch.equal(merged(x), built(x))
        assert merged.weight.requires_grad
    model = net()
    x = torch.randn(3, 20)
    before = model(x)
    assert torch.equal(zoopt.nn.merge(model)(x), before)
    assert all(type(module) is not GradNormLinear for module in model.modules())
    assert type(zoopt.nn.merge(layer())) is nn.Linear


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_trains(state_dtype: Any) -> None:
    """In 8 bits too: a projection of rank 64 has 4096 moments, the fewest that are quantised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 80), nn.Tanh(), nn.Linear(80, 80), nn.Linear(80, 8))
    gradnormlorp.convert(model, ["2"], rank=64)
    frozen = model[2].weight.clone()
    groups = gradnormlorp.param_groups(model, rank=64, update_proj_gap=20)
    optimizer = zoopt.GradNormLoRP(groups, lr=5e-3, state_dtype=state_dtype, seed=0)
    losses = []
    for _ in range(60):
        losses.append(backward(model).item())
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(model[2].weight, frozen)
    state = optimizer.state[model[2].left]
    if state_dtype == "int8":
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
    measured = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    assert measured == optimizer.declared_state_bytes()


def test_resume_is_exact() -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            backward(model)
            optimizer.step()

    def build(model: nn.Module) -> Any:
        return zoopt.GradNormLoRP(
            gradnormlorp.param_groups(model, rank=2, update_proj_gap=3), lr=1e-2, seed=4
        )

    whole, first, second = net(), net(), net()
    steps(whole, build(whole), 9)
    optimizer = build(first)
    steps(first, optimizer, 4)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    optimizer = build(second)
    optimizer.load_state_dict(state)
    steps(second, optimizer, 5)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_gradient_of_zeros_makes_no_basis() -> None:
    """J's first gradient is zero, for I = 0: its basis is made from the next one."""
    model = net()
    groups = gradnormlorp.param_groups(model, rank=2, projector="svd")
    optimizer = zoopt.GradNormLoRP(groups, lr=1e-2, weight_decay=0.1)
    right = model[0].right
    before = right.clone()
    backward(model)
    optimizer.step()
    assert right not in optimizer.state
    assert torch.equal(right, before)
    backward(model)
    u, _, vh = torch.linalg.svd(right.grad, full_matrices=False)
    optimizer.step()
    own = optimizer.bases(right)
    overlap = torch.stack((own["basis_left"].t() @ u[:, :2], own["basis"].t() @ vh[:2].t()))
    assert torch.allclose(overlap.abs(), torch.eye(2), atol=1e-5)


def test_autocast_checkpointing_and_frozen_inputs() -> None:
    """bfloat16 inside, float32 gradients; equal to the layer without autocast within 2^-8 each."""
    built = layer(torch.float32)
    x = torch.randn(4, 6)
    built(x).sum().backward()
    expected = [p.grad.clone() for p in built.parameters() if p.grad is not None]
    built.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.utils.checkpoint.checkpoint(built, x, use_reentrant=False)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    actual = [p.grad for p in built.parameters() if p.grad is not None]
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        # Sums of some 24 products, each of factors rounded to 2^-9.
        assert (a - b).abs().max() <= 0.05 * (1.0 + b.abs().max())


def test_columns_of_zeros() -> None:
    """A column that is zero, of an input that pads say, stays zero and finite."""
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[:, 1] = 0.0
    built = GradNormLinear(linear.weight, linear.bias, rank=2)
    x = torch.randn(5, 4)
    assert torch.equal(built(x), linear(x))
    built(x).square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in built.parameters() if p.grad is not None)


def test_no_graph_keeps_a_weight() -> None:
    """What a forward pass keeps for backward: x and the parameters, and nothing of W's size."""
    built = layer(torch.float32)
    kept: list[torch.Tensor] = []
    x = torch.randn(4, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        built(x)
    own = {p.data_ptr() for p in [*built.parameters(), x]}
    assert {t.data_ptr() for t in kept} <= own


def test_llama_7b_state() -> None:
    """8-bit states at LLaMA 7B, k = 256 and r = 128, are at least 89.5% below 16-bit Adam's.

    All that trains counts: a layer's factors (bases and moments), magnitudes, and embeddings, head
    and norms under plain 8-bit Adam. Full training's states in 16 bits: 2 moments of 2 bytes a
    weight, and LLaMA 7B has 6.738e9.
    """
    hidden, inner, layers, vocabulary, k = 4096, 11008, 32, 32000, 256
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    plain = [(vocabulary, hidden)] * 2 + [(hidden,)] * (2 * layers + 1)
    weights = layers * sum(m * n for m, n in shapes) + sum(
        torch.Size(shape).numel() for shape in plain
    )
    assert weights == 6_738_415_616
    model = nn.ModuleList(
        GradNormLinear(torch.empty(shape, device="meta"), None, rank=k)
        for _ in range(layers)
        for shape in shapes
    )
    others = [nn.Parameter(torch.empty(shape, device="meta")) for shape in plain]
    groups = gradnormlorp.param_groups(model, rank=128)
    groups[1]["params"] += [(f"plain.{i}", param) for i, param in enumerate(others)]
    optimizer = zoopt.GradNormLoRP(groups, state_dtype="int8", seed=0)
    saving = 1 - optimizer.declared_state_bytes() / (4 * weights)
    assert saving >= 0.895
    # Bases (m + n + 2 k) r of float32; moments of I and J 2 r^2 each in a byte, of what is plain 2
    # bytes a weight, and a float32 scale for 256 codes; step, 4 bytes a parameter.
    r, code = 128, 1 + 4 / 256
    bases = layers * sum(4 * (m + n + 2 * k) * r for m, n in shapes)
    moments = 2 * code * (layers * len(shapes) * 2 * r * r + weights - layers * 202_375_168)
    magnitudes = layers * 2 * code * (6 * hidden + inner)
    steps = 8 * (layers * len(shapes) * 3 + len(plain))
    total = bases + moments + magnitudes + steps
    assert optimizer.declared_state_bytes() == pytest.approx(total, rel=1e-6)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="rank must be a positive int, got 0"):
        gradnormlorp.convert(nn.Sequential(nn.Linear(2, 2)), rank=0)
    with pytest.raises(ValueError, match="model must have GradNormLinear layers, got none"):
        gradnormlorp.param_groups(nn.Linear(2, 2), rank=1)
    with pytest.raises(ValueError, match="model must contain the layers to convert, got a bare"):
        gradnormlorp.convert(nn.Linear(2, 2), rank=1)
    with pytest.raises(ValueError, match="proj_type must be one of 'full', got 'std'"):
        zoopt.GradNormLoRP([{"params": [nn.Parameter(torch.ones(2, 2))], "proj_type": "std"}])
    built = layer()
    built.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="weight of a GradNormLinear must stay frozen"):
        built(torch.ones(1, 6, dtype=torch.float64))
