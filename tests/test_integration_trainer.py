"""transformers.Trainer with zeroth-order steps."""

from __future__ import annotations

import collections
import copy
import gc
import math
import operator
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

import zoopt
from tests.compare import equal
from tests.optimizer_table import ROWS, Row, mlp
from zoopt.integrations.transformers import ZOTrainer
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer

MEZO = {"lr": 1e-2, "zo_eps": 1e-3}
LENGTH, VOCABULARY = 10, 32


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """The Trainer collects garbage at every start; let it not walk through all of the imports."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def sentences(count: int) -> list[dict[str, Tensor]]:
    """Token sequences that begin with a varying number of tokens which the loss leaves out."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for i in range(count):
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: i % 5] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def opt(dropout: float = 0.0, seed: int = 0) -> transformers.OPTForCausalLM:
    """A tiny OPT: tied embeddings, biases, layer norms."""
    torch.manual_seed(seed)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        init_std=0.2,
        dropout=dropout,
    )
    return transformers.OPTForCausalLM(config)


class Means(nn.Module):
    """A model whose loss is a mean over its micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Tanh(), nn.Linear(8, 1))

    def squares(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return (self.layers(input_ids).squeeze(-1) - labels / VOCABULARY).square()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.squares(input_ids, labels).mean()}


class Shares(Means):
    """A model that divides its loss by the number of labels in all micro-batches."""

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        squares = self.squares(input_ids, labels)[labels != -100]
        return {"loss": squares.sum() / kwargs.get("num_items_in_batch", len(squares))}


Built = tuple[type[torch.optim.Optimizer], dict[str, Any]]
#: Arguments of the Trainer, among those that it shares with TrainingArguments here.
TRAINER = {"data_collator", "optimizers", "eval_dataset", "compute_metrics", "callbacks"}


def build(
    model: nn.Module,
    output: Path,
    optimizer: Built | None = (zoopt.MeZO, MEZO),
    *,
    data: list[dict[str, Tensor]] | None = None,
    **options: Any,
) -> Any:
    """A trainer; the options are its own or those of its TrainingArguments."""
    own = {key: options.pop(key) for key in TRAINER & options.keys()}
    if "optimizers" not in own:
        own["optimizer_cls_and_kwargs"] = optimizer
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **options,
    }
    args = transformers.TrainingArguments(output_dir=str(output), **options)
    data = sentences(12) if data is None else data
    return ZOTrainer(model=model, args=args, train_dataset=data, **own)


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone().view(torch.uint8) for p in model.parameters()]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Recorder(transformers.TrainerCallback):
    """Counts events, and keeps what each step measured."""

    def __init__(self) -> None:
        self.events: collections.Counter[str] = collections.Counter()
        self.records: list[zoopt.zeroth_order.StepRecord] = []

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.events["substep"] += 1

    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.events["step"] += 1
        self.records.append(optimizer.optimizer.last_step)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.events["evaluate"] += 1

    def on_save(self, *_: Any, **__: Any) -> None:
        self.events["save"] += 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_equals_a_plain_loop(kind: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = opt().to(dtype)
    twin = copy.deepcopy(model)
    batches: list[dict[str, Tensor]] = []

    def collate(features: list[Any]) -> dict[str, Tensor]:
        batches.append(transformers.default_data_collator(features))
        return batches[-1]

    trainer = build(
        model,
        tmp_path,
        data_collator=collate,
        optimizers=(zoopt.MeZO(model.named_parameters(), seed=5, **MEZO), None),
        bf16=kind == "autocast",
        max_steps=8,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1e-3,
    )
    trainer.train()
    assert all(p.dtype == dtype and p.grad is None for p in model.parameters())

    plain = zoopt.MeZO(twin.named_parameters(), seed=5, **MEZO)
    schedule = transformers.get_scheduler("cosine", plain, 2, 8)
    losses, norms, rates = [], [], []
    for batch in batches[:8]:

        def closure(batch: Any = batch) -> Tensor:
            count = (batch["labels"][:, 1:] != -100).sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                loss: Tensor = twin(**batch, num_items_in_batch=count).loss
            return loss

        losses.append(plain.probe(closure))
        plain.step()
        assert plain.last_step is not None
        norms.append(abs(plain.last_step.projected_grads[0]))
        rates.append(plain.param_groups[0]["lr"])
        schedule.step()
    assert equal(list(model.parameters()), list(twin.parameters()))
    assert logged(trainer, "learning_rate") == rates
    assert logged(trainer, "grad_norm") == norms
    assert min(norms) > 0
    # The Trainer adds losses up in float32.
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"estimator": "one-sided", "num_probes": 3}], ids=str)
@pytest.mark.parametrize("kind", [Means, Shares])
def test_accumulation_equals_one_big_batch(
    kind: type[Means], options: dict[str, Any], tmp_path: Path
) -> None:
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = kind().double()
        start = copy.deepcopy(model)
        trainer = build(
            *(model, tmp_path, (zoopt.MeZO, {**MEZO, **options})),
            data=sentences(8),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        ends.append((list(model.parameters()), logged(trainer, "loss")))
    (whole, whole_losses), (accumulated, losses) = ends
    # In float64: the sums' order changes a loss by some 1e-14, its slope by that over zo_eps.
    for p, q, r in zip(whole, accumulated, start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-10)
        assert (p - r).abs().max() > 1e-4
    assert losses == pytest.approx(whole_losses, rel=1e-6)


RESUMED = {
    "max_steps": 6,  # of three an epoch
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "lr_scheduler_type": "cosine",
}


def assert_same_run(whole: Any, resumed: Any) -> None:
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    assert equal(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert whole.optimizer.optimizer.last_step == resumed.optimizer.optimizer.last_step
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(whole, key) == logged(resumed, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_resumes_to_the_bit_in_the_middle_of_an_epoch(dtype: torch.dtype, tmp_path: Path) -> None:
    options = {**MEZO, "momentum": 0.9, "num_probes": 2}
    model = opt(dropout=0.1).to(dtype)
    whole = build(model, tmp_path, (zoopt.MeZO, options), **RESUMED)
    whole.train()
    again = opt(dropout=0.1, seed=1).to(dtype)
    assert not equal(model.state_dict(), again.state_dict())
    # Hyperparameters come from the checkpoint.
    other = (zoopt.MeZO, {**options, "lr": 0.5, "seed": 99})
    resumed = build(again, tmp_path / "again", other, **RESUMED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_run(whole, resumed)


class Dropped(nn.Module):
    """The table's MLP, with a loss and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = nn.functional.dropout(input_ids[:, :6] / VOCABULARY, 0.1, self.training)
        return {"loss": (self.mlp(x) - labels[:, 6:8] / VOCABULARY).square().mean()}


PROBED = [
    row
    for row in ROWS
    if issubclass(row.cls, ZerothOrderOptimizer)
    and not issubclass(row.cls, zoopt.ZOConservativeSGD)
    and not row.build(mlp()).defaults["maximize"]
]


@pytest.mark.parametrize("row", PROBED, ids=str)
def test_every_zeroth_order_optimizer_resumes_to_the_bit(row: Row, tmp_path: Path) -> None:
    def make(output: Path, **options: Any) -> Any:
        model = Dropped()
        return build(model, output, optimizers=(row.build(model.mlp, **options), None), **RESUMED)

    whole, resumed = make(tmp_path), make(tmp_path / "again", lr=0.5, seed=99)
    whole.train()
    assert min(logged(whole, "grad_norm")) > 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_run(whole, resumed)


def test_an_optimizer_that_cannot_add_probes_up_says_so(tmp_path: Path) -> None:
    model = opt()
    before = bits(model)
    trainer = build(model, tmp_path, (zoopt.ZOConservativeSGD, MEZO))
    with pytest.raises(RuntimeError, match="cannot add up probes of several"):
        trainer.train()
    assert equal(bits(model), before)


def test_logs_the_root_mean_square_of_several_projected_gradients(tmp_path: Path) -> None:
    recorder = Recorder()
    optimizer = (zoopt.MeZO, {**MEZO, "num_probes": 3})
    # Label smoothing takes the labels out of its inputs, at each evaluation.
    options = {"callbacks": [recorder], "label_smoothing_factor": 0.1}
    trainer = build(opt(), tmp_path, optimizer, **options)
    trainer.train()
    assert [len(record.projected_grads) for record in recorder.records] == [3] * 4
    expected = [math.dist(record.projected_grads, (0.0,) * 3) for record in recorder.records]
    assert logged(trainer, "grad_norm") == pytest.approx([norm / 3**0.5 for norm in expected])


def test_the_log_leaves_skipped_probes_out(tmp_path: Path) -> None:
    model = Means()
    recorder = Recorder()
    optimizer = (zoopt.MeZO, {**MEZO, "num_probes": 2})
    trainer = build(model, tmp_path, optimizer, callbacks=[recorder], max_steps=2)
    calls = iter(range(100))
    # A run's first evaluation is made twice: spoil the second pair, and then all of step two.
    model.register_forward_hook(
        lambda _, __, output: (
            output | {"loss": math.nan + output["loss"]} if next(calls) >= 3 else None
        )
    )
    with pytest.warns(UserWarning, match="skipped 1 of 2 probes"):
        trainer.train()
    first, second = logged(trainer, "grad_norm")
    assert first == abs(recorder.records[0].projected_grads[0]) > 0
    assert math.isnan(second)


def test_dropout_is_the_same_at_all_points_of_a_micro_batch(tmp_path: Path) -> None:
    recorder = Recorder()
    optimizer = (zoopt.MeZO, {"lr": 0.0, "zo_eps": 1e-5, "num_probes": 2})
    # The same batch in every step: what differs from step to step is dropout alone.
    build(
        *(opt(dropout=0.3), tmp_path, optimizer),
        data=sentences(2),
        callbacks=[recorder],
        max_steps=6,
    ).train()
    losses = torch.tensor([record.losses for record in recorder.records]).flatten(1)
    within = losses.max(1).values - losses.min(1).values
    assert within.max() < 0.01 * (losses.max(0).values - losses.min(0).values).min()


def test_learns_evaluates_saves_the_best_and_predicts(tmp_path: Path) -> None:
    recorder, model = Recorder(), opt()
    trainer = build(
        model,
        tmp_path,
        (zoopt.MeZO, {"lr": 2e-2, "max_projected_grad": 3.0}),
        data=sentences(4),
        eval_dataset=sentences(4),
        compute_metrics=lambda p: {"right": (p.predictions.argmax(-1) == p.label_ids).mean()},
        callbacks=[recorder],
        max_steps=60,
        gradient_accumulation_steps=2,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=15,
        save_strategy="steps",
        save_steps=15,
        save_total_limit=1,
        load_best_model_at_end=True,
        activation_checkpointing=True,
    )
    before = trainer.evaluate()["eval_loss"]
    recorder.events.clear()
    trainer.train()
    assert recorder.events == {"substep": 60, "step": 60, "evaluate": 4, "save": 4}
    evaluated = logged(trainer, "eval_loss")[1:]
    assert trainer.state.best_metric == min(evaluated) < before - 0.3
    best = transformers.OPTForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert equal(model.state_dict(), best.state_dict())
    predicted = trainer.predict(sentences(4))
    assert predicted.predictions.shape == (4, LENGTH, VOCABULARY)
    assert predicted.metrics["test_loss"] == pytest.approx(min(evaluated), rel=1e-5)
    assert set(predicted.metrics) > {"test_right"}


def test_the_trainers_groups_decay_as_its_arguments_say(tmp_path: Path) -> None:
    model = opt()
    optimizer = (zoopt.MeZO, {"lr": 1e-2, "weight_decay": 0.7})
    trainer = build(model, tmp_path, optimizer, weight_decay=0.1, learning_rate=0.3, seed=11)
    trainer.create_optimizer()
    decayed, rest = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    assert decayed["lr"] == rest["lr"] == 1e-2
    assert decayed["seed"] == rest["seed"] == 11


def test_an_empty_group_does_no_harm(tmp_path: Path) -> None:
    """The Trainer makes one for parameters without decay, when those are frozen, say."""
    model = opt()
    for param in model.parameters():
        param.requires_grad_(param.ndim == 2)
    trainer = build(model, tmp_path)
    before = bits(model)
    trainer.train()
    assert [bool(group["params"]) for group in trainer.optimizer.param_groups] == [True, False]
    moved = [not torch.equal(p, q) for p, q in zip(bits(model), before, strict=True)]
    assert moved == [param.ndim == 2 for param in model.parameters()]


class StopInTheMiddle(transformers.TrainerCallback):
    def on_substep_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        control.should_training_stop = state.global_step == 1


def test_probes_of_a_stopped_run_are_not_added_to_the_next(tmp_path: Path) -> None:
    def make(*callbacks: transformers.TrainerCallback) -> Any:
        return build(
            *(opt(), tmp_path, (zoopt.MeZO, {**MEZO, "seed": 1})),
            callbacks=list(callbacks),
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
        )

    stopped, stop = make(), StopInTheMiddle()
    stopped.add_callback(stop)
    stopped.train()
    after_one_step = copy.deepcopy(stopped.model)
    stopped.remove_callback(stop)
    recorder = Recorder()
    stopped.add_callback(recorder)
    stopped.train()
    assert [len(record.losses) for record in recorder.records] == [2] * 4

    twin = build(
        *(after_one_step, tmp_path, (zoopt.MeZO, {**MEZO, "seed": 1})),
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    twin.create_optimizer()
    for group in twin.optimizer.param_groups:
        group.update(step=1, draw=1)
    twin.train()
    assert equal(twin.model.state_dict(), stopped.model.state_dict())


def test_a_failing_loss_leaves_trainer_and_weights_as_they_were(tmp_path: Path) -> None:
    model = opt().to(torch.bfloat16)
    before = bits(model)
    trainer = build(model, tmp_path, data=[{"input_ids": d["input_ids"]} for d in sentences(4)])
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.train()
    assert all(map(torch.equal, bits(model), before))
    assert trainer.accelerator.backward.__func__ is accelerate.Accelerator.backward


class Narrow(Means):
    """Its loss is around 3, in bfloat16."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (3.0 + 0.01 * self.squares(input_ids, labels).mean()).bfloat16()}


def test_a_loss_of_16_bits_is_warned_of_once(tmp_path: Path) -> None:
    trainer = build(Narrow(), tmp_path, (zoopt.MeZO, {**MEZO, "zo_eps": 1e-5}))
    with pytest.warns(UserWarning, match="compute the loss in float32") as caught:
        trainer.train()
    assert len([each for each in caught if "16 bits" in str(each.message)]) == 1


def test_refuses_to_let_the_loss_rise(tmp_path: Path) -> None:
    model = opt()
    before = bits(model)
    trainer = build(model, tmp_path, (zoopt.MeZO, {**MEZO, "maximize": True}))
    with pytest.raises(ValueError, match=r"maximize must be False, got True: .* arguments of MeZO"):
        trainer.train()
    assert equal(bits(model), before)


@pytest.mark.parametrize(
    ("place", "name", "found", "message"),
    [
        ("accelerator", "scaler", object(), "fp16 must be False, got True: its gradient scaler"),
        ("", "is_deepspeed_enabled", True, "whole parameters, but DeepSpeed is enabled"),
        ("accelerator.state", "fsdp_plugin", SimpleNamespace(fsdp_version=1), "must be 2, got 1"),
        ("args", "_n_gpu", 2, "without DataParallel, got 2 GPUs in one process"),
    ],
)
def test_refuses_set_ups_that_it_cannot_serve(
    place: str,
    name: str,
    found: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they would be found on other machines."""
    model = opt()
    trainer = build(model, tmp_path)
    trainer.create_optimizer()
    before = bits(model), copy.deepcopy(trainer.optimizer.state_dict())
    holder = operator.attrgetter(place)(trainer) if place else trainer
    monkeypatch.setattr(holder, name, found, raising=False)
    with pytest.raises(ValueError, match=message):
        trainer.training_step(model, transformers.default_data_collator(sentences(2)))
    assert equal([*before], [bits(model), trainer.optimizer.state_dict()])


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(None, "AdamW"), ((torch.optim.SGD, {"lr": 1.0}), "SGD")],
    ids=["default", "SGD"],
)
def test_refuses_optimizers_of_another_kind(
    optimizer: Built | None, name: str, tmp_path: Path
) -> None:
    model = opt()
    before = bits(model)
    with pytest.raises(TypeError, match=f"a zeroth-order optimizer, got {name}; pass optimizer_cl"):
        build(model, tmp_path, optimizer).train()
    assert equal(bits(model), before)


@pytest.mark.parametrize("kind", ["MeZO", "Hybrid"])
def test_the_ordinary_trainer_is_told_of(kind: str, tmp_path: Path) -> None:
    """It calls backward and then a step that has nothing to do: weights would stay, in silence."""
    model = opt()
    before = bits(model)
    named = list(model.named_parameters())
    optimizer: Any = zoopt.MeZO(named[:-2], **MEZO)
    if kind == "Hybrid":
        late = torch.optim.SGD([param for _, param in named[-2:]], lr=1.0)
        optimizer = zoopt.Hybrid(optimizer, late)
    own = build(model, tmp_path, optimizers=(optimizer, None))
    trainer = transformers.Trainer(
        model=model, args=own.args, train_dataset=sentences(4), optimizers=(optimizer, None)
    )
    with pytest.raises(RuntimeError, match=r"MeZO.step\(\) needs a closure.* has a gradient.*ZOTr"):
        trainer.train()
    assert equal(bits(model), before)


def test_importing_zoopt_imports_no_framework_and_no_compiler() -> None:
    source = (
        "import sys, zoopt, zoopt.integrations\n"
        "heavy = {'transformers', 'accelerate', 'peft', 'numba', 'triton', 'torch._dynamo'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
