"""transformers, peft and accelerate."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import zoopt
from zoopt.noise import stream

SEED, ZO_EPS = 7, 1e-3
#: Unit roundoff of float32.
U = 2.0**-24
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def mezo(model: nn.Module, perturbation: str = "auto", **options: Any) -> zoopt.MeZO:
    options = {"lr": 1e-2, "zo_eps": ZO_EPS, "seed": SEED, **options}
    return zoopt.MeZO(model.named_parameters(), perturbation=perturbation, **options)  # type: ignore[arg-type]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, n_positions=16))


def llama(**options: Any) -> nn.Module:
    options = {"intermediate_size": 64, "num_key_value_heads": 2, "use_cache": False, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **options))


def opt_model() -> nn.Module:
    config = transformers.OPTConfig(
        **TINY, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=32
    )
    return transformers.OPTForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**TINY, intermediate_size=64, max_position_embeddings=16)
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize("build", [gpt2, llama, opt_model, bert], ids=lambda build: build.__name__)
def test_transformers_have_the_same_losses_in_place_and_virtually(
    build: Callable[[], nn.Module],
) -> None:
    model = build().eval()
    ids = torch.randint(64, (2, 12))

    def loss(model: nn.Module) -> Tensor:
        result: Tensor = model(input_ids=ids, labels=ids).loss
        return result

    records = []
    for perturbation in ("inplace", "virtual"):
        twin = copy.deepcopy(model)
        opt = mezo(twin, perturbation, lr=0.0)
        opt.step(lambda twin=twin: loss(twin))
        records.append(opt.last_step)
    (in_place,), (virtual,) = (record.losses for record in records)
    # Both reach theta + zo_eps z by the same operation on theta, hence to the same bits.
    assert in_place[0] == virtual[0]
    # Below, in place adds -2 zo_eps z to the rounded theta + zo_eps z: one more rounding of a
    # weight each way and of the products, 4 U (|theta| + 10 zo_eps) at most since |z| < 5, which
    # the gradient carries into the loss, to first order; the evaluation's own rounding, of the
    # order of the square root of the few thousand terms behind a logit, comes on top.
    loss(model).backward()
    moved = sum(
        float((p.grad.abs() * (p.detach().abs() + 10 * ZO_EPS)).sum())
        for p in model.parameters()
        if p.grad is not None
    )
    tolerance = 2 * 4 * U * moved + 64 * U * virtual[1]
    assert abs(in_place[1] - virtual[1]) <= tolerance
    assert abs(virtual[0] - virtual[1]) > tolerance


@pytest.mark.parametrize("perturbation", ["inplace", "virtual"])
def test_tied_weights_stay_tied_and_move_once(perturbation: str) -> None:
    model = gpt2().eval()
    tied = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is tied
    ids, before = torch.randint(64, (2, 12)), tied.detach().clone()
    opt = mezo(model, perturbation, lr=1e-3)
    opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    assert opt.last_step is not None
    [g] = opt.last_step.projected_grads
    name = next(name for name, param in model.named_parameters() if param is tied)
    key = zoopt.kernels.NoiseKey(SEED, stream(name))
    expected = zoopt.kernels.perturb(before, -1e-3 * g, key=key, draw=0)
    # In place, the update starts from the perturbed weight: a few roundings more.
    tolerance = 0.0 if perturbation == "virtual" else 4 * U * (before.abs().max().item() + 1e-2)
    torch.testing.assert_close(tied.detach(), expected, rtol=0.0, atol=tolerance)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(tied, before)


def adapted(dtype: torch.dtype) -> peft.PeftModel:
    """A tiny LLaMA with LoRA adapters, the same every time."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(initializer_range=0.2).to(dtype), lora).to(dtype)


def train(model: nn.Module, opt: Any, ids: Tensor, steps: int) -> list[float]:
    def closure() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return [opt.step(closure) for _ in range(steps)]


LORA = {"lr": 2e-3, "zo_eps": 1e-2}
# peft asks transformers for the old name of gradient checkpointing's flag.
peft_warns = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


@peft_warns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 5e-4, "momentum": 0.7}, {"lr": 1e-3, "momentum": 0.7, "momentum_window": 3}],
    ids=["plain", "momentum", "window"],
)
def test_lora_learns_and_resumes_to_the_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = adapted(dtype)
    ids = torch.randint(64, (1, 16))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    opt = mezo(model, **{**LORA, **options})
    losses = train(model, opt, ids, 30)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    losses += train(model, opt, ids, 30)
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.3
    for name, param in model.named_parameters():
        assert param.dtype == dtype
        assert name not in frozen or torch.equal(bits(param), bits(frozen[name]))
    assert frozen

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    again = adapted(dtype)
    again.load_state_dict(checkpoint["model"])
    # Hyperparameters come from the checkpoint, whatever the optimizer was built with.
    resumed = mezo(again, lr=0.5, zo_eps=0.5, seed=99)
    resumed.load_state_dict(checkpoint["optimizer"])
    assert train(again, resumed, ids, 30) == losses[30:]
    weights = dict(model.named_parameters())
    assert all(torch.equal(bits(p), bits(weights[name])) for name, p in again.named_parameters())
    assert resumed.last_step == opt.last_step


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 1e-3, "momentum": 0.9},
        {"lr": 1e-3, "momentum": 0.9, "num_probes": 3, "perturbation": "inplace"},
        {"lr": 1e-3, "momentum": 0.9, "momentum_window": 2, "num_probes": 2},
    ],
    ids=["plain", "momentum", "probes", "window"],
)
def test_accelerate_changes_no_bit(
    accelerator: accelerate.Accelerator, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    ids = torch.randint(64, (2, 12))
    opt = mezo(model, **options)
    train(model, opt, ids, 3)
    twin = copy.deepcopy(model)
    plain = mezo(twin, **{**options, "seed": 99})
    plain.load_state_dict(opt.state_dict())

    before = copy.deepcopy(opt.state_dict())
    loader = torch.utils.data.DataLoader(ids, batch_size=2)  # type: ignore[arg-type]
    prepared, wrapped, loader = accelerator.prepare(model, opt, loader)
    assert wrapped.optimizer is opt
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    assert bool(after["state"]) == bool(opt.declared_state_bytes())
    for index, entries in before["state"].items():
        for name, value in entries.items():
            assert after["state"][index][name].dtype == torch.float32
            assert torch.equal(bits(after["state"][index][name]), bits(value))

    for _ in range(3):
        for batch in loader:
            train(prepared, wrapped, batch, 1)
    train(twin, plain, ids, 3)
    assert opt.last_step == plain.last_step
    assert opt.last_step is not None
    assert opt.last_step.step == 6
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(bits(p), bits(q))


def test_accelerate_accumulates_micro_batches(accelerator: accelerate.Accelerator) -> None:
    accelerator.gradient_accumulation_steps = 2
    model = nn.Linear(4, 1)
    twin, x = copy.deepcopy(model), torch.randn(2, 8, 4)
    opt, plain = mezo(model), mezo(twin)
    prepared, wrapped = accelerator.prepare(model, opt)
    for _ in range(3):
        for part in x:
            with accelerator.accumulate(prepared):
                opt.probe(lambda part=part: prepared(part).square().mean() / 2)
                wrapped.step()
            plain.probe(lambda part=part: twin(part).square().mean() / 2)
        plain.step()
    assert opt.last_step == plain.last_step
    assert opt.last_step is not None
    assert opt.last_step.step == 3
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
