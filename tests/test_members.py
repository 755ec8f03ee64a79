"""Members of a population in one forward pass, against a pass for each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import zoopt
from tests.compare import same
from tests.meter import peak_bytes
from zoopt.zeroth_order.engine import members

VOCABULARY, WIDTH, SIGMA = 97, 32, 0.02
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}


def gpt2() -> Any:
    return transformers.GPT2Config(
        n_layer=2, n_embd=WIDTH, n_head=4, vocab_size=VOCABULARY, n_positions=64
    )


def llama(**options: Any) -> Any:
    return transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_key_value_heads=2, **SIZES, **options
    )


def opt() -> Any:
    return transformers.OPTConfig(
        hidden_size=WIDTH, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64, **SIZES
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "opt": opt,
}


def language_model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """With random weights in every vector too."""
    transformers.logging.set_verbosity_error()
    config = CONFIGS[name]()
    config.use_cache = False
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    return model.to(dtype).eval()


def tokens(rows: int, padding: str | None = None, length: int = 12) -> tuple[Tensor, Tensor]:
    """Token numbers and their attention mask; of every four rows, three are padded."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(rows if padding else 0):
        missing = i % 4
        mask[i, slice(None, missing) if padding == "left" else slice(length - missing, None)] = 0
    return ids, mask


def fitness(model: nn.Module, ids: Tensor, mask: Tensor, examples: int) -> Tensor:
    """The negative mean loss of the tokens of each member's examples."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
    sums, counts = (t.reshape(-1, examples * t.shape[1]).sum(1) for t in (losses, mask[:, 1:]))
    return -sums / counts


def strategy(model: nn.Module, members: int = 6, **options: Any) -> zoopt.EvolutionStrategy:
    settings = {"sigma": SIGMA, "population_size": members, "rank": 1, "seed": 3, **options}
    return zoopt.EvolutionStrategy(model.named_parameters(), **settings)  # type: ignore[arg-type]


def both_ways(
    model: nn.Module, ids: Tensor, mask: Tensor, examples: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Every member's fitness from one pass for all, and from a pass for each: float64."""
    count = len(ids) // examples
    optimizer = strategy(model, count, **options)
    together = optimizer.evaluate_batched(
        lambda: fitness(model, ids, mask, examples), examples=examples
    )
    apart: dict[int, float] = {}
    for i in range(count):
        rows = slice(i * examples, (i + 1) * examples)
        apart |= optimizer.evaluate(
            lambda rows=rows: fitness(model, ids[rows], mask[rows], examples),  # type: ignore[misc]
            members=[i],
        )
    assert list(together) == list(apart) == list(range(count))
    return tuple(torch.tensor(list(f.values()), dtype=torch.float64) for f in (together, apart))  # type: ignore[return-value]


CASES = [(1, 1, None), (2, 3, "left"), (3, 2, "right")]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("rank", "examples", "padding"), CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_pass_for_each(
    name: str, rank: int, examples: int, padding: str | None, attention: str
) -> None:
    """float64: to its rounding. Both pairs and single members; each moves far from theta."""
    model = language_model(name, torch.float64, attn_implementation=attention)
    ids, mask = tokens(6 * examples, padding)
    for antithetic in (True, False):
        together, apart = both_ways(model, ids, mask, examples, rank=rank, antithetic=antithetic)
        # A loss near 5 after some hundred operations, each rounded to 2^-53 of values that sum up
        # a hundred terms of about its size.
        assert (together - apart).abs().max() <= 5 * 100 * 100 * 2.0**-53
        with torch.no_grad():
            here = fitness(model, ids, mask, examples)
        assert (together - here).abs().min() > 1e-6
        assert (together - here).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "examples", "padding"), CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_rounds_like_a_pass_for_each(
    name: str, rank: int, examples: int, padding: str | None, dtype: torch.dtype
) -> None:
    """As near to the same members in float64 as separate passes are, within a factor of 4.

    (And a unit of the loss, which is all that a short sum may happen to be off.)
    """
    model = language_model(name, dtype)
    ids, mask = tokens(6 * examples, padding)
    together, apart = both_ways(model, ids, mask, examples, rank=rank)
    truth, _ = both_ways(copy.deepcopy(model).double(), ids, mask, examples, rank=rank)
    unit = torch.finfo(torch.float32).eps * truth.abs().max()
    error = (apart - truth).square().mean().sqrt()
    assert (together - truth).square().mean().sqrt() <= 4 * error + unit
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    "chosen", [[0, 1, 2, 3, 4, 5], [4, 5], [3], [5, 2, 0, 3], [1, 0, 3, 2], [2, 4, 3]], ids=str
)
def test_any_members_in_any_order(chosen: list[int]) -> None:
    model = language_model("gpt2", torch.float64)
    ids, mask = tokens(6)
    optimizer = strategy(model)
    part = optimizer.evaluate_batched(
        lambda: fitness(model, ids[chosen], mask[chosen], 1), members=chosen
    )
    assert list(part) == chosen
    for i in chosen:
        [alone] = optimizer.evaluate(
            lambda i=i: fitness(model, ids[[i]], mask[[i]], 1), members=[i]
        ).values()
        assert abs(part[i] - alone) <= 1e-12


def test_generation_equals_one_for_each() -> None:
    """Greedy, with a cache of keys and values: the members' tokens, and a reward that counts."""
    model = language_model("gpt2", use_cache=True)
    ids, mask = tokens(6, "left", length=5)
    optimizer = strategy(model, sigma=0.2)
    texts: list[Tensor] = []

    def reward(ids: Tensor, mask: Tensor) -> list[int]:
        text = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False
        )
        texts.append(text)
        return [int(row.sum()) for row in text]

    together = optimizer.evaluate_batched(lambda: reward(ids, mask))
    batch = texts[0]
    assert len(texts) == 2, "the second one is the check of the layout"
    for i in range(6):
        apart = optimizer.evaluate(lambda i=i: reward(ids[[i]], mask[[i]])[0], members=[i])
        assert torch.equal(texts[-1][0], batch[i])
        assert apart[i] == together[i]
    assert len({tuple(row.tolist()) for row in batch[:, 5:]}) >= 4


class Vectors(nn.Module):
    """What vectors, numbers and plain matrices can be read by."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 6) / 3)
        self.scale, self.shift, self.row = (nn.Parameter(torch.rand(6) + 0.5) for _ in range(3))
        self.number = nn.Parameter(torch.tensor(0.7))
        self.layer = nn.LayerNorm(6)
        self.plain = nn.LayerNorm(6, bias=False)
        self.rms = nn.RMSNorm(6)
        self.late = nn.Linear(6, 6)
        self.partly = nn.Linear(6, 6)
        self.partly.weight.requires_grad_(False)
        self.rest = nn.Linear(6, 6)
        self.rest.bias.requires_grad_(False)
        self.frozen = nn.LayerNorm(6)
        self.frozen.weight.requires_grad_(False)
        self.plain_matrix = torch.linspace(1, 2, 6, dtype=torch.float64).view(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.matrix)
        h = self.scale * h + self.shift
        h = self.layer(h) - self.row
        h = torch.div(self.plain(h), self.scale) * self.number
        h = self.rest(self.partly(self.late(self.rms(self.shift - h))))
        return torch.mm(self.frozen(h).flatten(0, -2), self.plain_matrix).view(h.shape[:-1])


def test_vectors_numbers_and_frozen_parts() -> None:
    torch.manual_seed(0)
    model = Vectors().double()
    x = torch.randn(12, 3, 8, dtype=torch.float64)
    optimizer = strategy(model, rank=2, sigma=0.1)
    together = optimizer.evaluate_batched(lambda: model(x).square().view(6, -1).mean(1), examples=2)
    for i in range(6):
        rows = x[2 * i : 2 * i + 2]
        apart = optimizer.evaluate(lambda rows=rows: model(rows).square().mean(), members=[i])
        assert abs(together[i] - apart[i]) <= 1e-12
    assert len(set(together.values())) == 6


def test_under_autocast() -> None:
    """bfloat16 products of float32 parameters: as near to each other as bfloat16 lets them be."""
    model = language_model("gpt2")
    ids, mask = tokens(6)
    with torch.autocast("cpu", torch.bfloat16):
        together, apart = both_ways(model, ids, mask, 1)
    truth, _ = both_ways(copy.deepcopy(model).double(), ids, mask, 1)
    error = (apart - truth).square().mean().sqrt()
    assert error > 1e-5
    assert (together - truth).square().mean().sqrt() <= 4 * error


def test_groups_have_their_own_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    groups = [
        {"params": list(model[0].named_parameters("0")), "sigma": 0.3},
        {"params": list(model[2].named_parameters("2")), "sigma": 0.01, "rank": 3},
    ]
    optimizer = zoopt.EvolutionStrategy(groups, population_size=4, rank=2, seed=1)
    x = torch.randn(4, 5, dtype=torch.float64)
    together = optimizer.evaluate_batched(lambda: model(x))
    for i in range(4):
        [apart] = optimizer.evaluate(lambda i=i: model(x[[i]]), members=[i]).values()
        assert abs(together[i] - apart) <= 1e-13


@pytest.mark.parametrize("perturbation", ["auto", "inplace", "virtual"])
def test_changes_nothing(perturbation: str) -> None:
    model = language_model("llama")
    before = copy.deepcopy(model)
    ids, mask = tokens(6)
    optimizer = strategy(model, perturbation=perturbation)
    state = str(optimizer.state_dict())
    values = optimizer.evaluate_batched(lambda: fitness(model, ids, mask, 1))
    assert same(model, before)
    assert str(optimizer.state_dict()) == state
    assert optimizer.last_step is None
    optimizer.update(values)
    assert optimizer.last_step.fitness == tuple(values.values())
    assert not same(model, before)


def test_the_rng_goes_on_as_after_one_pass() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = strategy(model)
    x = torch.randn(6, 5)
    torch.manual_seed(1)
    model(x)
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    first = optimizer.evaluate_batched(lambda: model(x))
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(1)
    assert optimizer.evaluate_batched(lambda: model(x)) == first


def test_memory() -> None:
    """Beside the forward: thin factors, and not a matrix, a batch of matrices or an activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 700), nn.Tanh(), nn.Linear(700, 600))
    x = torch.randn(64, 600)
    optimizer = strategy(model, 8)

    def evaluate() -> Tensor:
        return model(x).square().view(8, -1).mean(1)

    optimizer.evaluate_batched(evaluate, examples=8)
    with torch.no_grad():
        forward = peak_bytes(evaluate, model.parameters())
    batched = peak_bytes(
        lambda: optimizer.evaluate_batched(evaluate, examples=8), model.parameters()
    )
    # Four draws' factors and vectors; those of one parameter while they are made and used.
    factors = 4 * 4 * sum(sum(param.shape) for param in model.parameters())
    assert batched <= forward + 4 * factors
    assert 4 * factors < model[0].weight.nbytes / 4


def test_directions_that_are_too_many_to_keep_are_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = language_model("gpt2")
    ids, mask = tokens(6)
    optimizer = strategy(model)
    kept = optimizer.evaluate_batched(lambda: fitness(model, ids, mask, 1))
    monkeypatch.setattr(members, "_KEPT_BYTES", 5000)
    assert optimizer.evaluate_batched(lambda: fitness(model, ids, mask, 1)) == kept


def test_layout_is_verified_once_for_each_size() -> None:
    model = nn.Linear(5, 1)
    optimizer = strategy(model)
    passes = 0

    def evaluate(rows: int) -> Tensor:
        nonlocal passes
        passes += 1
        return model(torch.ones(rows, 5)).view(6, -1).mean(1)

    for examples, expected in ((1, 2), (1, 1), (2, 2), (1, 1)):
        passes = 0
        optimizer.evaluate_batched(lambda e=examples: evaluate(6 * e), examples=examples)
        assert passes == expected
    passes = 0
    optimizer.evaluate_batched(lambda: evaluate(18), examples=3, verify=False)
    optimizer.evaluate_batched(lambda: evaluate(18), examples=3)
    assert passes == 3


class Mixing(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


MIXING: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "batch normalisation": (nn.BatchNorm1d(6, affine=False), (6,)),
    "the batch in another dimension": (lambda h: h.transpose(0, 1), (6, 6)),
    "a mean over the batch": (lambda h: h - h.mean(0), (6, 6)),
    "the other way round": (lambda h: h.flip(0), (6,)),
}


@pytest.mark.parametrize("name", MIXING)
def test_members_that_mix_are_found(name: str) -> None:
    between, shape = MIXING[name]
    model = Mixing(between)
    x = torch.randn(6, *shape)
    with pytest.raises(RuntimeError, match="the input of 'linear' mixes members"):
        strategy(model).evaluate_batched(lambda: model(x).view(6, -1).mean(1))


def test_sequence_first_is_found() -> None:
    """As many tokens as examples, so that no shape tells."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    attention = nn.MultiheadAttention(8, 2)
    x = torch.randn(6, 6, 8)
    with pytest.raises(RuntimeError, match="'multi_head_attention_forward' reads a parameter"):
        strategy(layer).evaluate_batched(lambda: layer(x).mean((0, 2)))
    mlp = nn.ModuleList([layer.linear1, layer.linear2])
    with pytest.raises(RuntimeError, match="mixes members"):
        strategy(mlp).evaluate_batched(
            lambda: mlp[1](attention(h := mlp[0](x)[..., :8], h, h)[0].repeat(1, 1, 2)).mean((0, 2))
        )
    # No operator tells here: positions are members to all of them, and examples to the fitness.
    with pytest.raises(RuntimeError, match="the fitness mixes members"):
        strategy(mlp).evaluate_batched(lambda: mlp[1](mlp[0](x)).mean((0, 2)))


class Table(nn.Module):
    """Positions without a batch, in the leading dimension or none."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(9, 6), nn.Linear(6, 1)
        self.ids = ids

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.embedding(self.ids))


def test_positions_are_the_same_for_all_examples() -> None:
    x = torch.randn(6, 6, 6)
    model = Table(torch.arange(6)[None])
    optimizer = strategy(model.double())
    together = optimizer.evaluate_batched(lambda: model(x.double()).mean((1, 2)))
    for i in range(6):
        [apart] = optimizer.evaluate(
            lambda i=i: model(x[[i]].double()).mean(), members=[i]
        ).values()
        assert abs(together[i] - apart) <= 1e-13
    model.ids = model.ids.int()
    assert optimizer.evaluate_batched(lambda: model(x.double()).mean((1, 2))) == together
    # Without a leading dimension, they look like the batch.
    model = Table(torch.arange(6))
    with pytest.raises(RuntimeError, match="the input of 'linear' mixes members"):
        strategy(model).evaluate_batched(lambda: model(x).mean((1, 2)))


class Raw(nn.Module):
    """One weight, and what reads it."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape))
        self.read = read

    def forward(self) -> Tensor:
        return self.read(self.weight)


X = torch.ones(6, 4)
UNREADABLE: list[tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]] = [
    ("T", (4, 4), lambda w: X @ w.T),
    ("conv1d", (4, 4, 1), lambda w: F.conv1d(X[:, :, None], w)),
    ("matmul", (6, 6), lambda w: w @ X),
    ("addmm", (6, 4), lambda w: torch.addmm(w, X, X.new_ones(4, 4))),
    ("addmm", (4, 4), lambda w: torch.addmm(X.new_ones(4), X, w, beta=2.0)),
    ("bilinear", (1, 4, 4), lambda w: F.bilinear(X, X, w)),
    ("add", (6, 4), lambda w: X + w),
    ("mul", (4,), lambda w: 2.0 * w),
    ("mul", (4,), lambda w: w * w),
    ("float", (4,), lambda w: X * w.float()),
    ("add_", (4,), lambda w: X.clone().add_(w)),
    ("layer_norm", (3, 4), lambda w: F.layer_norm(X.view(2, 3, 4), (3, 4), w)),
    ("batch_norm", (4,), lambda w: F.batch_norm(X, None, None, w, training=True)),
    ("stack", (4,), lambda w: torch.stack([w] * 6)),
    ("__getitem__", (6, 4), lambda w: w[0] + X),
]


@pytest.mark.parametrize(("name", "shape", "read"), UNREADABLE)
def test_unknown_readers_are_named(
    name: str, shape: tuple[int, ...], read: Callable[[Tensor], Tensor]
) -> None:
    model = Raw(shape, read)
    optimizer = strategy(model)
    with pytest.raises(RuntimeError, match=rf"^'{name}' reads a parameter, .* call evaluate"):
        optimizer.evaluate_batched(lambda: model().flatten(1).sum(1))
    assert optimizer.evaluate(lambda: model().sum()).keys() == set(range(6))


def test_batches_of_another_size_are_refused() -> None:
    linear, embedding = nn.Linear(4, 1), nn.Embedding(9, 4)
    scale = Raw((4,), lambda w: w * torch.ones(7, 4))
    vector = Raw((4,), lambda w: w * torch.ones(4))
    for model, name, run, shape in (
        (linear, "linear", lambda: linear(torch.ones(7, 4)), r"\(7, 4\)"),
        (linear, "linear", lambda: linear(torch.ones(4)), r"\(4,\)"),
        (linear, "linear", lambda: linear(torch.ones(0, 4)), r"\(0, 4\)"),
        (embedding, "embedding", lambda: embedding(torch.ones(5, 2).long()), r"\(5, 2\)"),
        (scale, "mul", scale, r"\(7, 4\)"),
        (vector, "mul", vector, r"\(4,\)"),
    ):
        with pytest.raises(
            RuntimeError,
            match=f"input of '{name}' must have .* 6 members x 1 examples = 6 .* got shape {shape}",
        ):
            strategy(model).evaluate_batched(run)


def test_what_evaluate_batched_refuses() -> None:
    model = nn.Linear(4, 1)
    optimizer = strategy(model)
    x = torch.ones(6, 4)
    for call, error, message in (
        (lambda: optimizer.evaluate_batched(None), TypeError, "evaluate_batched needs a closure"),
        (
            lambda: optimizer.evaluate_batched(lambda: model(x), examples=0),
            ValueError,
            "examples must be a positive int, got 0",
        ),
        (lambda: optimizer.evaluate_batched(lambda: model(x), [7]), ValueError, "got \\[7\\]"),
        (
            lambda: optimizer.evaluate_batched(lambda: model(x).mean()),
            ValueError,
            r"a fitness for each of the 6 members of the batch, got shape \(\); .*view\(6, -1\)",
        ),
        (
            lambda: optimizer.evaluate_batched(lambda: float(model(x).mean())),
            ValueError,
            r"a fitness for each of the 6 members of the batch, got -?\d\.",
        ),
        (
            lambda: optimizer.evaluate_batched(lambda: [model(x), None] * 3),
            TypeError,
            r"fitness\[0\] must be one real number",
        ),
        (
            lambda: optimizer.evaluate_batched(lambda: [1.0] * 6),
            RuntimeError,
            "the closure read none of the optimizer's parameters",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    assert optimizer.evaluate_batched(lambda: model(x), []) == {}
    whole = strategy(model, rank=None)
    with pytest.raises(ValueError, match="rank must be a positive int in all param groups for"):
        whole.evaluate_batched(lambda: model(x))


def test_an_evaluation_that_cannot_bear_nan() -> None:
    """Sampling, say: it cannot be verified, but it can be taken at its word."""
    model = nn.Linear(4, 3)
    x = torch.ones(6, 4)
    optimizer = strategy(model)

    def sampled() -> Tensor:
        return torch.multinomial(model(x).softmax(1), 1).float()

    with pytest.raises(RuntimeError, match="could not be verified; pass verify=False") as error:
        optimizer.evaluate_batched(sampled)
    assert "multinomial" in str(error.value.__cause__) or "probability" in str(
        error.value.__cause__
    )
    assert all(math.isfinite(f) for f in optimizer.evaluate_batched(sampled, verify=False).values())
