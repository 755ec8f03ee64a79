"""LoRA-GGPO, CoFiTune and LoRA-SB: around optimizers, and in the place of layers."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.checkpoint import checkpoint

import zoopt
from tests.compare import same
from tests.reference import selection_float64 as paper
from zoopt.noise import normal, stream

#: peft asks transformers by a name that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh())
    model.append(nn.Linear(16, 4)).double()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator).double() / 4)
    return model.to(dtype)


def loss_of(model: nn.Module, seed: int = 1) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return (model(x) - torch.sin(3 * x[:, :4])).float().square().mean()


def loss64(model: nn.Module, seed: int = 1) -> torch.Tensor:
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(seed)).double()
    return (model(x) - torch.sin(3 * x[:, :4])).square().mean()


def step(model: nn.Module, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss.item()


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "zoopt": lambda model: zoopt.AdamW(model.named_parameters(), lr=1e-2),
    "galore": lambda model: zoopt.GaLoreAdamW(
        model.named_parameters(), lr=1e-2, rank=2, scale=1.0, seed=0
    ),
    "sm3": lambda model: zoopt.SM3(model.named_parameters(), lr=1e-1),
    "spiel": lambda model: zoopt.SparseDeltaAdamW(
        model.named_parameters(), lr=1e-2, density=0.5, seed=0
    ),
}


def test_ggpo_evaluates_where_the_paper_says() -> None:
    """In float64: first without a gradient, then with the last step's."""
    model = mlp(torch.float64)
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2)
    ggpo = zoopt.LoRAGGPO(model, optimizer, sigma=0.3, beta=0.2, seed=5)
    gradients: dict[str, Any] = {}
    for number in range(3):
        start = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        loss64(model).backward()
        for name, param in model.named_parameters():
            if param.dim() < 2:
                assert np.array_equal(param.detach().numpy(), start[name])
                continue
            z = normal(param.numel(), seed=5, stream=stream(f"ggpo {name}"), draw=number)
            expected = paper.ggpo(
                *(start[name], gradients.get(name)),
                z.double().view(param.shape).numpy(),
                *(0.3, 0.2),
            )
            np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
            gradients[name] = param.grad.numpy().copy()
        ggpo.restore()
        for name, param in model.named_parameters():
            assert np.array_equal(param.detach().numpy(), start[name])
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ggpo_around_any_optimizer(name: str, dtype: torch.dtype) -> None:
    """Resumes to the bit; evaluation sees the weights themselves; micro-batches the same noise."""
    model = mlp(dtype)
    optimizer = OPTIMIZERS[name](model)
    ggpo = zoopt.LoRAGGPO(model, optimizer, seed=1)
    losses = []
    for number in range(12):
        if number == 5:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), ggpo.state_dict()], file)
        losses.append(step(model, optimizer))
    assert losses[-1] < losses[0]
    file.seek(0)
    weights, state, own = torch.load(file, weights_only=True)
    resumed = mlp(dtype)
    resumed.load_state_dict(weights)
    optimizer = OPTIMIZERS[name](resumed)
    other = zoopt.LoRAGGPO(resumed, optimizer, seed=9)
    optimizer.load_state_dict(state)
    other.load_state_dict(own)
    for _ in range(7):
        step(resumed, optimizer)
    assert same(model, resumed)
    before = copy.deepcopy(resumed.state_dict())
    loss_of(resumed)
    perturbed = copy.deepcopy(resumed.state_dict())
    assert not torch.equal(perturbed["0.weight"], before["0.weight"])
    loss_of(resumed)
    assert torch.equal(resumed[0].weight, perturbed["0.weight"])
    resumed.eval()
    loss_of(resumed)
    assert all(torch.equal(value, before[key]) for key, value in resumed.state_dict().items())
    resumed.train()
    loss_of(resumed)
    other.remove()
    assert all(torch.equal(value, before[key]) for key, value in resumed.state_dict().items())
    loss_of(resumed)
    assert torch.equal(resumed[0].weight, before["0.weight"])


class InParts(nn.Module):
    """A model whose loss may call its layers without the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.extra = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out


def reentrant(model: InParts) -> torch.Tensor:
    x = torch.ones(3, 12, requires_grad=True)
    out: torch.Tensor = checkpoint(model.body, x, use_reentrant=True)
    return out.square().mean()


def compiled(model: InParts) -> torch.Tensor:
    out: torch.Tensor = torch.compile(model, backend="eager")(torch.ones(3, 12))
    return out.square().mean()


def alone(model: InParts) -> torch.Tensor:
    out: torch.Tensor = model.body(torch.ones(3, 12))
    return out.square().mean()


@pytest.mark.parametrize("loss_of_parts", [alone, reentrant, compiled])
def test_ggpo_perturbs_a_model_called_in_parts(
    loss_of_parts: Callable[[InParts], torch.Tensor],
) -> None:
    """As PEFT's base models and classifiers over a headless model are called."""
    model = InParts()
    optimizer = zoopt.AdamW(model.parameters(), lr=1e-2)
    ggpo = zoopt.LoRAGGPO(model, optimizer, sigma=0.3, seed=0)
    start = copy.deepcopy(model.state_dict())
    noisy = loss_of_parts(model)
    assert not torch.equal(model.body[0].weight, start["body.0.weight"])
    noisy.backward()
    expected = [p.grad.clone() for p in model.body.parameters()]
    ggpo.restore()
    optimizer.zero_grad()
    ggpo.perturb()
    alone(model).backward()
    for param, gradient in zip(model.body.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-5, atol=1e-7)
    optimizer.step()


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: torch.nn.functional.linear(x, model.body[0].weight),
        lambda model, x: torch.compile(model.body, backend="eager")(x),
    ],
    ids=["functional", "compiled in parts"],
)
def test_ggpo_says_that_it_added_no_noise(call: Callable[..., torch.Tensor]) -> None:
    model = InParts()
    optimizer = zoopt.AdamW(model.parameters(), lr=1e-2)
    zoopt.LoRAGGPO(model, optimizer)
    call(model, torch.ones(3, 12)).mean().backward()
    with pytest.warns(UserWarning, match="LoRAGGPO added no noise before this step") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    optimizer.step()


def test_ggpo_refuses() -> None:
    model = mlp()
    optimizer = zoopt.AdamW(model.named_parameters())
    for options, message in (
        ({"sigma": -1.0}, "sigma must be a finite number >= 0, got -1.0"),
        ({"beta": float("nan")}, "beta must be a finite number >= 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            zoopt.LoRAGGPO(model, optimizer, **options)
    with pytest.raises(ValueError, match="optimizer must hold a matrix of the model that trains"):
        zoopt.LoRAGGPO(model, torch.optim.SGD([model[0].bias], lr=0.1))
    ggpo = zoopt.LoRAGGPO(model, optimizer)
    with pytest.raises(ValueError, match="state must be of the same parameters, got 'x' of 2 rows"):
        ggpo.load_state_dict({"seed": 0, "step": 1, "squares": {"x": torch.ones(2)}})
    with pytest.raises(ValueError, match="state must be one of LoRAGGPO"):
        ggpo.load_state_dict({})
    ggpo.remove()
    with zoopt.fuse_backward(model, optimizer), pytest.raises(ValueError, match="not be fused"):
        zoopt.LoRAGGPO(model, optimizer)


def keep(model: nn.Module) -> list[Callable[[], torch.Tensor]]:
    return [lambda seed=seed: loss64(model, seed) for seed in (11, 12)]


def test_cofitune_holds_back_what_the_paper_says() -> None:
    """In float64, against the optimizer's own steps; all but the target rests."""
    model, free = mlp(torch.float64), mlp(torch.float64)
    rest = copy.deepcopy(model.state_dict())
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2)
    tuned = zoopt.CoFiTune(model, optimizer, keep(model), target=["2"], seed=0)
    gradients = [
        torch.autograd.grad(loss64(free, seed), free[2].weight)[0].numpy() for seed in (11, 12)
    ]
    share = paper.importance(free[2].weight.detach().numpy(), gradients)
    np.testing.assert_allclose(tuned.importance["2"].numpy(), share, rtol=1e-9, atol=1e-12)
    assert share.min() >= 0.0
    assert share.max() <= 1.0
    plain = zoopt.AdamW(free.named_parameters(), lr=1e-2)
    for _ in range(5):
        old = {name: p.detach().numpy().copy() for name, p in model[2].named_parameters()}
        optimizer.zero_grad()
        loss64(model).backward()
        for p, q in zip(free[2].parameters(), model[2].parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        plain.step()
        for name, own in model[2].named_parameters():
            new = getattr(free[2], name)
            expected = paper.held_back(
                old[name].reshape(16, -1), new.detach().numpy().reshape(16, -1), share
            )
            np.testing.assert_allclose(
                own.detach().numpy().reshape(16, -1), expected, rtol=1e-12, atol=1e-14
            )
            with torch.no_grad():
                new.copy_(own)
    for name, value in model.state_dict().items():
        assert torch.equal(value, rest[name]) is not name.startswith("2.")
    tuned.remove()
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cofitune_around_any_optimizer(name: str, dtype: torch.dtype) -> None:
    """The loss falls; neurons of importance 1 keep every bit; resumes to the bit."""

    def build(seed: int) -> tuple[nn.Module, Any, Any]:
        model = mlp(dtype)
        optimizer = OPTIMIZERS[name](model)
        losses = [lambda: loss_of(model, 11)]
        return (
            model,
            optimizer,
            zoopt.CoFiTune(model, optimizer, losses, target=["2", "4"], seed=seed),
        )

    model, optimizer, tuned = build(0)
    tuned.importance["2"][3] = 1.0
    start = mlp(dtype)
    losses = []
    for number in range(12):
        if number == 5:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), tuned.state_dict()], file)
        losses.append(step(model, optimizer))
    assert losses[-1] < losses[0]
    assert torch.equal(model[2].weight[3], start[2].weight[3])
    assert not torch.equal(model[2].weight[4], start[2].weight[4])
    file.seek(0)
    weights, state, own = torch.load(file, weights_only=True)
    resumed, optimizer, tuned = build(7)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    tuned.load_state_dict(own)
    for _ in range(7):
        step(resumed, optimizer)
    assert same(model, resumed)


def test_a_mask_on_the_gradient_is_cancelled_by_adam() -> None:
    """Why the mask is on the step: a constant factor of the gradient changes next to nothing."""
    plain, masked, held = mlp(), mlp(), mlp()
    optimizers = [zoopt.AdamW(m.named_parameters(), lr=1e-2) for m in (plain, masked, held)]
    tuned = zoopt.CoFiTune(held, optimizers[2], [lambda: loss_of(held, 11)], target=["2"])
    tuned.importance["2"].fill_(0.9)
    for model, optimizer in zip((plain, masked, held), optimizers, strict=True):
        optimizer.zero_grad()
        loss_of(model).backward()
        if model is masked:
            model[2].weight.grad.mul_(0.1)
        optimizer.step()
    start = mlp()[2].weight
    full = (plain[2].weight - start).norm()
    assert (masked[2].weight - plain[2].weight).norm() < 1e-3 * full
    assert (held[2].weight - start).norm() < 0.11 * full


def test_a_distributed_checkpoint_counts_no_step() -> None:
    """It makes the optimizer's state by a step that is none of the run's."""
    model = mlp(torch.bfloat16)
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2)
    losses = [lambda: loss_of(model, 11)]
    tuned = zoopt.CoFiTune(model, optimizer, losses, target=["2"], seed=0)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert tuned.state_dict()["step"] == 0
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    step(model, optimizer)
    assert tuned.state_dict()["step"] == 1


def test_cofitune_refuses() -> None:
    model = mlp()
    optimizer = zoopt.AdamW(model.named_parameters())
    losses = [lambda: loss_of(model)]
    with pytest.raises(ValueError, match="losses must hold a function at least, got none"):
        zoopt.CoFiTune(model, optimizer, [], target=["2"])
    assert all(param.requires_grad for param in model.parameters())
    with pytest.raises(ValueError, match=r"optimizer must hold the weights .* that of '2'"):
        zoopt.CoFiTune(model, torch.optim.SGD([model[0].weight], lr=0.1), losses, target=["2"])
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got int"):
        zoopt.CoFiTune(model, 3, losses, target=["2"])  # type: ignore[arg-type]
    wrong: Any
    for wrong, got in (([3], r"\[int\]"), (losses[0], "function"), (None, "NoneType")):
        for make in (
            lambda wrong: zoopt.CoFiTune(model, optimizer, wrong, target=["2"]),
            lambda wrong: zoopt.nn.convert_to_lora_sb(model, wrong, ["2"], rank=1, lr=1.0),
        ):
            with pytest.raises(TypeError, match=f"losses must be functions .*, got {got}; pass"):
                make(wrong)
    assert all(param.requires_grad for param in model.parameters())
    tuned = zoopt.CoFiTune(model, optimizer, losses, target=["2"])
    with pytest.raises(ValueError, match="state must be of the same layers"):
        tuned.load_state_dict({"seed": 0, "step": 0, "importance": {}})


def test_lora_sb_begins_with_the_first_step() -> None:
    """W - W0 is the best rank-2 approximation of -lr sign(sum G); the gradient of R is between the
    bases; a step of R changes W by the step of R there; merged, the same outputs."""
    model = mlp(torch.float64)
    start = copy.deepcopy(model)
    grads = {
        name: [
            torch.autograd.grad(loss64(start, seed), start.get_submodule(name).weight)[0].numpy()
            for seed in (11, 12)
        ]
        for name in ("0", "2")
    }
    zoopt.nn.convert_to_lora_sb(model, keep(model), ["0", "2"], rank=2, lr=1e-2)
    for name, own in grads.items():
        layer, base = model.get_submodule(name), start.get_submodule(name)
        change = (layer.materialise() - base.weight).detach().numpy()
        np.testing.assert_allclose(change, paper.lora_sb(own, 2, 1e-2), rtol=1e-9, atol=1e-12)
        assert torch.equal(layer.weight, base.weight)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained >= {"0.core", "2.core", "0.bias", "4.weight"}
    assert "0.weight" not in trained
    merged = zoopt.nn.merge(copy.deepcopy(model))
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(x), model(x), rtol=1e-12, atol=1e-12)
    loss64(model).backward()
    loss64(merged).backward()
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        whole = merged.get_submodule(name).weight.grad
        expected = layer.left.T @ whole @ layer.right.T
        torch.testing.assert_close(layer.core.grad, expected, rtol=1e-9, atol=1e-12)
    optimizer = zoopt.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss64(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=32,
            max_position_embeddings=16,
        )
    )


IDS = torch.arange(32).view(2, 16) * 5 % 32


def test_lora_sb_of_peft() -> None:
    """As a layer of ours of the same rank; only cores train; peft merges it."""
    own, model = llama(), llama()
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], lora_alpha=12)
    adapted = peft.get_peft_model(model, config)

    def first(of: nn.Module) -> list[Callable[[], torch.Tensor]]:
        return [lambda: of(input_ids=IDS, labels=IDS).loss]

    zoopt.nn.convert_to_lora_sb(own, first(own), ["*.q_proj", "*.v_proj"], rank=3, lr=1e-2)
    cores = zoopt.nn.adapt_lora_to_sb(adapted, first(adapted), lr=1e-2)
    assert len(cores) == 4
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == dict(cores).keys()
    assert all(core.shape == (3, 3) for _, core in cores)
    logits = adapted(input_ids=IDS).logits
    torch.testing.assert_close(logits, own(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    optimizer = zoopt.AdamW(cores, lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    logits = adapted(input_ids=IDS).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name or "core" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_sb_is_saved_by_peft_and_goes_on(dtype: torch.dtype, tmp_path: Path) -> None:
    """As a plain LoRA with the same outputs; and as cores with the same bits."""

    def adapted() -> tuple[Any, Any]:
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(llama().to(dtype), config).eval()
        return model, zoopt.nn.adapt_lora_to_sb(model, [lambda: loss_on(model)], lr=1e-2)

    def loss_on(model: Any) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
        return loss

    def train(model: Any, optimizer: Any) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            loss_on(model).backward()
            optimizer.step()

    model, cores = adapted()
    optimizer = zoopt.AdamW(cores, lr=1e-2)
    train(model, optimizer)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy([optimizer.state_dict(), model.state_dict()])
    plain = peft.PeftModel.from_pretrained(llama().to(dtype), tmp_path).eval()
    assert torch.equal(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)
    train(model, optimizer)
    for how in ("peft", "state dict"):
        again, others = adapted()
        with torch.no_grad():
            for _, core in others:
                core.zero_()
        if how == "peft":
            again.load_adapter(tmp_path, "default", is_trainable=True)
        else:
            again.load_state_dict(state[1])
        resumed = zoopt.AdamW(others, lr=1e-2)
        resumed.load_state_dict(state[0])
        train(again, resumed)
        for (name, core), (_, expected) in zip(others, cores, strict=True):
            assert torch.equal(core, expected), (how, name)


def test_a_plain_lora_is_loaded_into_lora_sb() -> None:
    """Its product becomes a core and orthonormal rows."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    plain = peft.get_peft_model(llama(), config).eval()
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"])).eval()
    zoopt.nn.adapt_lora_to_sb(model, [lambda: model(input_ids=IDS, labels=IDS).loss], lr=1e-2)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    for name, right in model.named_buffers():
        if name.endswith("right"):
            torch.testing.assert_close(right @ right.t(), torch.eye(3))


def test_a_lora_of_too_great_a_rank_is_not_adapted() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=64, target_modules=["q_proj"]))
    trained = [param.requires_grad for param in model.parameters()]
    with pytest.raises(ValueError, match=r"rank must be at most .*, the smaller side of"):
        zoopt.nn.adapt_lora_to_sb(model, [lambda: model(input_ids=IDS, labels=IDS).loss], lr=1.0)
    assert trained == [param.requires_grad for param in model.parameters()]


def test_lora_sb_refuses() -> None:
    model = mlp(torch.float64)
    before = copy.deepcopy(model)
    for losses, options, message in (
        (keep(model), {"rank": 0}, "rank must be a positive int, got 0"),
        (keep(model), {"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ([], {}, "losses must hold a function at least, got none"),
        (
            [lambda: model[0](torch.ones(2, 12, dtype=torch.float64)).sum()],
            {},
            "losses must depend on all layers of target, got one that does not on '2'",
        ),
        ([lambda: loss64(model) * math.nan], {}, "losses must have finite gradients, got .* '2'"),
        ([lambda: loss64(model).item()], {}, "return a loss with a graph .*, got float; return"),
        ([lambda: loss64(model).detach()], {}, "return a loss with a graph .*, got one without"),
        ([lambda: model[0].weight], {}, r"return a loss with a graph .*, got a tensor of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            zoopt.nn.convert_to_lora_sb(model, losses, ["2"], **{"rank": 1, "lr": 1.0, **options})
        assert same(model, before)
        assert type(model[2]) is nn.Linear
    with pytest.raises(ValueError, match="model must have LoRA layers of peft, got none"):
        zoopt.nn.adapt_lora_to_sb(model, keep(model), lr=1.0)


def adapted(**options: Any) -> Any:
    target = options.pop("target", ["0", "2"])
    return peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=target, **options))


def with_a_second_adapter() -> Any:
    model = adapted()
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["0"]))
    return model


def twice() -> Any:
    model = adapted()
    zoopt.nn.adapt_lora_to_sb(model, [lambda: loss_of(model)], lr=1e-2)
    return model


def merged() -> Any:
    model = adapted()
    model.merge_adapter()
    return model


def quantised() -> Any:
    model = adapted()
    zoopt.nn.convert_to_quantised(model, ["*.base_layer"], group_size=4)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (with_a_second_adapter, "must have one adapter, got default, b for '.*0'"),
        (twice, "must have new adapters, got one for '.*0' that has changed the weight"),
        (lambda: adapted(init_lora_weights="pissa"), "must have new adapters, got one for '.*0'"),
        (merged, "must have adapters that are not merged, got one for '.*0'"),
        (lambda: adapted(use_dora=True), "must have plain LoRA adapters, got .*Dora.* for '.*0'"),
        (quantised, "must have an nn.Linear or Conv1D under each .*, got QuantisedLinear for"),
    ],
    ids=["second", "twice", "pissa", "merged", "dora", "quantised"],
)
def test_lora_sb_of_peft_refuses(build: Callable[[], Any], message: str) -> None:
    """What an adapter has learnt, or is beside its product, would be lost. Nothing changes."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    trains = [param.requires_grad for param in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        zoopt.nn.adapt_lora_to_sb(model, [lambda: loss_of(model)], lr=1e-2)
    assert [param.requires_grad for param in model.parameters()] == trains
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
