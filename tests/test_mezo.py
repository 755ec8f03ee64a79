"""MeZO: memory, closures, randomness, accumulation, groups and bad input."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import math
import sys
import warnings

import pytest
import torch
from torch import nn

import zoopt
from tests.meter import peak_bytes
from tests.optimizer_table import PERTURBATIONS, closure_of, mlp
from zoopt import kernels, noise


def copy_of(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same_bits(model: nn.Module, values: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(p.detach().view(torch.uint8), v.view(torch.uint8))
        for p, v in zip(model.parameters(), values, strict=True)
    )


class Language(nn.Module):
    """An embedding tied to the head, as language models have them."""

    def __init__(self, vocabulary: int = 2000, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.embedding(tokens))))


def language_closure(model: Language, batch: int = 2):
    tokens = torch.arange(16 * batch).view(batch, 16) * 7 % 2000
    return lambda: nn.functional.cross_entropy(
        model(tokens).float().flatten(0, 1), tokens.roll(1).flatten()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_perturbations_evaluate_the_same_point(dtype: torch.dtype) -> None:
    """L(theta + zo_eps z): the same bits in place, virtually, and written out by hand."""
    losses = []
    for perturbation in PERTURBATIONS:
        model = Language().to(dtype)
        torch.manual_seed(0)
        for param in model.parameters():
            nn.init.normal_(param, std=0.05)
        by_hand = copy.deepcopy(model)
        optimizer = zoopt.MeZO(model.named_parameters(), seed=3, perturbation=perturbation)
        optimizer.step(language_closure(model))
        losses.append(optimizer.last_step.losses[0][0])
        with torch.no_grad():
            for name, param in by_hand.named_parameters():
                key = kernels.NoiseKey(3, noise.stream(name))
                kernels.perturb(param, 1e-3, key=key, draw=0, out=param)
            losses.append(language_closure(by_hand)().item())
    assert len(set(losses)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_virtual_never_writes_and_never_drifts(dtype: torch.dtype) -> None:
    """lr 0, many steps: every bit is where it was. (In place, bfloat16 would have walked away.)"""
    model = mlp(dtype)
    before = copy_of(model)
    optimizer = zoopt.MeZO(model.named_parameters(), lr=0.0, seed=1, perturbation="virtual")
    closure = closure_of(model, dtype)
    for _ in range(200):
        optimizer.step(closure)
    assert same_bits(model, before)


def test_ten_thousand_virtual_steps_do_not_drift() -> None:
    weight = nn.Parameter((torch.randn(50) * 0.02).bfloat16())
    with torch.no_grad():
        weight[0] = -0.0
    before = weight.detach().clone()
    optimizer = zoopt.MeZO([weight], lr=0.0, seed=1)
    for _ in range(10_000):
        optimizer.step(lambda: weight.sum())
    assert torch.equal(weight.detach().view(torch.int16), before.view(torch.int16))
    assert optimizer.last_step.step == 10_000


def test_virtual_steps_lose_no_references() -> None:
    """torch 2.6 drops references to None with each stance; with none left Python 3.11 aborts."""
    importlib.import_module("torch._dynamo")
    weight = nn.Parameter(torch.zeros(50).bfloat16())
    optimizer = zoopt.MeZO([weight], lr=0.0, seed=1)
    optimizer.step(lambda: weight.sum())
    gc.collect()  # What others have left, with its references to None.
    before = sys.getrefcount(None)
    for _ in range(300):
        optimizer.step(lambda: weight.sum())
    # 1800 without a remedy; some objects of the interpreter's own come and go.
    assert sys.getrefcount(None) > before - 200


def test_in_place_walks_away_in_bfloat16() -> None:
    """Why "auto" is virtual there: one step at lr 0 changes two fifths of the weights."""
    changed = {}
    for perturbation in PERTURBATIONS:
        weight = nn.Parameter((torch.randn(100_000) * 0.02).bfloat16())
        before = weight.detach().clone()
        optimizer = zoopt.MeZO([weight], lr=0.0, perturbation=perturbation, seed=1)
        optimizer.step(lambda weight=weight: weight.sum())
        changed[perturbation] = float((weight.detach() != before).float().mean())
    assert changed["virtual"] == 0.0
    assert 0.35 < changed["inplace"] < 0.45


def test_in_place_drift_is_rounding() -> None:
    """lr 0 in float32: 50 times three passes move a weight by at most 150 half spacings."""
    model = mlp()
    before = copy_of(model)
    optimizer = zoopt.MeZO(model.named_parameters(), lr=0.0, seed=1, perturbation="inplace")
    for _ in range(50):
        optimizer.step(closure_of(model))
    for param, value in zip(model.parameters(), before, strict=True):
        spacing = (value.abs() + 0.01) * torch.finfo(torch.float32).eps
        assert ((param.detach() - value).abs() <= 75 * spacing).all()


def memory(param: torch.Tensor) -> bytes:
    """The parameter's bytes as they lie in memory, whatever a mode makes of reading it."""
    size = param.numel() * param.element_size()
    return bytes((ctypes.c_char * size).from_address(param.data_ptr()))


@pytest.mark.parametrize(
    ("dtype", "written"),
    [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False), (torch.float16, False)],
)
def test_auto_is_virtual_for_16_bits_only(dtype: torch.dtype, written: bool) -> None:
    model = mlp(dtype)
    optimizer = zoopt.MeZO(model.parameters(), seed=1)
    before = memory(model[0].weight)
    closure = closure_of(model, dtype)
    seen = []

    def watching() -> torch.Tensor:
        seen.append(memory(model[0].weight) != before)
        return closure()

    optimizer.step(watching)
    assert seen == [written] * 3  # the run's first evaluation, repeated, and the second


def test_memory_in_place() -> None:
    """At most 1 MiB above the forward's (the published algorithm takes the largest parameter)."""
    model = Language(20_000, 256)
    closure = language_closure(model)
    with torch.no_grad():
        forward = peak_bytes(closure, model.parameters())
    optimizer = zoopt.MeZO(model.named_parameters(), perturbation="inplace", seed=1)
    assert peak_bytes(lambda: optimizer.step(closure), model.parameters()) <= forward + 2**20


def test_memory_virtual() -> None:
    """At most the largest parameter above the forward's, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Language(20_000, 256).to(dtype)
        closure = language_closure(model)
        with torch.no_grad():
            forward = peak_bytes(closure, model.parameters())
        optimizer = zoopt.MeZO(model.named_parameters(), perturbation="virtual", seed=1)
        largest = max(param.nbytes for param in model.parameters())
        assert peak_bytes(lambda: optimizer.step(closure), model.parameters()) <= forward + largest  # noqa: B023


def test_an_untied_embedding_costs_its_rows_only() -> None:
    model = nn.Embedding(20_000, 256)
    tokens = torch.arange(64)
    optimizer = zoopt.MeZO(model.parameters(), perturbation="virtual", seed=1)
    assert (
        peak_bytes(lambda: optimizer.step(lambda: model(tokens).square().sum()), model.parameters())
        <= 2**20
    )


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
@pytest.mark.parametrize("at_call", [1, 2, 4])
def test_an_exception_is_the_users_own(perturbation: str, estimator: str, at_call: int) -> None:
    model = mlp()
    before = copy_of(model)
    optimizer = zoopt.MeZO(
        model.parameters(), perturbation=perturbation, estimator=estimator, num_probes=3, seed=1
    )
    state = str(optimizer.state_dict())
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise ZeroDivisionError("mine")
        return closure_of(model)()

    with pytest.raises(ZeroDivisionError, match=r"^mine$"):
        optimizer.step(closure)
    assert str(optimizer.state_dict()) == state
    if perturbation == "virtual":
        assert same_bits(model, before)
    for param, value in zip(model.parameters(), before, strict=True):
        # At most four passes, each rounding a weight below 2 to the nearest float32.
        assert (param.detach() - value).abs().max() <= 4 * 2.0**-24 * 2
    assert optimizer.step() is None


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_accumulation_is_exact(perturbation: str) -> None:
    """Micro-batches whose losses add up to the whole batch's: the same projected gradient."""
    grads, models = [], []
    for micro in (1, 4):
        model = mlp(torch.float64)
        optimizer = zoopt.MeZO(model.parameters(), 1e-3, perturbation=perturbation, seed=5)
        x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for part in x.chunk(micro):
            loss = optimizer.probe(lambda m=model, part=part: m(part).square().sum() / 64)
            assert loss > 0
        returned = optimizer.step()
        assert returned == pytest.approx(
            sum(sum(pair) for pair in optimizer.last_step.losses) / (2 * micro)
        )
        assert len(optimizer.last_step.losses) == micro
        grads.append(optimizer.last_step.projected_grads[0])
        models.append(model)
    # Sums of 64 terms in another order, divided by 2 zo_eps.
    assert abs(grads[0] - grads[1]) <= 64 * 2**-52 * 1e3
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-12


def test_a_probe_leaves_the_parameters() -> None:
    model = mlp()
    before = copy_of(model)
    optimizer = zoopt.MeZO(model.parameters(), perturbation="inplace", seed=1)
    optimizer.probe(closure_of(model))
    for param, value in zip(model.parameters(), before, strict=True):
        assert (param.detach() - value).abs().max() <= 3 * 2.0**-24 * 2
    assert optimizer.last_step is None
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.step() is None, "loading drops what is pending"


def test_window_as_long_as_the_run_is_a_stored_buffer() -> None:
    results = []
    for options in ({}, {"momentum_window": 50}):
        model = mlp(torch.float64)
        optimizer = zoopt.MeZO(model.parameters(), 1e-3, momentum=0.8, seed=5, **options)
        for _ in range(12):
            optimizer.step(closure_of(model, torch.float64))
        results.append(copy_of(model))
        assert bool(optimizer.state) is not bool(options)
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-11


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_closure_sees_one_rng_state(perturbation: str) -> None:
    """The same dropout masks in every evaluation; afterwards, the state one evaluation leaves."""
    model = mlp()
    masks = []

    def closure() -> torch.Tensor:
        masks.append(torch.rand(4))
        return model(torch.ones(1, 6)).sum() + masks[-1].sum()

    optimizer = zoopt.MeZO(model.parameters(), num_probes=2, perturbation=perturbation, seed=1)
    torch.manual_seed(9)
    torch.rand(4)
    expected = torch.get_rng_state()
    torch.manual_seed(9)
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), expected)
    assert len(masks) == 5  # with the run's first, which is repeated
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    optimizer.step(closure)
    assert not torch.equal(masks[0], masks[-1])


def test_training_mode_and_gradients_are_the_users_own() -> None:
    model = mlp().train()
    optimizer = zoopt.MeZO(model.parameters(), seed=1)
    assert torch.is_grad_enabled()
    optimizer.step(lambda: model(torch.ones(1, 6)).sum() * (not torch.is_grad_enabled()))
    assert optimizer.last_step.losses[0][0] != 0
    assert torch.is_grad_enabled()
    assert model.training
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("result", [3, 2.5, torch.tensor([1.5]), torch.tensor(2, dtype=torch.int8)])
def test_any_one_number_is_a_loss(result) -> None:
    optimizer = zoopt.MeZO(mlp().parameters(), seed=1)
    assert optimizer.step(lambda: result) == float(result)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "got NoneType; end it with `return loss`"),
        ("0.5", TypeError, "got str; return the loss itself"),
        (torch.ones(2), ValueError, r"one real number, got a torch.float32 tensor of shape \(2,\)"),
        (torch.ones(0), ValueError, "reduce it first"),
        (torch.ones((), dtype=torch.complex64), ValueError, "one real number, got a torch.complex"),
    ],
)
def test_what_a_closure_may_not_return(perturbation, result, error, message: str) -> None:
    model = mlp()
    optimizer = zoopt.MeZO(model.parameters(), perturbation=perturbation, seed=1)
    before = copy_of(model)

    def closure():
        model(torch.ones(1, 6))
        return result

    with pytest.raises(error, match=message):
        optimizer.step(closure)
    for param, value in zip(model.parameters(), before, strict=True):
        assert (param.detach() - value).abs().max() <= 3 * 2.0**-24 * 2


@pytest.mark.parametrize("closure", [3, "loss"])
def test_a_closure_must_be_callable(closure) -> None:
    optimizer = zoopt.MeZO(mlp().parameters(), seed=1)
    for call in (optimizer.step, optimizer.probe):
        with pytest.raises(TypeError, match="needs a closure that evaluates the loss"):
            call(closure)
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.probe(None)


def test_non_finite_losses_are_skipped() -> None:
    model = mlp()
    before = copy_of(model)
    optimizer = zoopt.MeZO(
        model.parameters(), 0.1, perturbation="virtual", weight_decay=0.1, seed=1, momentum=0.9
    )

    def broken() -> torch.Tensor:
        return model(torch.ones(1, 6)).sum() * math.nan

    with pytest.warns(UserWarning, match="skipped 1 of 1 probes because a loss was not finite"):
        optimizer.step(broken)
    assert same_bits(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(broken)
    assert optimizer.skipped_probes == 2
    assert optimizer.last_step.skipped == 1
    assert math.isnan(optimizer.last_step.projected_grads[0])
    assert [group["draw"] for group in optimizer.param_groups] == [2]
    optimizer.step(closure_of(model))
    assert not same_bits(model, before)


def test_of_several_probes_the_finite_ones_count() -> None:
    """The mean runs over those that were measured."""
    results = []
    for probes in ((1.0, math.inf, 3.0), (1.0, 3.0)):
        weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer = zoopt.MeZO(
            [weight], 1.0, num_probes=len(probes), zo_eps=0.5, perturbation="inplace", seed=1
        )
        # The run's first evaluation is repeated.
        losses = iter([probes[0], *(loss for probe in probes for loss in (probe, 0.0))])
        if len(probes) == 3:
            with pytest.warns(UserWarning, match="skipped 1 of 3"):
                optimizer.step(lambda losses=losses: next(losses))
        else:
            optimizer.step(lambda losses=losses: next(losses))
        results.append((weight, optimizer.last_step))
    (weight, record), _ = results
    assert record.skipped == 1
    key = {"seed": 1, "stream": 0}
    expected = -(1.0 * noise.normal(5, draw=0, **key) + 3.0 * noise.normal(5, draw=2, **key)) / 2
    assert (weight.detach() - expected).abs().max() <= 1e-6


def test_groups_have_their_own_numbers() -> None:
    """Per-group lr, zo_eps and weight_decay; each group's estimate is in its own zo_eps."""
    a, b = (nn.Parameter(torch.ones(40, dtype=torch.float64)) for _ in range(2))
    slope_a, slope_b = torch.arange(40.0).double(), torch.ones(40).double()
    groups = [
        {"params": [("a", a)], "lr": 1e-2, "zo_eps": 1e-3},
        {"params": [("b", b)], "lr": 1e-3, "zo_eps": 1e-1, "weight_decay": 0.5},
    ]
    optimizer = zoopt.MeZO(groups, seed=4)
    optimizer.step(lambda: a @ slope_a + b @ slope_b)
    z = {
        name: noise.normal(40, seed=4, stream=noise.stream(name), draw=0).double() for name in "ab"
    }
    delta = 1e-3 * (z["a"] @ slope_a) + 1e-1 * (z["b"] @ slope_b)
    assert (a - (1 - 1e-2 * delta / 1e-3 * z["a"])).abs().max() < 1e-9
    assert (b - (1 - 1e-3 * 0.5 - 1e-3 * delta / 1e-1 * z["b"])).abs().max() < 1e-9


def test_frozen_parameters_follow_requires_grad() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = zoopt.MeZO(model.parameters(), 1e-2, seed=1)
    frozen = copy_of(model[0])
    optimizer.step(closure_of(model))
    assert same_bits(model[0], frozen)
    model[0].requires_grad_(True)
    optimizer.step(closure_of(model))
    assert not same_bits(model[0], frozen)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameter of the optimizer requires a gradient"):
        optimizer.step(closure_of(model))


def test_added_groups_join_the_run() -> None:
    model = mlp()
    optimizer = zoopt.MeZO(model[0].parameters(), 1e-2, seed=6)
    optimizer.step(closure_of(model))
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 1e-3})
    assert optimizer.param_groups[1]["draw"] == 1
    assert optimizer.param_groups[1]["seed"] == 6
    before = copy_of(model[3])
    optimizer.step(closure_of(model))
    assert not same_bits(model[3], before)
    with pytest.raises(ValueError, match="num_probes must be the same in every param group"):
        optimizer.add_param_group({"params": list(model[2].parameters()), "num_probes": 2})
    assert len(optimizer.param_groups) == 2


def test_seed_is_read_from_torch_and_not_advanced() -> None:
    torch.manual_seed(31337)
    before = torch.get_rng_state()
    optimizer = zoopt.MeZO(mlp().parameters())
    torch.set_rng_state(before)
    assert optimizer.param_groups[0]["seed"] == 31337


def test_maximize_and_clipping() -> None:
    weight = nn.Parameter(torch.zeros(30, dtype=torch.float64))
    optimizer = zoopt.MeZO([weight], 0.1, maximize=True, max_projected_grad=0.25, seed=1)
    optimizer.step(lambda: weight.sum() * 100)
    assert abs(optimizer.last_step.projected_grads[0]) == 0.25
    assert weight.sum() > 0


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
def test_virtual_refuses_writes_and_silence(estimator: str) -> None:
    model = mlp()
    optimizer = zoopt.MeZO(model.parameters(), perturbation="virtual", estimator=estimator, seed=1)
    before = copy_of(model)
    for write in (
        lambda: model[0].weight.add_(1.0),
        lambda: model[0].weight.mul_(2.0).sum(),
        lambda: model[0].weight.__setitem__(0, 0.0),
        lambda: torch.add(model[0].bias, 1.0, out=model[0].bias),
        lambda: setattr(model[0].weight, "data", torch.zeros(10, 6)),
    ):
        with pytest.raises(RuntimeError, match="the closure writes to a parameter"):
            optimizer.step(write)
    with pytest.raises(RuntimeError, match="read none of the optimizer's parameters"):
        optimizer.step(lambda: 1.0)
    embedding = nn.Embedding(5, 3, max_norm=1.0)
    renormalising = zoopt.MeZO(embedding.parameters(), perturbation="virtual", seed=1)
    with pytest.raises(ValueError, match=r"max_norm=1.0 writes to its weight"):
        renormalising.step(lambda: embedding(torch.tensor([1])).sum())
    assert same_bits(model, before)


def test_reading_metadata_makes_nothing() -> None:
    weight = nn.Parameter(torch.ones(1000, 1000))
    optimizer = zoopt.MeZO([weight], perturbation="virtual", seed=1)

    def closure() -> torch.Tensor:
        for _ in range(3):
            assert weight.shape == (1000, 1000)
            assert (weight.dtype, weight.device.type, weight.ndim) == (torch.float32, "cpu", 2)
            assert weight.size(0) == weight.numel() // 1000 == len(weight)
            assert weight.is_contiguous()
            assert weight.requires_grad
            assert weight.grad is None
        return weight.new_zeros(()) + weight[0:1, 0:1].sum()

    before = peak_bytes(lambda: torch.ones(1000, 1000))
    assert peak_bytes(lambda: optimizer.step(closure), [weight]) <= 1.01 * before


INVALID = [
    ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1.0"),
    ({"lr": math.nan}, ValueError, "lr must be a finite number >= 0, got nan"),
    ({"lr": "1e-3"}, TypeError, "lr must be a finite number >= 0, got '1e-3'"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a finite number"),
    ({"zo_eps": 0.0}, ValueError, "zo_eps must be a finite number > 0, got 0.0"),
    ({"momentum": 1.0}, ValueError, "momentum must be a finite number >= 0 and < 1, got 1.0"),
    ({"momentum": -0.1}, ValueError, "momentum must be"),
    ({"momentum": 0.9, "momentum_window": 0}, ValueError, "momentum_window must be a positive int"),
    ({"momentum_window": 5}, ValueError, "momentum_window must be None without momentum, got 5"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be a finite number >= 0, got -0.1"),
    ({"num_probes": 0}, ValueError, "num_probes must be a positive int, got 0"),
    ({"num_probes": 1.0}, TypeError, "num_probes must be a positive int, got 1.0"),
    ({"estimator": "three-sided"}, ValueError, "estimator must be one of 'two-sided', 'one-sided'"),
    ({"distribution": "uniform"}, ValueError, "distribution must be one of 'normal', 'rademacher'"),
    ({"perturbation": "out"}, ValueError, "perturbation must be one of 'auto', 'inplace'"),
    ({"rounding": "down"}, ValueError, "rounding must be one of 'auto', 'nearest', 'stochastic'"),
    ({"max_projected_grad": 0.0}, ValueError, "max_projected_grad must be a finite number > 0"),
    ({"maximize": 1}, TypeError, "maximize must be a bool, got 1"),
    ({"seed": -1}, ValueError, r"seed must be an int in \[0, 2\^64\), got -1"),
    ({"seed": 2**64}, ValueError, "seed must be an int"),
    ({"seed": 1.5}, ValueError, "seed must be an int"),
]


@pytest.mark.parametrize(("options", "error", "message"), INVALID)
def test_constructor_errors(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        zoopt.MeZO(mlp().parameters(), **options)
    if "seed" not in options:
        with pytest.raises(error, match=message):
            zoopt.MeZO([{"params": mlp().parameters(), **options}])


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "got torch.complex64; .*view_as_real"),
        (torch.ones(2, dtype=torch.int64), "got torch.int64; .*p.requires_grad"),
        (torch.ones(2, dtype=torch.uint8), "got torch.uint8"),
        (torch.eye(2).to_sparse(), "a parameter must be dense, got layout torch.sparse_coo"),
    ],
)
def test_parameters_of_other_kinds(param: torch.Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        zoopt.MeZO([param])
    optimizer = zoopt.MeZO(mlp().parameters())
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_streams_may_not_collide() -> None:
    # Two names with the same 32 bits, found by search.
    first, second = "layer.27423.weight", "layer.47292.weight"
    assert noise.stream(first) == noise.stream(second)
    named = [(first, nn.Parameter(torch.ones(2))), (second, nn.Parameter(torch.ones(2)))]
    with pytest.raises(ValueError, match="must have different noise streams"):
        zoopt.MeZO(named)


def test_a_tensor_lr_and_the_draws_limit() -> None:
    model = mlp()
    optimizer = zoopt.MeZO(model.parameters(), torch.tensor(1e-3), seed=1)
    optimizer.step(closure_of(model))
    optimizer.param_groups[0]["draw"] = 2**32
    with pytest.raises(RuntimeError, match=r"used all of its 2\^32 draws"):
        optimizer.step(closure_of(model))
