"""Modules under perturbation: recurrent, attention, convolution, dropout, compiled, transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import zoopt
from zoopt.noise import stream

SEED, ZO_EPS = 7, 1e-3
#: Unit roundoff of float32.
U = 2.0**-24
Loss = Callable[[nn.Module], Tensor]


def mezo(model: nn.Module, perturbation: str = "virtual", **options: Any) -> zoopt.MeZO:
    options = {"lr": 1e-2, "zo_eps": ZO_EPS, "seed": SEED, **options}
    return zoopt.MeZO(model.named_parameters(), perturbation=perturbation, **options)  # type: ignore[arg-type]


def perturbed(model: nn.Module, scale: float, draw: int = 0) -> nn.Module:
    """A copy of the model with its weights at theta + scale zo_eps z, written out."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            alpha = scale * ZO_EPS
            zoopt.kernels.perturb(
                param, alpha, seed=SEED, stream=stream(name), draw=draw, out=param.detach()
            )
    return model


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T


class CustomFunction(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight) + self.bias.to(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.lstm(x)[0]
        out: Tensor = self.gru(hidden)[0]
        return out


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = super().forward(x, x, x)[0]
        return out


class Images(nn.Module):
    """Convolutions and normalisations over (4, 2, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.PReLU(),
            nn.ConvTranspose2d(4, 4, 3),
            nn.GroupNorm(2, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x.reshape(4, 2, 8, 8))
        return out


class Lookups(nn.Module):
    """An embedding, a bag, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8, padding_idx=0)
        self.bag = nn.EmbeddingBag(16, 8, mode="sum")
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(32).reshape(4, 8) % 16
        out: Tensor = self.head(self.embedding(ids).sum(dim=1) + self.bag(ids)) * x.mean()
        return out


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 4),
    "custom-function": lambda: CustomFunction(8, 4),
    "recurrent": Recurrent,
    "attention": lambda: SelfAttention(8, 2, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    "encoder-eval": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
    "images": Images,
    "lookups": Lookups,
    "weight-norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)),
    "bilinear": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_virtual_losses_are_those_of_perturbed_weights(name: str, dtype: torch.dtype) -> None:
    model = MODULES[name]().to(dtype)
    x = torch.randn(4, 16, 8, dtype=dtype)

    def loss(model: nn.Module) -> Tensor:
        return model(x).float().square().mean()

    with torch.no_grad():
        expected = tuple(loss(perturbed(model, scale)).item() for scale in (1.0, -1.0))
    assert expected[0] != expected[1]
    before = [p.clone() for p in model.parameters()]
    opt = mezo(model)
    opt.probe(lambda: loss(model))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    opt.step()
    assert opt.last_step is not None
    assert opt.last_step.losses == (expected,)


@pytest.mark.parametrize("perturbation", ["inplace", "virtual"])
def test_buffers_see_both_evaluations(perturbation: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    twin, x = copy.deepcopy(model), torch.randn(16, 4)
    mezo(model, perturbation, lr=0.0).step(lambda: model(x).square().mean())
    buffers: dict[str, Tensor] = dict(twin.named_buffers())
    for scale in (1.0, -1.0):
        walked = perturbed(twin, scale)
        for name, buffer in walked.named_buffers():
            buffer.copy_(buffers[name])
        with torch.no_grad():
            walked(x)
        buffers = dict(walked.named_buffers())
    assert buffers["1.num_batches_tracked"] == 2
    for name, buffer in model.named_buffers():
        # In place, theta - zo_eps z is reached by way of theta + zo_eps z: other last bits.
        tolerance = 0.0 if perturbation == "virtual" else 1e-5
        torch.testing.assert_close(buffer, buffers[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("perturbation", ["inplace", "virtual"])
def test_both_evaluations_see_one_dropout_mask(perturbation: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x, masks = torch.randn(8, 64), []
    model[1].register_forward_hook(lambda _module, _args, out: masks.append(out != 0))
    start = torch.get_rng_state()
    with torch.no_grad():
        model(x)
    after_one = torch.get_rng_state()
    torch.set_rng_state(start)

    opt = mezo(model, perturbation)
    opt.step(lambda: model(x).square().mean())
    assert torch.equal(torch.get_rng_state(), after_one)
    opt.step(lambda: model(x).square().mean())
    assert not torch.equal(torch.get_rng_state(), after_one)
    reference, *of_steps = masks
    assert all(torch.equal(mask, reference) for mask in of_steps[:2])
    assert torch.equal(of_steps[2], of_steps[3])
    assert not torch.equal(of_steps[2], reference)


@pytest.mark.parametrize("perturbation", ["inplace", "virtual"])
@pytest.mark.parametrize("first_call", ["outside", "in the step"])
def test_compiled_models_have_the_losses_of_plain_ones(perturbation: str, first_call: str) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    twin, x = copy.deepcopy(model), torch.randn(16, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    if first_call == "outside":
        with torch.no_grad():
            compiled(x)
    opt, plain = mezo(model, perturbation), mezo(twin, perturbation)
    for _ in range(3):
        opt.step(lambda: compiled(x).square().mean())
        plain.step(lambda: twin(x).square().mean())
        assert opt.last_step == plain.last_step


def test_virtual_perturbation_refuses_an_embedding_bag_that_writes() -> None:
    bag = nn.EmbeddingBag(4, 2, max_norm=0.5)
    with pytest.raises(ValueError, match=r"max_norm=0\.5.*perturbation='inplace'"):
        mezo(bag).step(lambda: bag(torch.tensor([[0, 1]])).sum())


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def opt_model() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        word_embed_proj_dim=32,
    )
    return transformers.OPTForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
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
    expected = zoopt.kernels.perturb(before, -1e-3 * g, seed=SEED, stream=stream(name), draw=0)
    # In place, the update starts from the perturbed weight: a few roundings more.
    tolerance = 0.0 if perturbation == "virtual" else 4 * U * (before.abs().max().item() + 1e-2)
    torch.testing.assert_close(tied.detach(), expected, rtol=0.0, atol=tolerance)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(tied, before)
