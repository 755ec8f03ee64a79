"""OwLore: outlier scores, sampling, and which layers have gradients and state."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import nn

import zoopt
from zoopt.first_order.owlore import OwLore, outlier_fraction, outlier_scores, sample_layers

LAYERS = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


IDS = torch.arange(32).view(4, 8) * 5 % 16
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "rank": 4,
    "num_layers": 2,
    "sampling_gap": 3,
    "outlier_threshold": 2.0,
    "seed": 1,
}


def build(model: nn.Module, **options: Any) -> OwLore:
    return OwLore(model, calibration=[IDS], **{**OPTIONS, **options})


def backward(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), (IDS * 3 % 16).flatten())
    loss.backward()
    return loss.detach()


def trained(model: Model) -> list[int]:
    """The numbers of the blocks whose parameters require gradients, all or none of each."""
    found = []
    for number, block in enumerate(model.blocks):
        required = {p.requires_grad for p in block.parameters()}
        assert len(required) == 1
        found += [number] if required == {True} else []
    return found


def test_outlier_fraction_by_hand() -> None:
    """A = ||X_j|| |W_ij| over two maps together: mean 2, and one of 8 exceeds 3 times that."""
    w = torch.tensor([[1.0, -0.5], [0.25, 4.0]])
    x = torch.tensor([1.0, 2.0])  # A = 1, 1, .25, 8
    other = torch.tensor([[1.25, -1.5], [1.5, 1.5]]), torch.ones(2)  # A = 1.25, 1.5, 1.5, 1.5
    assert outlier_fraction([(w, x), other], 3.0) == 1 / 8
    assert outlier_fraction([(w, x), other], 4.0) == 0.0
    assert outlier_fraction([(w, x)], 1.0) == 1 / 4


@pytest.mark.parametrize("conv1d", [False, True])
def test_scores_are_those_of_the_inputs(conv1d: bool) -> None:
    """From the definition, with inputs recorded by hand; batches of every kind; modes restored."""
    model = Model()
    if conv1d:
        for block in model.blocks:
            old, block.up = block.up, transformers.pytorch_utils.Conv1D(12, 8)
            with torch.no_grad():
                block.up.weight.copy_(old.weight.t())
                block.up.bias.copy_(old.bias)
    model.blocks[0].eval()
    scores = outlier_scores(model, [IDS[:1], (IDS[1:2],), {"ids": IDS[2:]}], threshold=3.0)
    assert [block.training for block in model.blocks] == [False] + [True] * (LAYERS - 1)
    x = model.embedding(IDS)
    for block, score in zip(model.blocks, scores, strict=True):
        hidden = block.norm(x)
        up = block.up.weight.t() if conv1d else block.up.weight
        inner = torch.tanh(block.up(hidden))
        a = torch.cat(
            [
                (up.abs() * hidden.flatten(0, 1).norm(dim=0)).flatten(),
                (block.down.weight.abs() * inner.flatten(0, 1).norm(dim=0)).flatten(),
            ]
        )
        assert score == pytest.approx((a > 3.0 * a.mean()).double().mean().item(), abs=1.01 / 192)
        x = block(x)


def test_sampling_follows_the_scores() -> None:
    """2,000 draws of 1 of 4: p_l within 5 sigma; of 2: the exact chance of a pair, likewise."""
    scores, draws = [0.1, 0.0, 0.3, 0.6], 2_000
    single = [sample_layers(scores, 1, seed=5, draw=d)[0] for d in range(draws)]
    for layer, p in enumerate(scores):
        assert abs(single.count(layer) - p * draws) <= 5 * math.sqrt(draws * p * (1 - p))
    pairs = [sample_layers(scores, 2, seed=6, draw=d) for d in range(draws)]
    assert all(first < second for first, second in pairs)
    # Layer 3 and then 2, or 2 and then 3.
    p = 0.6 * 0.3 / 0.4 + 0.3 * 0.6 / 0.7
    assert abs(pairs.count([2, 3]) - p * draws) <= 5 * math.sqrt(draws * p * (1 - p))
    # Layers without outliers come when no other is left, and all have their turn.
    assert sample_layers(scores, 3, seed=0, draw=0) == [0, 2, 3]
    assert sample_layers(scores, 9, seed=0, draw=0) == [0, 1, 2, 3]
    some = {sample_layers([0.0] * 4, 1, seed=0, draw=d)[0] for d in range(40)}
    assert some == {0, 1, 2, 3}


def test_only_sampled_layers_have_gradients_and_state() -> None:
    """Others keep every bit; what is dropped loses its state; what returns begins anew."""
    model = Model()
    optimizer = build(model)
    seen: set[int] = set()
    outside = [model.embedding.weight, *model.head.parameters()]
    for step in range(24):
        sampled = optimizer.sampled_layers
        assert len(sampled) == 2
        assert trained(model) == sampled
        seen |= set(sampled)
        before = [p.detach().clone() for p in model.blocks.parameters()]
        backward(model)
        numbers = [n for n, block in enumerate(model.blocks) for _ in block.parameters()]
        for number, p in zip(numbers, model.blocks.parameters(), strict=True):
            assert (p.grad is not None) == (number in sampled)
        optimizer.step()
        for number, p, old in zip(numbers, model.blocks.parameters(), before, strict=True):
            assert torch.equal(p, old) == (number not in sampled)
        # With the last step of a period the next one's layers are sampled, and the rest is freed.
        own = {id(p) for n in optimizer.sampled_layers for p in model.blocks[n].parameters()}
        with_state = {id(p) for p in optimizer.state}
        assert with_state - {id(p) for p in outside} <= own
        assert {id(p) for p in outside} <= with_state
        for number in set(optimizer.sampled_layers) - set(sampled):
            assert model.blocks[number].up.weight not in optimizer.state
        if (step + 1) % 3:
            assert optimizer.sampled_layers == sampled
            measured = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
            assert measured == optimizer.declared_state_bytes()
    assert len(seen) > 2


def test_state_begins_anew_when_a_layer_returns() -> None:
    model = Model()
    optimizer = build(model, sampling_gap=2)
    steps: dict[int, list[int]] = {number: [] for number in range(LAYERS)}
    for _ in range(30):
        sampled = optimizer.sampled_layers
        backward(model)
        optimizer.step()
        for number in sampled:
            state = optimizer.state.get(model.blocks[number].up.weight)
            steps[number].append(int(state["step"]) if state else 0)
    returned = [counts for counts in steps.values() if counts.count(1) > 1]
    assert returned  # at least one layer was dropped, came back and counted from 1 again


def test_loss_falls_and_frozen_parameters_stay() -> None:
    model = Model()
    model.blocks[2].up.weight.requires_grad_(False)
    optimizer = build(model)
    frozen = model.blocks[2].up.weight.clone()
    losses = []
    for _ in range(60):
        losses.append(backward(model).item())
        optimizer.step()
        assert not model.blocks[2].up.weight.requires_grad
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(model.blocks[2].up.weight, frozen)


@pytest.mark.parametrize("saved_at", [4, 6])
def test_resume_is_exact(saved_at: int) -> None:
    """Within a period and at its end: the same layers and the same bits."""
    whole, first, second = Model(), Model(), Model()
    optimizers = [build(whole), build(first)]
    for model, optimizer, count in zip((whole, first), optimizers, (13, saved_at), strict=True):
        for _ in range(count):
            backward(model)
            optimizer.step()
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizers[1].state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    # Another seed, and scores of other weights: the checkpoint's take their place.
    optimizer = build(second, seed=99)
    optimizer.load_state_dict(state)
    assert trained(second) == trained(first) == optimizer.sampled_layers
    for _ in range(13 - saved_at):
        backward(second)
        optimizer.step()
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_of_all_layers_it_is_galore(options: dict[str, Any]) -> None:
    """Bit for bit, and GaLore's contract holds it to the float64 transcription of the paper."""
    models = Model(), Model()
    galore = zoopt.GaLoreAdamW(
        zoopt.lowrank.param_groups(models[1], rank=4),
        lr=1e-2,
        update_proj_gap=100,
        scale=1.0,
        seed=1,
        **options,
    )
    for model, optimizer in zip(
        models, (build(models[0], num_layers=9, **options), galore), strict=True
    ):
        for _ in range(7):
            backward(model)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_fused_backward_and_schedulers() -> None:
    """Fused with backward it takes the same steps; layers that are sampled later too."""
    plain, fused = Model(), Model()
    optimizers = [build(plain), build(fused)]
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 0.5, 1.0, 5) for o in optimizers]
    with zoopt.fuse_backward(fused, optimizers[1]):
        for _ in range(10):
            for model, optimizer, scheduler in zip(
                (plain, fused), optimizers, schedulers, strict=True
            ):
                backward(model)
                optimizer.step()
                scheduler.step()
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rate_zero_is_not_counted() -> None:
    model = Model()
    optimizer = build(model, lr=0.0, sampling_gap=1)
    before = optimizer.sampled_layers
    for _ in range(5):
        optimizer.step()
    assert optimizer.sampled_layers == before
    assert optimizer.param_groups[0]["updates"] == 0


def test_trainer(tmp_path: Path) -> None:
    """In transformers.Trainer, on a LLaMA: trains, and only the sampled layers have gradients."""
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=8,
    )
    model = transformers.LlamaForCausalLM(config)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    optimizer = OwLore(model, lr=1e-2, calibration=[{"input_ids": IDS}], sampling_gap=2)
    assert optimizer.sampled_layers == [0, 1, 2, 3]  # fewer than five: all of them
    optimizer = OwLore(
        model, lr=1e-2, calibration=[{"input_ids": IDS}], sampling_gap=2, num_layers=1, seed=0
    )
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=7,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None)
    )
    try:
        trainer.train()
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    assert optimizer.param_groups[0]["updates"] == 7
    active = [
        i for i, layer in enumerate(model.model.layers) if next(layer.parameters()).requires_grad
    ]
    assert active == optimizer.sampled_layers
    assert model.model.embed_tokens.weight.requires_grad


def test_refuses() -> None:
    for options, error, message in (
        ({"sampling_gap": 0}, ValueError, "sampling_gap must be a positive int, got 0"),
        ({"num_layers": 0}, ValueError, "num_layers must be a positive int, got 0"),
        ({"rank": 0}, ValueError, "rank must be a positive int, got 0"),
        ({"outlier_threshold": -1.0}, ValueError, "threshold must be a finite number >= 0"),
        ({"calibration": []}, ValueError, "calibration must hold at least one batch"),
    ):
        model = Model()
        with pytest.raises(error, match=message):
            OwLore(model, **{"calibration": [IDS], **OPTIONS, **options})
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"must keep its repeated layers in an nn.ModuleList"):
        OwLore(nn.Sequential(nn.Linear(2, 2)), calibration=[torch.ones(1, 2)])
