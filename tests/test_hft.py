"""Half fine-tuning: the halves, and the optimizers that it works over."""

from __future__ import annotations

import collections
import io
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import zoopt
from zoopt.selection.half_fine_tuning import HalfFineTuning, trained_units, units

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16}
IDS = torch.arange(32).view(4, 8) * 5 % 16


def llama(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, num_hidden_layers=layers, intermediate_size=12, max_position_embeddings=8
        )
    )


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=16, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        **SIZES,
        num_hidden_layers=4,
        ffn_dim=12,
        word_embed_proj_dim=8,
        max_position_embeddings=8,
    )
    return transformers.OPTForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, num_hidden_layers=4, intermediate_size=12, max_position_embeddings=8
    )
    return transformers.BertForSequenceClassification(config)


def loss_of(model: nn.Module) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def resting(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def step(model: nn.Module, optimizer: Any) -> float:
    """By backprop, or by the closure alone."""
    if isinstance(optimizer, zoopt.MeZO | zoopt.ZOAdam | zoopt.Hybrid):
        loss: float = optimizer.step(lambda: loss_of(model))
        return loss
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss.item()


def test_halves_of_a_llama() -> None:
    """By the names of the paper, in every round; everything has its turn, and rounds differ."""
    model = llama()
    names = {id(p): name for name, p in model.named_parameters()}
    found = units(model)
    seen: set[str] = set()
    rounds = set()
    for draw in range(20):
        trained = trained_units(found, seed=7, draw=draw)
        active = {
            names[id(p)] for unit, on in zip(found, trained, strict=True) if on for p in unit.params
        }
        per_layer = collections.Counter(name.split(".")[2] for name in active if "_proj" in name)
        mlp = collections.Counter(name.split(".")[2] for name in active if ".mlp." in name)
        attention = [sum(f".{i}.self_attn." in name for name in active) for i in range(4)]
        norms = [sum(f".{i}." in name and "layernorm" in name for name in active) for i in range(4)]
        assert attention == [2] * 4
        assert sorted(mlp.values()) == [1, 1, 2, 2]
        assert norms == [1] * 4
        assert sum(per_layer.values()) == 14
        seen |= active
        rounds.add(tuple(trained))
        assert trained == trained_units(found, seed=7, draw=draw)
    assert len(seen) == 4 * 9
    assert len(rounds) == 20


@pytest.mark.parametrize(
    ("build", "attention", "mlp", "norms"),
    [(llama, 2, (1, 2), 1), (gpt2, 1, (1, 1), 1), (opt, 2, (1, 1), 1), (bert, 2, (1, 1), 1)],
    ids=["llama", "gpt2", "opt", "bert"],
)
def test_halves_of_other_families(
    build: Any, attention: int, mlp: tuple[int, int], norms: int
) -> None:
    found = units(build())
    trained = trained_units(found, seed=1, draw=0)
    counts = collections.Counter(
        (u.layer, u.category) for u, on in zip(found, trained, strict=True) if on
    )
    for layer in range(4):
        assert counts[layer, "attention"] == attention
        assert mlp[0] <= counts[layer, "mlp"] <= mlp[1]
        assert counts[layer, "norm"] == norms


def test_what_is_outside_the_layers_always_trains() -> None:
    for build in (llama, gpt2, opt, bert):
        model = build()
        HalfFineTuning(model, torch.optim.SGD(model.parameters(), lr=0.1), round_steps=1, seed=0)
        layered = ("model.layers.", "transformer.h.", "model.decoder.layers.", "bert.encoder.layer")
        assert resting(model)
        assert all(name.startswith(layered) for name in resting(model))


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
    "zoopt": lambda model: zoopt.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1),
    "galore": lambda model: zoopt.GaLoreAdamW(model.parameters(), lr=1e-2, rank=2, seed=0),
    "mezo": lambda model: zoopt.MeZO(
        model.named_parameters(), lr=1e-3, weight_decay=0.1, perturbation="inplace", seed=0
    ),
    "virtual": lambda model: zoopt.MeZO(
        model.named_parameters(), lr=1e-3, weight_decay=0.1, perturbation="virtual", seed=0
    ),
    "zo adam": lambda model: zoopt.ZOAdam(model.named_parameters(), lr=1e-3, seed=0),
    "hybrid": lambda model: zoopt.Hybrid(
        zoopt.MeZO(model.model.layers[:1].named_parameters(), lr=1e-3, seed=0),
        torch.optim.AdamW(
            [*model.model.layers[1:].parameters(), *model.lm_head.parameters()], lr=1e-2
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_rests_keeps_every_bit(name: str) -> None:
    """In place, a perturbation is taken back up to rounding: but of what rests, nothing is."""
    model = llama(2)
    optimizer = OPTIMIZERS[name](model)
    half = HalfFineTuning(model, optimizer, round_steps=3, seed=2)
    rests = []
    for number in range(9):
        assert half.round == number // 3
        rest = resting(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        step(model, optimizer)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (n in rest or id(p) not in own), n
            assert p.grad is None or n not in rest
        rests.append(rest)
    assert rests[0] == rests[1] == rests[2]
    assert len({frozenset(rest) for rest in rests}) == 3
    half.remove()
    assert not resting(model)
    assert not any(key.startswith("hft") for key in optimizer.param_groups[0])
    step(model, optimizer)


@pytest.mark.parametrize("saved_at", [4, 6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact(name: str, saved_at: int) -> None:
    """In a round and at the end of one; the other seed and length give way to the checkpoint's."""
    whole, first, second = llama(2), llama(2), llama(2)
    for model, count in ((whole, 8), (first, saved_at)):
        optimizer = OPTIMIZERS[name](model)
        HalfFineTuning(model, optimizer, round_steps=3, seed=2)
        for _ in range(count):
            step(model, optimizer)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    optimizer = OPTIMIZERS[name](second)
    half = HalfFineTuning(second, optimizer, round_steps=100, seed=3)
    optimizer.load_state_dict(state)
    assert half.round == saved_at // 3
    assert resting(second) == resting(first)
    for _ in range(8 - saved_at):
        step(second, optimizer)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoints_without_it() -> None:
    """A state dict from before half fine-tuning loads; the rounds go on from where they are."""
    model = llama(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = optimizer.state_dict()
    half = HalfFineTuning(model, optimizer, round_steps=2, seed=0)
    for _ in range(3):
        step(model, optimizer)
    optimizer.load_state_dict(state)
    assert half.round == 1
    step(model, optimizer)
    assert half.round == 2


def test_frozen_parameters_stay_frozen_and_the_loss_falls() -> None:
    model = llama(2)
    frozen = model.model.layers[0].mlp.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with HalfFineTuning(model, optimizer, round_steps=2, seed=0):
        losses = []
        for _ in range(30):
            losses.append(step(model, optimizer))
            assert not any(p.requires_grad for p in frozen.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_refuses() -> None:
    model = llama(1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    named = list(model.named_parameters())
    for optimizer, options, error, message in (
        (sgd, {"round_steps": 0}, ValueError, "round_steps must be a positive int, got 0"),
        (sgd, {"seed": -1}, ValueError, r"seed must be an int in \[0, 2\^64\), got -1"),
        (3, {}, TypeError, "optimizer must be a torch optimizer, got int"),
        (
            zoopt.MeZO(named, momentum=0.9, momentum_window=4),
            {},
            ValueError,
            "must not keep a window of past directions, .* got momentum_window=4",
        ),
        (zoopt.ZOAdam(named, state="window"), {}, ValueError, "got state='window'"),
    ):
        with pytest.raises(error, match=message):
            HalfFineTuning(model, optimizer, **{"round_steps": 1, **options})  # type: ignore[arg-type]
        assert not resting(model)
    HalfFineTuning(model, sgd, round_steps=1)
    with pytest.raises(ValueError, match="must not be under half fine-tuning yet"):
        HalfFineTuning(model, sgd, round_steps=1)
    plain = nn.Linear(2, 2)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"must keep its repeated layers in an nn.ModuleList"):
        HalfFineTuning(plain, sgd, round_steps=1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_distributed_checkpoint_counts_no_step(name: str) -> None:
    model = llama()
    optimizer = OPTIMIZERS[name](model)
    with HalfFineTuning(model, optimizer, round_steps=1, seed=0) as half:
        get_optimizer_state_dict(model, optimizer)
        assert half.round == 0
