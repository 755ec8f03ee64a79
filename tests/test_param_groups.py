"""What param groups mean to projected optimizers: the authors' form, names, foreign keys."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from zoopt.first_order.projected.selection import is_plain_by_name
from zoopt.lowrank import param_groups

RANKED = [
    zoopt.GaLoreAdamW,
    zoopt.GaLoreAdafactor,
    zoopt.QGaLoreAdamW,
    zoopt.Apollo,
    zoopt.ApolloMini,
    zoopt.Fira,
    zoopt.LDAdamW,
    zoopt.GradNormLoRP,
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        out: torch.Tensor = self.lm_head(self.norm(x))
        return out


def ranks(optimizer: torch.optim.Optimizer) -> dict[str, int | None]:
    """What each named parameter is projected to."""
    return {
        name: group["rank"] for group in optimizer.param_groups for name in group["param_names"]
    }


def step(model: Model, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(12).view(2, 6)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("cls", RANKED)
def test_the_authors_form_of_groups(cls: type[Any]) -> None:
    """`if "rank" in group`: the other group is AdamW's."""
    plain, matrix = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))
    own = {"rank": 2, "update_proj_gap": 50, "scale": 0.5, "proj_type": "std"}
    own = {key: value for key, value in own.items() if key in cls([plain]).defaults}
    if cls is zoopt.GradNormLoRP:
        own["proj_type"] = "full"
    optimizer = cls([{"params": [plain]}, {"params": [matrix], **own}])
    assert [group["rank"] for group in optimizer.param_groups] == [None, 2]
    for param in (plain, matrix):
        param.grad = torch.randn(8, 6)
    optimizer.step()
    assert not optimizer.bases(plain)
    assert optimizer.bases(matrix)
    # Without a rank anywhere the optimizer's is everyone's.
    assert cls([{"params": [plain]}, {"params": [matrix]}], rank=3).param_groups[0]["rank"] == 3


@pytest.mark.parametrize("cls", RANKED)
def test_embeddings_and_output_layers_are_plain_unless_asked_for(cls: type[Any]) -> None:
    model = Model()
    optimizer = cls(model.named_parameters(), lr=1e-3, rank=4)
    found = ranks(optimizer)
    assert found["embed_tokens.weight"] is found["lm_head.weight"] is None
    assert found["layers.0.weight"] == found["layers.1.weight"] == 4
    step(model, optimizer)
    assert optimizer.state[model.embed_tokens.weight]["step"] == 1
    assert not optimizer.bases(model.embed_tokens.weight)
    asked = cls([{"params": list(model.named_parameters()), "rank": 4}])
    assert set(ranks(asked).values()) == {4}
    added = cls([("up.weight", nn.Parameter(torch.randn(3, 3)))], rank=4)
    added.add_param_group({"params": [("wte.weight", nn.Parameter(torch.randn(8, 4)))]})
    assert added.param_groups[1]["rank"] is None


def test_names_of_embeddings_and_output_layers() -> None:
    plain = (
        *("model.embed_tokens.weight", "transformer.wte.weight", "wpe.weight", "shared.weight"),
        *("lm_head.weight", "head.weight", "output.weight", "score.weight", "tok_embeddings.w"),
        *("bert.embeddings.word_embeddings.weight", "classifier.bias", "patch_embed.proj.weight"),
    )
    projected = (
        *("layers.0.attention.output.dense.weight", "h.0.attn.c_proj.weight", "0.weight"),
        *("model.layers.1.mlp.up_proj.weight", "blocks.0.attn.heads.weight", "weight"),
    )
    assert all(map(is_plain_by_name, plain))
    assert not any(map(is_plain_by_name, projected))


def test_a_rank_that_reaches_the_short_side_is_said() -> None:
    large, small = nn.Parameter(torch.zeros(512, 128)), nn.Parameter(torch.zeros(32, 16))
    with pytest.warns(UserWarning, match="the rank of 'up.weight' reaches its short side, 128"):
        zoopt.GaLoreAdamW([("in.weight", small), ("up.weight", large)], rank=128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoopt.GaLoreAdamW([small, large], rank=127)


def test_keys_of_other_classes_are_refused_with_the_remedy() -> None:
    model = Model()
    weight = [nn.Parameter(torch.zeros(4, 4))]
    for cls, groups, message in (
        (zoopt.AdamW, param_groups(model, rank=4), "rank must not be .* use zoopt.GaLoreAdamW"),
        (zoopt.Frugal, [{"params": weight, "rank": 4}], "rank must not be .* give its density"),
        (zoopt.Apollo, [{"params": weight, "scale_type": "tensor"}], "scale_type .*ApolloMini"),
        (zoopt.Apollo, [{"params": weight, "proj": "svd"}], "proj must not .*projector='random'"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(groups)


def test_groups_that_exist_keep_their_options() -> None:
    model = Model()
    late = {id(p) for p in model.layers[1].parameters()}
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if id(p) not in late], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [p for p in params if id(p) in late], "lr": 2e-3},
    ]
    made = param_groups(model, rank=4, groups=groups, scale=0.5)
    optimizer = zoopt.GaLoreAdamW(made, lr=7.0)
    of = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert len(of) == len(params)
    assert (of["layers.0.weight"]["lr"], of["layers.1.weight"]["lr"]) == (1e-3, 2e-3)
    assert (of["layers.0.weight"]["rank"], of["layers.1.weight"]["rank"]) == (4, 4)
    assert of["layers.0.weight"]["scale"] == 0.5
    assert (of["layers.0.bias"]["rank"], of["norm.weight"]["weight_decay"]) == (None, 0.1)
    with pytest.raises(ValueError, match="groups must be over the model's parameters, got one of"):
        param_groups(model, rank=4, groups=[{"params": [nn.Parameter(torch.zeros(2))]}])


def test_no_decay() -> None:
    model = Model()
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
    for no_decay, spared in (
        (False, set()),
        (True, {"layers.0.bias", "layers.1.bias", "norm.weight", "norm.bias"}),
        (
            ["*norm*", "layers.0.*"],
            {"norm.weight", "norm.bias", "layers.0.weight", "layers.0.bias"},
        ),
    ):
        optimizer = zoopt.GaLoreAdamW(param_groups(model, rank=4, no_decay=no_decay), **options)
        decays = {
            name: group["weight_decay"]
            for group in optimizer.param_groups
            for name in group["param_names"]
        }
        assert {name for name, decay in decays.items() if not decay} == spared
        assert set(ranks(optimizer).values()) == {4, None}
        step(model, optimizer)
