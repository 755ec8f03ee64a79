"""Param groups by the kind of layer, on tiny models of four families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zoopt
from zoopt.lowrank import param_groups
from zoopt.nn.modules import linear_layers

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, intermediate_size=12, num_key_value_heads=2, max_position_embeddings=8
        )
    )


def opt() -> nn.Module:
    # Embeddings narrower than the layers: projections in and out, which are not of the layers.
    config = transformers.OPTConfig(
        **SIZES, ffn_dim=12, word_embed_proj_dim=4, max_position_embeddings=8
    )
    return transformers.OPTForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, intermediate_size=12, max_position_embeddings=8)
    return transformers.BertForSequenceClassification(config)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def names(group: dict[str, Any]) -> set[str]:
    return {name for name, _ in group["params"]}


ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
EXPECTED = {
    gpt2: [
        f"transformer.h.{i}.{x}"
        for i in range(2)
        for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
    llama: [
        f"model.layers.{i}.{x}"
        for i in range(2)
        for x in [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    ],
    opt: [
        f"model.decoder.layers.{i}.{x}"
        for i in range(2)
        for x in [*(f"self_attn.{x}_proj" for x in "qkv"), "self_attn.out_proj", "fc1", "fc2"]
    ],
    bert: [
        f"bert.encoder.layer.{i}.{x}.dense"
        for i in range(2)
        for x in ("attention.output", "intermediate", "output")
    ]
    + [
        f"bert.encoder.layer.{i}.attention.self.{x}"
        for i in range(2)
        for x in ("query", "key", "value")
    ],
    mlp: ["0", "2"],
}


@pytest.mark.parametrize("build", EXPECTED, ids=lambda build: build.__name__)
def test_linear_is_the_attention_and_mlps(build: Any) -> None:
    model = build()
    projected, plain = param_groups(model, rank=2, scale=0.5)
    weights = {f"{name}.weight" for name in EXPECTED[build]}
    assert names(projected) == weights
    assert (projected["rank"], projected["scale"], plain["rank"]) == (2, 0.5, None)
    # All parameters, each once, under the names that the model gives them.
    together = dict(projected["params"] + plain["params"])
    assert len(together) == len(projected["params"]) + len(plain["params"])
    assert together.keys() == {name for name, _ in model.named_parameters()}
    optimizer = zoopt.GaLoreAdamW([projected, plain], seed=0)
    optimizer.param_groups[0]["lr"] = 1e-2
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        assert ("basis" in optimizer.state[param]) == (name in weights), name


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (r".*\.0\.self_attn\.[qv]_proj", ["model.layers.0.self_attn.q_proj"]),
        (["*.0.self_attn.q_proj", "*.0.self_attn.v_proj"], ["model.layers.0.self_attn.q_proj"]),
        (
            lambda name, module: module.out_features == 8 and ".0.self_attn." in name,
            ["model.layers.0.self_attn.o_proj"],
        ),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_targets(target: Any, expected: list[str]) -> None:
    """A regular expression, shell patterns, a predicate; a head if it is asked for."""
    found = linear_layers(llama(), target)
    assert set(expected) <= found.keys()
    assert all(name == "lm_head" or name.startswith("model.layers.0.self_attn.") for name in found)
    assert len(found) == (1 if expected == ["lm_head"] else 4 if callable(target) else 2)


def test_tied_weights_and_heads_are_plain() -> None:
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    _, plain = param_groups(model, rank=2)
    assert "transformer.wte.weight" in names(plain)
    with pytest.raises(ValueError, match="target must match a linear layer"):
        param_groups(model, "lm_head", rank=2)


def test_output_embedding_of_a_model_without_repeated_layers() -> None:
    model = mlp()
    model.get_output_embeddings = lambda: model[2]  # type: ignore[assignment]
    assert list(linear_layers(model)) == ["0"]


def test_frozen_parameters_are_left_out() -> None:
    model = llama()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="matches frozen ones only; unfreeze them"):
        param_groups(model, rank=2)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    [group] = param_groups(model, rank=2)
    assert names(group) == {"model.layers.0.mlp.up_proj.weight"}


def test_streams_come_from_names() -> None:
    """A step does not depend on the order of the parameters."""
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    for model, reverse in zip(models, (False, True), strict=True):
        groups = param_groups(model, rank=1, projector="random", stagger=False)
        if reverse:
            groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
        optimizer = zoopt.GaLoreAdamW(groups, lr=1e-2, seed=3)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_refuses() -> None:
    for target, error, message in (
        ("nothing", ValueError, "target must match a linear layer .* got 'nothing'"),
        (["0", "9"], ValueError, "each pattern of target must match a linear layer, got '9'"),
        (lambda name, module: False, ValueError, "matches none; the model's are '0', '2'"),
        (3, TypeError, "target must be 'linear', a regular expression"),
        ([3], TypeError, "target must be 'linear', a regular expression"),
    ):
        with pytest.raises(error, match=message):
            param_groups(mlp(), target, rank=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be a positive int, got 0"):
        param_groups(mlp(), rank=0)
    with pytest.raises(ValueError, match="the model's are none at all"):
        param_groups(nn.LayerNorm(3), rank=1)
