"""Public training loops, with the optimizer swapped: as with torch's AdamW, to rounding.

trl and Lightning take seconds to import: they are imported where they are used.
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import zoopt
from zoopt.integrations.transformers import ZOTrainer

WORDS = [f"w{i}" for i in range(24)]
ADAMW = {"lr": 5e-3, "weight_decay": 0.1}
#: Two float32 runs of Adam, whose quotients carry a relative rounding over: 1e-7 of steps of 5e-3,
#: ten of them, on losses around 3.
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    gc.freeze()
    with warnings.catch_warnings():
        # What these packages say of each other, and of how small everything is here.
        warnings.simplefilter("ignore")
        yield
    gc.unfreeze()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(WORDS) + 2,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.1,
            use_cache=False,
        )
    )


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * 5 + i * (1 + number % 3)) % len(WORDS)] for i in range(8))


def arguments(output: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "warmup_steps": 2,
        **options,
    }


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def pair(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The model with zoopt's AdamW, and one like it with torch's."""
    for cls in (zoopt.AdamW, torch.optim.AdamW):
        twin = copy.deepcopy(model)
        yield twin, cls(twin.parameters(), **ADAMW)


def test_the_trainer(tmp_path: Path) -> None:
    """Clipping, a warm-up and accumulation are the Trainer's own."""
    encoded = tokenizer()([sentence(i) for i in range(12)])["input_ids"]
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded]
    runs = []
    for model, optimizer in pair(llama()):
        args = transformers.TrainingArguments(**arguments(tmp_path, gradient_accumulation_steps=2))
        trainer = transformers.Trainer(
            model, args, train_dataset=rows, optimizers=(optimizer, None)
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=CLOSE)
    assert runs[0][-1] < runs[0][0]


def test_the_trainers_clipping_is_missed_where_the_backward_is_fused(tmp_path: Path) -> None:
    """It clips by default, and would find nothing."""
    encoded = tokenizer()([sentence(i) for i in range(4)])["input_ids"]
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded]
    for limit, clipped in ((1.0, None), (0.0, None), (1.0, 1.0)):
        model = llama()
        optimizer = zoopt.AdamW(model.parameters(), **ADAMW)
        zoopt.fuse_backward(model, optimizer, max_grad_norm=clipped)
        args = transformers.TrainingArguments(
            **arguments(tmp_path, max_grad_norm=limit, max_steps=2)
        )
        trainer = transformers.Trainer(
            model, args, train_dataset=rows, optimizers=(optimizer, None)
        )
        if limit and clipped is None:
            message = "max_grad_norm of TrainingArguments must be 0 or None .* got 1.0"
            with pytest.raises(RuntimeError, match=message):
                trainer.train()
        else:
            trainer.train()


def sft(model: nn.Module, output: Path, cls: Any = None, **options: Any) -> Any:
    import datasets
    import trl

    args = trl.SFTConfig(**arguments(output, max_length=16, bf16=False))
    rows = datasets.Dataset.from_list([{"text": sentence(i)} for i in range(12)])
    return (cls or trl.SFTTrainer)(
        model, args, train_dataset=rows, processing_class=tokenizer(), **options
    )


def test_trls_sft_trainer(tmp_path: Path) -> None:
    runs = []
    for model, optimizer in pair(llama()):
        trainer = sft(model, tmp_path, optimizers=(optimizer, None))
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=CLOSE)
    assert runs[0][-1] < runs[0][0]


def test_zo_trainer_in_front_of_trls_sft_trainer(tmp_path: Path) -> None:
    import trl

    class ZOSFTTrainer(ZOTrainer, trl.SFTTrainer):
        pass

    model = llama()
    start = copy.deepcopy(model.state_dict())
    optimizer = zoopt.MeZO(model.named_parameters(), lr=1e-3, zo_eps=1e-2, seed=0)
    trainer = sft(model, tmp_path, ZOSFTTrainer, optimizers=(optimizer, None))
    trainer.train()
    assert len(losses(trainer)) == 6
    assert optimizer.param_groups[0]["step"] == 6
    assert all(param.grad is None for param in model.parameters())
    assert any(not torch.equal(value, start[key]) for key, value in model.state_dict().items())
    assert all(norm > 0 for norm in map(float, grad_norms(trainer)))


def grad_norms(trainer: Any) -> list[float]:
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def test_trls_dpo_trainer(tmp_path: Path) -> None:
    import datasets
    import trl

    rows = datasets.Dataset.from_list(
        [
            {
                "prompt": sentence(i),
                "chosen": f" {sentence(i + 1)}",
                "rejected": f" {sentence(i + 2)}",
            }
            for i in range(8)
        ]
    )
    runs = []
    for model, optimizer in pair(llama()):
        trainer = trl.DPOTrainer(
            model,
            ref_model=llama(),
            args=trl.DPOConfig(**arguments(tmp_path, max_length=32, bf16=False, max_steps=3)),
            train_dataset=rows,
            processing_class=tokenizer(),
            optimizers=(optimizer, None),
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=CLOSE)
    # A model like its reference has log 2; the first step of the warm-up is at a rate of 0.
    assert all(abs(loss - math.log(2.0)) > 1e-3 for loss in runs[0][2:])


def regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator)
    return x, x.sin().sum(1, keepdim=True)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def lightning_fit(module: Any, output: Path, **options: Any) -> None:
    import lightning

    data = torch.utils.data.TensorDataset(*regression())
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(output),
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))


def automatic(model: nn.Module, optimizer: Any) -> Any:
    import lightning

    class Automatic(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seen = model, []

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
            self.seen.append(float(loss))
            return loss

        def configure_optimizers(self) -> Any:
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    return Automatic()


def test_lightning_by_itself(tmp_path: Path) -> None:
    """Its closure, clipping, accumulation and schedule."""
    runs = []
    for model, optimizer in pair(mlp()):
        module = automatic(model, optimizer)
        lightning_fit(module, tmp_path, gradient_clip_val=0.5, accumulate_grad_batches=2)
        runs.append(module.seen)
    assert runs[0] == pytest.approx(runs[1], abs=CLOSE)
    assert sum(runs[0][-6:]) < sum(runs[0][:6])


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_lightning_with_a_fused_backward(accumulation_steps: int, tmp_path: Path) -> None:
    """The same bits: it hands its closure to `step`."""
    runs = []
    for fused in (False, True):
        model = mlp()
        optimizer = zoopt.AdamW(model.parameters(), **ADAMW)
        if fused:
            zoopt.fuse_backward(model, optimizer, accumulation_steps=accumulation_steps)
        module = automatic(model, optimizer)
        lightning_fit(module, tmp_path, accumulate_grad_batches=accumulation_steps)
        runs.append(module.seen)
    assert runs[0] == runs[1]
    assert sum(runs[0][-6:]) < sum(runs[0][:6])


def test_lightnings_clipping_is_missed_where_the_backward_is_fused(tmp_path: Path) -> None:
    model = mlp()
    optimizer = zoopt.AdamW(model.parameters(), **ADAMW)
    zoopt.fuse_backward(model, optimizer)
    message = "gradient_clip_val of the Trainer must be 0 or None .* got 0.5"
    with pytest.raises(RuntimeError, match=message):
        lightning_fit(automatic(model, optimizer), tmp_path, gradient_clip_val=0.5)


def test_lightning_by_hand_probes(tmp_path: Path) -> None:
    """MeZO, over two micro-batches a step: as a plain loop that probes, to the bit."""
    import lightning

    def evaluate(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1]) / 2

    class Manual(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = model

        def training_step(self, batch: Any, index: int) -> None:
            optimizer: Any = self.optimizers()
            if index % 2:
                optimizer.step(closure=lambda: evaluate(self.model, batch))
            else:
                optimizer.optimizer.probe(lambda: evaluate(self.model, batch))

        def configure_optimizers(self) -> Any:
            return mezo(self.model)

    def mezo(model: nn.Module) -> zoopt.MeZO:
        return zoopt.MeZO(model.named_parameters(), lr=1e-2, zo_eps=1e-2, seed=0)

    module = Manual(mlp())
    lightning_fit(module, tmp_path)
    assert module.trainer.global_step == 9

    plain = mlp()
    optimizer = mezo(plain)
    batches = list(zip(*(part.split(4) for part in regression()), strict=True))
    for _ in range(3):
        for index, rows in enumerate(batches):
            closure = lambda rows=rows: evaluate(plain, rows)  # noqa: E731
            optimizer.step(closure) if index % 2 else optimizer.probe(closure)
    for p, q in zip(module.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(plain[0].weight, mlp()[0].weight)  # type: ignore[index]


@pytest.mark.parametrize("fused", [False, True])
def test_a_moving_average_of_weights(fused: bool) -> None:
    averages = []
    x, y = regression()
    for model, optimizer in pair(mlp()):
        if fused and isinstance(optimizer, zoopt.AdamW):
            zoopt.fuse_backward(model, optimizer)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        for _ in range(10):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        averages.append(average.module)
    for p, q in zip(*(average.parameters() for average in averages), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=CLOSE)
    assert not torch.equal(next(averages[0].parameters()), next(mlp().parameters()))
