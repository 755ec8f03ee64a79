"""SLTrain: its layer, its support, conversion and merging."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zoopt
from zoopt.nn import SLTrainLinear
from zoopt.nn.support import support


def layer(dtype: torch.dtype = torch.float64, n: int = 7, m: int = 5, **options: Any) -> Any:
    """All of its parameters away from their start."""
    built = SLTrainLinear(n, m, **{"rank": 3, "density": 0.3, "seed": 1, "dtype": dtype, **options})
    with torch.no_grad():
        built.left.copy_(torch.randn(m, 3))
    return built


def dense(built: SLTrainLinear) -> torch.Tensor:
    """W by the paper's formula, with a dense S, differentiably."""
    s = torch.zeros(built.out_features, built.in_features, dtype=built.values.dtype)
    rows = torch.arange(built.out_features)[:, None]
    s = s.index_put((rows, built.columns()), built.values)
    return built.scale * built.left @ built.right + s


@pytest.mark.parametrize("mode", ["regenerated", "indices"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(mode: Any, bias: bool) -> None:
    """Against finite differences, and against autograd through a dense W, in double precision."""
    built = layer(support=mode, bias=bias)
    names, params = zip(*built.named_parameters(), strict=True)

    def function(x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(built, dict(zip(names, params, strict=True)), (x,))

    for shape in ((4, 7), (2, 3, 7)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, (x, *params))
    weight = torch.randn(4, 5, dtype=torch.float64)
    x = torch.randn(4, 7, dtype=torch.float64)
    actual = torch.autograd.grad((built(x) * weight).sum(), params)
    out = torch.nn.functional.linear(x, dense(built), built.bias)
    expected = torch.autograd.grad((out * weight).sum(), params)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_over_several_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense gradient exists two rows at a time, and the result is the same."""
    built, x = layer(), torch.randn(4, 7, dtype=torch.float64)
    built(x).square().sum().backward()
    whole = built.values.grad.clone()
    monkeypatch.setattr("zoopt.nn.linear.CHUNK", 15)
    built.zero_grad()
    built(x).square().sum().backward()
    assert torch.allclose(built.values.grad, whole, rtol=1e-13)


@settings(deadline=None, max_examples=30)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 70),
    density=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**64 - 1),
)
def test_support_has_its_count_of_distinct_columns(
    m: int, n: int, density: float, seed: int
) -> None:
    count = max(1, round(density * n))
    columns = support(m, n, count, seed=seed, stream=3)
    assert columns.shape == (m, count)
    assert columns.dtype == torch.int64
    assert int(columns.min()) >= 0
    assert int(columns.max()) < n
    assert bool((columns.diff(dim=1) > 0).all())
    assert torch.equal(columns, support(m, n, count, seed=seed, stream=3))


def test_support_is_random() -> None:
    """40,000 rows of 8 among 100: each column's count, and each pair's of neighbouring rows and of
    two runs of a row, within 5 sigma of its mean."""
    m, n, count = 40_000, 100, 8
    columns = support(m, n, count, seed=11, stream=5)
    number = torch.arange(count)
    start, width = number * n // count, (number + 1) * n // count - number * n // count
    chance = torch.repeat_interleave(1.0 / width.double(), width)  # of each column
    hits = torch.bincount(columns.flatten(), minlength=n).double()
    assert bool(((hits - m * chance).abs() < 5 * (m * chance * (1 - chance)).sqrt()).all())
    places = (columns - start).double() / (width - 1)
    for a, b in (
        (places[:-1, 0], places[1:, 0]),
        (places[:, 0], places[:, 1]),
        (places[:, 2], places[:, 7]),
        (places[:, 3], places[:, 5]),
    ):
        correlation = torch.corrcoef(torch.stack((a, b)))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(m)


def test_both_modes_are_one_layer() -> None:
    """The same support, values and outputs; int32 columns in one, nothing in the other."""
    regenerated, indices = layer(), layer(support="indices")
    indices.left = regenerated.left
    assert torch.equal(regenerated.columns(), indices.columns())
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(regenerated(x), indices(x))
    assert indices.support_columns.dtype == torch.int32
    small = {name: tuple(value.shape) for name, value in regenerated.state_dict().items()}
    assert small == {
        "left": (5, 3),
        "right": (3, 7),
        "values": (5, 2),
        "bias": (5,),
        "_extra_state": (3,),
    }


def test_initial_values() -> None:
    """B = 0; A, values and bias U(+-1 / sqrt(in)): their means and variances within 5 sigma.
    They follow from seed and name, and torch's generator is left alone."""
    before = torch.get_rng_state()
    built = SLTrainLinear(400, 300, rank=64, density=0.1, seed=9, name="a")
    assert torch.equal(before, torch.get_rng_state())
    assert not built.left.any()
    assert built.scale == 16.0 / 64
    for values in (built.right, built.values):
        scaled = values.detach().double() * math.sqrt(400)
        count = scaled.numel()
        assert scaled.abs().max() <= 1.0
        assert abs(float(scaled.mean())) < 5 / math.sqrt(3 * count)
        assert abs(float(scaled.var()) - 1 / 3) < 5 * math.sqrt(4 / 45 / count)
    again, other = (
        SLTrainLinear(400, 300, rank=64, density=0.1, seed=9, name=name) for name in "ab"
    )
    assert torch.equal(built.values, again.values)
    assert not torch.equal(built.values, other.values)
    assert not torch.equal(built.columns(), other.columns())


@pytest.mark.parametrize(("rank", "scale"), [(1, 0.25), (32, 0.25), (128, 0.25), (512, 1 / 16)])
def test_default_scale_is_a_quarter_of_small_ranks(rank: int, scale: float) -> None:
    assert SLTrainLinear(4, 4, rank=rank, device="meta").scale == scale


def test_merge_is_exact() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        built = layer(dtype)
        merged = built.merge()
        x = torch.randn(9, 7, dtype=dtype)
        assert type(merged) is nn.Linear
        assert torch.equal(merged(x), built(x))


def test_checkpoint_carries_the_support() -> None:
    """Loaded into a layer of another seed, it computes the same."""
    x = torch.randn(3, 7, dtype=torch.float64)
    for mode in ("regenerated", "indices"):
        built = layer(support=mode)
        file = io.BytesIO()
        torch.save(built.state_dict(), file)
        file.seek(0)
        other = layer(support=mode, seed=2**64 - 1)
        assert not torch.equal(other(x), built(x))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), built(x))
        assert other.seed == 1
        assert torch.equal(copy.deepcopy(built)(x), built(x))


def test_moves_and_autocast() -> None:
    built = layer(torch.float32, support="indices")
    expected = built(torch.ones(1, 7))
    built.to(torch.bfloat16)
    assert built.support_columns.dtype == torch.int32
    out = built(torch.ones(1, 7, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    # Sums of 7 products of weights rounded to 2^-9, rounded to 2^-9.
    assert (out - expected).abs().max() <= 2**-6 * (1 + expected.abs().max())
    built = layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = built(torch.ones(1, 7))
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.grad.dtype for p in built.parameters()} == {torch.float32}
    assert SLTrainLinear(4, 4, rank=1, support="indices", device="meta").values.is_meta


# torch's own, of every autograd function that it compiles.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mode", ["regenerated", "indices"])
def test_compiles(mode: Any) -> None:
    """A compiled model gives the same outputs and gradients; graph breaks are allowed."""
    model = nn.Sequential(layer(torch.float32, support=mode), nn.Tanh())
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    x = torch.randn(3, 7)
    for net in (model, compiled):
        net(x).square().sum().backward()
    assert torch.equal(compiled(x), model(x))
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad)


def test_no_graph_keeps_a_weight() -> None:
    """What a forward pass keeps for backward: x and the parameters."""
    built, x = layer(torch.float32), torch.randn(4, 7)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        built(x)
    own = {p.data_ptr() for p in [*built.parameters(), x]}
    assert {t.data_ptr() for t in kept} <= own


def test_converts_and_trains_a_llama() -> None:
    """From scratch: the loss falls, and merged it is a LLaMA again with the same outputs."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    zoopt.nn.convert(model, rank=8, density=0.1, alpha=16, seed=0)
    assert sum(isinstance(module, SLTrainLinear) for module in model.modules()) == 14
    assert type(model.lm_head) is nn.Linear
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2)
    ids = (torch.arange(16) * torch.arange(1, 5)[:, None]) % 32
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    before = model(ids).logits
    assert torch.equal(zoopt.nn.merge(model)(ids).logits, before)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_biases_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False))
    bias = model[0].bias
    zoopt.nn.convert(model, rank=2)
    assert model[0].bias is bias
    assert model[1].bias is None


@pytest.mark.parametrize("perturbation", ["inplace", "virtual"])
def test_zeroth_order_moves_it(perturbation: Any) -> None:
    """A perturbation reaches the parameters inside the layer's own autograd function."""
    torch.manual_seed(0)
    model, x = layer(torch.float32, alpha=3.0), torch.randn(16, 7)
    optimizer = zoopt.MeZO(model.named_parameters(), lr=1e-3, perturbation=perturbation, seed=0)
    losses = [optimizer.step(lambda: model(x).square().mean()) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_refuses() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0]
    for options, error, message in (
        ({"rank": 0}, ValueError, "rank must be a positive int, got 0"),
        ({"rank": 2, "density": 0.0}, ValueError, "density must be a finite number > 0 and <= 1"),
        ({"rank": 2, "alpha": -1.0}, ValueError, "alpha must be a finite number > 0, got -1.0"),
        ({"rank": 2, "support": "none"}, ValueError, "support must be one of 'regenerated'"),
        ({"rank": 2, "seed": -1}, ValueError, r"seed must be an int in \[0, 2\^64\), got -1"),
        ({"rank": 2, "target": "x"}, ValueError, "target must match a linear layer"),
    ):
        with pytest.raises(error, match=message):
            zoopt.nn.convert(model, **options)  # type: ignore[arg-type]
        assert model[0] is before
