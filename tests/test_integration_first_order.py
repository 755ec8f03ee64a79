"""First-order optimizers in transformers, peft, accelerate and under torch.compile."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import zoopt
from tests.compare import equal
from zoopt.lowrank import param_groups

VOCABULARY, LENGTH = 32, 10


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


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> transformers.LlamaForCausalLM:
    """A tiny LLaMA, whose MLP's 32 x 160 weights are large enough for codes."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        use_cache=False,
        initializer_range=0.1,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def sentences(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


Built = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def adamw(model: nn.Module, **options: Any) -> Built:
    return zoopt.AdamW, {"lr": 1e-2, **options}


def galore(model: nn.Module, **options: Any) -> Built:
    options = {"lr": 1e-2, "scale": 1.0, "update_proj_gap": 3, **options}
    return zoopt.GaLoreAdamW, {"params": param_groups(model, rank=8), **options}


BUILDS: dict[str, Any] = {
    "adamw": adamw,
    "bfloat16": lambda model, **o: adamw(model, state_dtype="bfloat16", **o),
    "int8": lambda model, **o: adamw(model, state_dtype="int8", **o),
    "int4": lambda model, **o: adamw(model, state_dtype="int4", **o),
    "galore": galore,
    "galore int8": lambda model, **o: galore(model, state_dtype="int8", **o),
}
every_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def trainer_of(model: nn.Module, output: Path, **options: Any) -> Any:
    own = {
        key: options.pop(key)
        for key in ("optimizer_cls_and_kwargs", "optimizers")
        if key in options
    }
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
    return transformers.Trainer(model=model, args=args, train_dataset=sentences(), **own)


@every_build
def test_the_trainer_learns(build: Any, tmp_path: Path) -> None:
    model = llama()
    trainer = trainer_of(
        model,
        tmp_path,
        optimizer_cls_and_kwargs=build(model),
        max_steps=36,
        lr_scheduler_type="cosine",
        warmup_steps=3,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert min(logged(trainer, "grad_norm")) > 0
    assert len(set(logged(trainer, "learning_rate"))) > 30


RESUMED = {
    "max_steps": 6,  # of three an epoch
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "int8", "galore", "galore int8"])
def test_the_trainer_resumes_to_the_bit_in_the_middle_of_an_epoch(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    build, model = BUILDS[name], llama(dtype)
    whole = trainer_of(model, tmp_path, optimizer_cls_and_kwargs=build(model), **RESUMED)
    whole.train()
    again = llama(dtype, seed=1)
    # Hyperparameters come from the checkpoint.
    other = build(again, lr=0.5, seed=99)
    resumed = trainer_of(again, tmp_path / "again", optimizer_cls_and_kwargs=other, **RESUMED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert equal(model.state_dict(), again.state_dict())
    assert equal(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(whole, key) == logged(resumed, key)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_trainer_with_a_fused_backward(accumulation_steps: int, tmp_path: Path) -> None:
    """AdamW's R is the gradient, so that accumulation too is the same to the bit."""
    models = []
    for fused in (False, True):
        model = llama(torch.bfloat16)
        optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2, seed=3, state_dtype="int8")
        if fused:
            zoopt.fuse_backward(model, optimizer, accumulation_steps=accumulation_steps)
        trainer = trainer_of(
            model,
            tmp_path,
            optimizers=(optimizer, None),
            gradient_accumulation_steps=accumulation_steps,
            max_grad_norm=0.0,
            warmup_steps=2,
            max_steps=7,
        )
        trainer.train()
        models.append(model.state_dict())
    assert equal(*models)


def train(model: Any, optimizer: Any, steps: int, accelerator: Any = None) -> list[float]:
    rows = sentences(4)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_build
def test_accelerate_changes_no_bit(build: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, plain = llama(dtype).eval(), llama(dtype).eval()
    optimizers = []
    for m in (model, plain):
        cls, options = build(m, seed=7)
        params = options.pop("params", m.named_parameters())
        optimizers.append(cls(params, **options))
        train(m, optimizers[-1], 2)
    optimizer, other = optimizers
    before = copy.deepcopy(optimizer.state_dict())
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    assert equal(optimizer.state_dict(), before)

    train(prepared, wrapped, 2, accelerator)
    train(plain, other, 2)
    assert equal(model.state_dict(), plain.state_dict())
    accelerator.save_state(str(tmp_path), safe_serialization=False)
    train(prepared, wrapped, 2, accelerator)
    accelerator.load_state(str(tmp_path))
    assert equal(optimizer.state_dict(), other.state_dict())
    train(prepared, wrapped, 2, accelerator)
    train(plain, other, 2)
    assert equal(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_model_trains_like_itself(fused: bool) -> None:
    """The optimizer is outside of the graph, and its in-place updates recompile nothing."""
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2, seed=1)
        if fused:
            zoopt.fuse_backward(model, optimizer)
        torch._dynamo.utils.counters.clear()
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        x, y, losses = torch.randn(32, 8), torch.randn(32, 1), []
        for _ in range(5):
            loss = (forward(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_lora_with_coded_moments_learns_and_resumes_to_the_bit(fused: bool) -> None:
    def adapted() -> Any:
        base = llama(torch.bfloat16)
        lora = peft.LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(base, lora).eval()

    def build(model: nn.Module, **options: Any) -> Any:
        options = {"lr": 5e-3, "state_dtype": "int8", "seed": 5, **options}
        optimizer = zoopt.AdamW(model.named_parameters(), **options)  # type: ignore[arg-type]
        if fused:
            zoopt.fuse_backward(model, optimizer)
        return optimizer

    model = adapted()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = build(model)
    losses = train(model, optimizer, 10)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    losses += train(model, optimizer, 10)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} >= {torch.int8}

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = adapted()
    again.load_state_dict(weights)
    resumed = build(again, lr=0.5, seed=99)
    resumed.load_state_dict(state)
    assert train(again, resumed, 10) == losses[10:]
    assert equal(again.state_dict(), model.state_dict())
