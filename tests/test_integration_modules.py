"""torch's own modules under perturbation, with buffers, dropout and tied weights, and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoopt
from zoopt.noise import stream

SEED, ZO_EPS = 7, 1e-3


def mezo(model: nn.Module, perturbation: str = "virtual", **options: Any) -> zoopt.MeZO:
    options = {"lr": 1e-2, "zo_eps": ZO_EPS, "seed": SEED, **options}
    return zoopt.MeZO(model.named_parameters(), perturbation=perturbation, **options)  # type: ignore[arg-type]


def perturbed(model: nn.Module, scale: float, draw: int = 0) -> nn.Module:
    """A copy of the model with its weights at theta + scale zo_eps z, written out."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            alpha = scale * ZO_EPS
            key = zoopt.kernels.NoiseKey(SEED, stream(name))
            zoopt.kernels.perturb(param, alpha, key=key, draw=draw, out=param.detach())
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
    "norms": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)),
}


@pytest.fixture
def _no_fast_path() -> Iterator[None]:
    """Attention leaves its fused path, which rounds otherwise, when functions are overridden."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("_no_fast_path")
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


def test_both_losses_of_a_one_sided_estimate_take_the_same_path() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().to(torch.bfloat16)
    x = torch.randn(4, 16, 8, dtype=torch.bfloat16)
    paths = []

    def closure() -> Tensor:
        paths.append(torch.overrides.has_torch_function([x, *model.parameters()]))
        return model(x).float().square().mean()

    mezo(model, estimator="one-sided").step(closure)
    assert paths[0] == paths[1]


@pytest.mark.parametrize("perturbation", ["inplace", "virtual"])
def test_buffers_see_every_evaluation(perturbation: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    twin, x = copy.deepcopy(model), torch.randn(16, 4)
    mezo(model, perturbation, lr=0.0).step(lambda: model(x).square().mean())
    buffers: dict[str, Tensor] = dict(twin.named_buffers())
    for scale in (1.0, 1.0, -1.0):  # the run's first evaluation is repeated
        walked = perturbed(twin, scale)
        for name, buffer in walked.named_buffers():
            buffer.copy_(buffers[name])
        with torch.no_grad():
            walked(x)
        buffers = dict(walked.named_buffers())
    assert buffers["1.num_batches_tracked"] == 3
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
    assert all(torch.equal(mask, reference) for mask in of_steps[:3])
    assert torch.equal(of_steps[3], of_steps[4])
    assert not torch.equal(of_steps[3], reference)


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
