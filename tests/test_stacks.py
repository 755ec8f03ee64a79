"""Stacks of matrices in one parameter: experts, and the projections of torch's attention."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zoopt
from tests.first_order_table import ROWS, Row
from zoopt.lowrank import param_groups

#: All that project.
STACKED = [
    row
    for row in ROWS
    if row.cls not in (zoopt.AdamW, zoopt.SM3, zoopt.SparseDeltaAdamW)
    and row.options.get("density") != 1.0
]
E, M, N = 3, 12, 20


def mixtral(hidden: int = 16) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
        vocab_size=32,
        max_position_embeddings=16,
    )
    return transformers.MixtralForCausalLM(config)


def weights(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(E, M, N, generator=torch.Generator().manual_seed(3)).to(dtype)


def gradients(dtype: torch.dtype, steps: int) -> Iterator[torch.Tensor]:
    """Gradients that leave out a matrix now and then, the first at the first step."""
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        gradient = torch.randn(E, M, N, generator=generator)
        if step % 3 == 0:
            gradient[step % E] = 0.0
        yield gradient.to(dtype)


def build(row: Row, groups: Any) -> Any:
    cls: Any = row.cls
    return cls(groups, **row.options)


def stacked(row: Row, whole: torch.Tensor, shape: tuple[int, ...], **options: Any) -> Any:
    param = nn.Parameter(whole.clone().view(shape))
    groups = [{"params": [("w", param)], "matrices": E, **options}]
    return param, build(row, groups)


def separate(row: Row, whole: torch.Tensor, **options: Any) -> Any:
    params = [nn.Parameter(matrix.clone()) for matrix in whole]
    named = [(f"w[{number}]", param) for number, param in enumerate(params)]
    return params, build(row, [{"params": named, **options}])


def ranked(row: Row) -> dict[str, Any]:
    return {"rank": row.options.get("rank", 1)} if "rank" in row.options else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", STACKED, ids=str)
def test_a_stack_is_stepped_as_its_matrices_are(row: Row, dtype: torch.dtype) -> None:
    """The same bits as parameters of their own have, weights and state; a matrix whose gradient is
    0 rests, as one without a gradient does."""
    shape = (E * M, N) if dtype == torch.bfloat16 else (E, M, N)
    param, optimizer = stacked(row, weights(dtype), shape, **ranked(row))
    own, apart = separate(row, weights(dtype), **ranked(row))
    for gradient in gradients(dtype, 8):
        param.grad = gradient.view(shape)
        for matrix, part in zip(own, gradient, strict=True):
            matrix.grad = part.clone() if part.any() else None
        optimizer.step()
        apart.step()
        assert set(optimizer.state) == {param}
    assert torch.equal(param.detach().view(E, M, N), torch.stack([p.detach() for p in own]))
    for name, value in optimizer.state[param].items():
        parts = torch.stack([apart.state[matrix][name] for matrix in own])
        assert torch.equal(value, parts), name
    assert optimizer.declared_state_bytes() == apart.declared_state_bytes()
    for name, basis in optimizer.bases(param).items():
        assert torch.equal(basis, torch.stack([apart.bases(matrix)[name] for matrix in own]))


@pytest.mark.parametrize("row", STACKED[::3], ids=str)
def test_resume_is_exact(row: Row) -> None:
    complete, optimizer = stacked(row, weights(torch.float32), (E, M, N), **ranked(row))
    for step, gradient in enumerate(gradients(torch.float32, 7)):
        if step == 3:
            file = io.BytesIO()
            torch.save([complete.detach().clone(), optimizer.state_dict()], file)
        complete.grad = gradient
        optimizer.step()
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    param, resumed = stacked(row, saved, (E, M, N), **ranked(row))
    resumed.load_state_dict(state)
    for gradient in list(gradients(torch.float32, 7))[3:]:
        param.grad = gradient
        resumed.step()
    assert torch.equal(param, complete)
    damaged = copy.deepcopy(state)
    damaged["state"][0]["step"][1] = -1
    with pytest.raises(ValueError, match=r"state 'step' .* numbers that are not all from 0 to"):
        resumed.load_state_dict(damaged)


class Experts(nn.Module):
    """A stack whose gradient is what it is told: matrices of an input, one of them left out."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(weights(torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w * x).sum()


@pytest.mark.parametrize("name", ["GaLoreAdamW warm", "LDAdamW", "Fira", "Frugal"])
def test_a_fused_backward_steps_the_same(name: str) -> None:
    [row] = [row for row in ROWS if row.name == name]
    models = [Experts(), Experts()]
    optimizers = []
    for model in models:
        groups = [{"params": [("w", model.w)], "matrices": E, **ranked(row)}]
        optimizers.append(build(row, groups))
    zoopt.fuse_backward(models[1], optimizers[1])
    for gradient in gradients(torch.float32, 7):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(gradient).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(models[0].w, models[1].w)
    assert models[1].w.grad is None


def test_micro_batches_that_reach_different_matrices_add_up() -> None:
    """R of each matrix is the sum of those that reached it, though the first reached nothing, and
    the second not all of them."""
    first, second, third = (g for g in gradients(torch.float32, 3))
    first, second = torch.zeros_like(first), second.clone()
    second[1] = 0.0
    model, whole = Experts(), Experts()
    fused, plain = (
        zoopt.GaLoreAdamW(
            [{"params": [("w", own.w)], "matrices": E, "rank": M}], lr=1e-2, projector="gram"
        )
        for own in (model, whole)
    )
    zoopt.fuse_backward(model, fused, accumulation_steps=3)
    for gradient in (first, second, third):
        model(gradient).backward()
        whole(gradient).backward()
    fused.step()
    plain.step()
    # Only the third has reached matrix 1: its basis is the same either way.
    assert torch.allclose(model.w[1], whole.w[1], atol=1e-6)
    assert all((model.w[e] != weights(torch.float32)[e]).any() for e in range(E))


def test_groups_of_a_mixture_of_experts() -> None:
    model = mixtral()
    groups = param_groups(model, rank=4)
    of = {name: group for group in groups for name, _ in group["params"]}
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            group = of[f"model.layers.{layer}.mlp.experts.{name}"]
            assert (group["rank"], group["matrices"]) == (4, 4)
        assert "matrices" not in of[f"model.layers.{layer}.self_attn.q_proj.weight"]
    chosen = param_groups(model, target=["*.experts.gate_up_proj"], rank=4)
    assert [name for name, _ in chosen[0]["params"]] == [
        f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(2)
    ]
    with pytest.raises(ValueError, match=r"pattern of target must match .*'\*.experts.up'"):
        param_groups(model, target=["*.experts.up"], rank=4)


def test_state_of_a_mixture_of_experts() -> None:
    """By hand: r (n + 2 m) numbers of each expert's m x n; AdamW's 2 m n of what is plain."""
    model, rank = mixtral(), 4
    optimizer = zoopt.GaLoreAdamW(param_groups(model, rank=rank), lr=1e-3, seed=0)
    ids = torch.arange(32).view(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    expected = 0
    for name, param in model.named_parameters():
        count = 4 if ".experts." in name else 1
        m, n = max(param.shape[-2:]), min(param.shape[-2:]) if param.dim() > 1 else 1
        projected = "_proj" in name
        numbers = rank * (n + 2 * m) * count if projected else 2 * param.numel()
        expected += 4 * numbers + 8 * count
    assert optimizer.declared_state_bytes() == expected
    kept = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    assert kept == expected


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(16, 2, **options) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x)[0]
        return x


def test_torchs_attention() -> None:
    groups = param_groups(Attention(), rank=4)
    of = {name: group for group in groups for name, _ in group["params"]}
    assert of["layers.1.in_proj_weight"]["matrices"] == 3
    assert of["layers.1.out_proj.weight"]["rank"] == 4
    assert of["layers.1.in_proj_bias"]["rank"] is None
    of = {
        name: group
        for group in param_groups(Attention(kdim=8, vdim=8), rank=4)
        for name, _ in group["params"]
    }
    assert of["layers.0.k_proj_weight"]["rank"] == 4
    model = Attention()
    optimizer = zoopt.GaLoreAdamW(param_groups(model, rank=4), lr=1e-2, seed=0)
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


class Odd(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
        self.layers[0].fused = nn.Parameter(torch.zeros(*shape))


def test_what_is_left_unprojected_is_said() -> None:
    with pytest.warns(UserWarning, match=r"not projected.*: layers.0.fused \(512, 128\); where"):
        param_groups(Odd(512, 128), rank=4)
    param_groups(Odd(512, 8), rank=4)  # small
    param_groups(Odd(512, 128), target=["layers.*"], rank=4)  # asked for
    with pytest.warns(UserWarning, match=r"'w' of shape \(4, 128, 256\) is projected as one matr"):
        zoopt.GaLoreAdamW([("w", nn.Parameter(torch.zeros(4, 128, 256)))], rank=2)


def test_refuses_stacks_that_do_not_divide() -> None:
    param = nn.Parameter(torch.zeros(8, 4))
    with pytest.raises(ValueError, match=r"matrices must divide the first axis .* got 3 for one"):
        zoopt.GaLoreAdamW([{"params": [param], "matrices": 3, "rank": 2}])
    with pytest.raises(ValueError, match="matrices must be a positive int, got 0"):
        zoopt.GaLoreAdamW([{"params": [param], "matrices": 0, "rank": 2}])


class Fused(nn.Module):
    """Experts that read their weights one after the other, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(weights(torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.tanh(x @ self.up[number].T) for number in range(E)]).sum(0)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Fused()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers[0](x)
        return out


CONVERTED: dict[str, Any] = {
    "gradnorm": lambda model: zoopt.nn.convert_to_gradnorm(model, rank=4, seed=0),
    "output": lambda model: zoopt.nn.convert_to_gradnorm(model, rank=4, norm="output", seed=0),
    "sltrain": lambda model: zoopt.nn.convert_to_sltrain(model, rank=4, density=0.2, seed=0),
    "indices": lambda model: zoopt.nn.convert_to_sltrain(
        model, rank=4, density=0.2, support="indices", seed=0
    ),
}
IDS = torch.arange(32).view(2, 16)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_experts(name: str) -> None:
    """Weights and gradients against autograd of the formula; W made once a pass; merge."""
    model = CONVERTED[name](Layered())
    experts: Any = model.layers[0]
    x = torch.randn(7, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    stack, original = experts.parametrizations.up[0], experts.parametrizations.up.original
    zero = original if original.requires_grad else stack.left
    with torch.no_grad():
        zero.copy_(torch.randn(zero.shape, generator=torch.Generator().manual_seed(1)))
    made = []
    make = stack._make
    stack._make = lambda own: made.append(0) or make(own)
    model(x).square().sum().backward()
    assert made == [0]
    trained = dict(stack.named_parameters()) | {"original": original}
    leaves = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in trained.items()}
    if "left" in leaves:
        v = leaves["original"] + leaves["left"] @ leaves["right"]
        axis = 1 if stack.norm == "input" else 2
        weight = v * (leaves["magnitude"] / v.norm(dim=axis)).unsqueeze(axis)
    else:
        weight = stack.scale * leaves["original"] @ leaves["right"]
        sparse = torch.zeros_like(weight)
        weight = weight + sparse.scatter(2, stack.columns(), leaves["values"])
    torch.testing.assert_close(experts.up, weight, rtol=1e-13, atol=1e-13)
    before = model(x)
    merged: Any = zoopt.nn.merge(copy.deepcopy(model))
    assert type(merged.layers[0]) is Fused
    assert torch.equal(merged(x), before)
    merged(x).square().sum().backward()
    weight.backward(merged.layers[0].up.grad)
    for own, leaf in leaves.items():
        if leaf.requires_grad:
            torch.testing.assert_close(trained[own].grad, leaf.grad, rtol=1e-9, atol=1e-12)


def test_what_converted_experts_keep(tmp_path: Any) -> None:
    """The function of the model, its state dict, and the layers that were not asked for."""
    model = mixtral()
    start = model(input_ids=IDS).logits
    zoopt.nn.convert_to_gradnorm(model, rank=2, seed=0)
    torch.testing.assert_close(model(input_ids=IDS).logits, start, rtol=1e-4, atol=1e-5)
    other = zoopt.nn.convert_to_gradnorm(mixtral(), rank=2, seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    groups = zoopt.first_order.gradnormlorp.param_groups(model, rank=2)
    assert [group.get("matrices", 1) for group in groups] == [1, 4, 1]
    optimizer = zoopt.GradNormLoRP(groups, lr=1e-2, seed=0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_converted_projections_of_torchs_attention() -> None:
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    model: Any = Attention()
    whole = copy.deepcopy(model)
    before = model(x)
    zoopt.nn.convert_to_gradnorm(model, ["*.in_proj_weight"], rank=2)
    assert model.layers[0].parametrizations.in_proj_weight[0].left.shape == (3, 16, 2)
    torch.testing.assert_close(model(x), before)
    zoopt.nn.convert_to_gradnorm(whole, rank=2)
    torch.testing.assert_close(whole(x), before)
    whole(x).square().sum().backward()
    layer = whole.layers[0]
    for owner, own in ((layer, "in_proj_weight"), (layer.out_proj, "weight")):
        assert owner.parametrizations[own][0].left.grad is not None
        assert owner.parametrizations[own].original.grad is None
    zoopt.nn.merge(whole)
    torch.testing.assert_close(whole(x), before)
    for convert in (zoopt.nn.convert_to_quantised, CONVERTED["sltrain"]):
        other: Any = convert(Attention())
        other(x).square().sum().backward()
        assert [n for n, p in other.named_parameters() if p.requires_grad and p.grad is None] == []
        assert not {"in_proj_weight"} & dict(other.layers[1].named_parameters()).keys()
    apart: Any = Attention(kdim=16, vdim=8)
    zoopt.nn.convert_to_gradnorm(apart, ["*.v_proj_weight"], rank=2)
    assert apart.layers[1].parametrizations.v_proj_weight[0].left.shape == (16, 2)
