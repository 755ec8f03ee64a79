"""Evolution strategies: the oracle, shaping, parts of populations, and what cannot be."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zoopt
from tests.compare import same
from tests.meter import peak_bytes
from tests.optimizer_table import PERTURBATIONS, SHAPINGS, closure_of, mlp
from tests.reference import evolution_float64 as oracle
from zoopt import kernels, noise
from zoopt.zeroth_order.engine import noise as engine_noise
from zoopt.zeroth_order.engine.population import shaped

SEED = 7


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("options", [{"distribution": "rademacher"}, {"rank": 3}], ids=str)
def test_other_shapes_and_signs_equal_the_oracle(options: dict, perturbation: str) -> None:
    """Four dimensions, a rank above the short side, one and no dimensions; and signs."""
    generate = noise.rademacher if "distribution" in options else noise.normal

    def normals(name: str, draw: int, start: int, count: int) -> np.ndarray:
        key = {"seed": SEED, "stream": noise.stream(name), "draw": draw, "offset": start}
        return generate(count, **key).double().numpy()

    shapes = {"image": (2, 3, 2, 2), "wide": (2, 9), "vector": (5,), "number": ()}
    params = {
        name: nn.Parameter(torch.ones(shape, dtype=torch.float64)) for name, shape in shapes.items()
    }
    theta = {name: np.ones(shape) for name, shape in shapes.items()}
    settings = {"lr": 0.1, "sigma": 0.05, "population_size": 8}
    reference = oracle.EvolutionStrategy64(normals=normals, rank=options.get("rank"), **settings)
    optimizer = zoopt.EvolutionStrategy(
        params.items(), seed=SEED, perturbation=perturbation, **settings, **options
    )
    for _ in range(5):
        theta = reference.step(
            lambda at: -float(sum(((w - 0.3) ** 2).sum() for w in at.values())), theta
        )
        optimizer.step(lambda: -sum((w - 0.3).square().sum() for w in params.values()))
    for name, param in params.items():
        assert np.abs(param.detach().numpy() - theta[name]).max() <= 1e-12


@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=24),
    st.sampled_from(SHAPINGS),
    st.sampled_from([0.25, 8.0]),
    st.integers(-1000, 1000),
)
def test_shaping_has_no_scale(values: list[int], shaping: str, scale: float, shift: int) -> None:
    """It adds up to zero, affine maps do not matter (these are exact), and negation negates."""
    values = values[: len(values) // 2 * 2]
    weights = shaped(values, shaping)
    # Integers up to 1000 less their mean, over a spread of at least 1 / N, in 24 terms.
    tolerance = 24 * 24 * 1000 * 2.0**-52
    assert abs(math.fsum(weights)) <= tolerance
    assert weights == pytest.approx(oracle.shaped(np.array(values, float), shaping), abs=tolerance)
    moved = shaped([scale * value + shift for value in values], shaping)
    assert moved == pytest.approx(weights, abs=tolerance * (1 + abs(shift)))
    negated = shaped([-scale * value + shift for value in values], shaping)
    assert negated == pytest.approx([-w for w in weights], abs=tolerance * (1 + abs(shift)))
    for a, b, v, w in zip(values, values[1:], weights, weights[1:], strict=False):
        assert shaping == "pair-sign" or a == b or (a < b) == (v < w)


@pytest.mark.parametrize("shaping", ["zscore", "rank"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_shaping_of_the_finite_ones(shaping: str, bad: float) -> None:
    alone = shaped([3.0, 1.0, 2.0], shaping)
    assert shaped([3.0, bad, 1.0, 2.0, bad], shaping) == (alone[0], 0.0, alone[1], alone[2], 0.0)
    assert shaped([bad, 1.0, bad], shaping) == (0.0,) * 3
    assert shaped([bad] * 2, shaping) == (0.0,) * 2


def test_shaping_of_extremes() -> None:
    for shaping in SHAPINGS:
        assert shaped([5.0] * 4, shaping) == (0.0,) * 4
        assert all(map(math.isfinite, shaped([1e308, -1e308, 1e300, 0.0], shaping)))
        assert max(shaped([1e-320, 0.0, 1e-322, 0.0], shaping)) > 0
    assert shaped([2.0, 1.0, math.nan, 3.0, 1.0, 2.0], "pair-sign") == (1, -1, 0, 0, -1, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 1}, {"rank": 2, "antithetic": False}, {"distribution": "rademacher"}],
    ids=str,
)
def test_the_estimate_is_unbiased(options: dict) -> None:
    """On a quadratic, ghat std(f) / sigma has the gradient as its expectation: 4 standard errors.

    E[f(theta + sigma z) z] / sigma is the gradient exactly: z has unit covariance, is even, and
    f's terms of even order drop out.
    """
    generator = torch.Generator().manual_seed(3)
    start, curvature = (torch.rand(3, 5, generator=generator) + 0.2 for _ in range(2))
    weight = nn.Parameter(start.clone())
    sigma, size = 0.1, 8
    optimizer = zoopt.EvolutionStrategy(
        [weight], 1.0, sigma=sigma, population_size=size, perturbation="virtual", seed=1, **options
    )
    estimates = []
    for _ in range(1500):
        optimizer.step(lambda: 0.5 * (curvature * weight.square()).double().sum())
        fitness = torch.tensor(optimizer.last_step.fitness, dtype=torch.float64)
        ghat = (weight.detach().double() - start) * fitness.std(correction=0) / sigma
        if options.get("antithetic") is False:
            # Less the mean of f, itself a part of it, N members count as N - 1.
            ghat *= size / (size - 1)
        estimates.append(ghat)
        with torch.no_grad():
            weight.copy_(start)
    samples = torch.stack(estimates)
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - curvature * start).abs() <= 4 * error).all()
    assert (error < 0.2 * (curvature * start).abs().max()).all()


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("rank", [None, 2])
def test_parts_of_a_population_make_the_whole(rank: int | None, perturbation: str) -> None:
    """Three processes' shares, in any order: the same fitnesses, and the step's own update."""
    options = {"sigma": 1e-2, "population_size": 8, "rank": rank, "seed": 2}
    whole, parts = mlp(torch.float64), mlp(torch.float64)
    one, many = (
        zoopt.EvolutionStrategy(m.named_parameters(), 1e-2, perturbation=perturbation, **options)
        for m in (whole, parts)
    )
    for generation in range(3):
        mean = one.step(closure_of(whole, torch.float64))
        before = str(many.state_dict())
        gathered: dict[int, float] = {}
        for process in (2, 0, 1):
            share = many.evaluate(closure_of(parts, torch.float64), range(process, 8, 3))
            assert list(share) == list(range(process, 8, 3))
            gathered |= share
        assert str(many.state_dict()) == before
        in_order = [gathered[i] for i in range(8)]
        forms = (gathered, in_order, torch.tensor(in_order, dtype=torch.float64))
        assert many.update(forms[generation]) == pytest.approx(mean, abs=1e-12)
        assert many.last_step.step == generation + 1
        exact = perturbation == "virtual"
        assert one.last_step.fitness == pytest.approx(tuple(in_order), abs=0 if exact else 1e-12)
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            assert (p - q).abs().max() <= (0 if exact else 1e-12)
    assert many.evaluate(closure_of(parts, torch.float64), []) == {}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_members_stand_where_they_say(perturbation: str) -> None:
    """Each is evaluated once, at theta + sigma z or theta - sigma z, under one RNG state."""
    model = mlp()
    optimizer = zoopt.EvolutionStrategy(
        model.named_parameters(), sigma=0.1, population_size=4, seed=3, perturbation=perturbation
    )
    closure, seen = closure_of(model), []

    def evaluate() -> torch.Tensor:
        seen.append(torch.rand(3))
        return closure()

    torch.manual_seed(1)
    torch.rand(3)
    after_one = torch.get_rng_state()
    torch.manual_seed(1)
    optimizer.step(evaluate)
    assert len(seen) == 4
    assert all(torch.equal(draw, seen[0]) for draw in seen)
    assert torch.equal(torch.get_rng_state(), after_one)
    assert optimizer.last_step.draws == (0, 1)
    assert [group["draw"] for group in optimizer.param_groups] == [2]
    for member, fitness in enumerate(optimizer.last_step.fitness):
        by_hand = mlp()
        with torch.no_grad():
            for name, param in by_hand.named_parameters():
                key = kernels.NoiseKey(3, noise.stream(name))
                scale = 0.1 * (-1) ** member
                kernels.perturb(param, scale, key=key, draw=member // 2, out=param)
        # In place, what is added and taken away again leaves a rounding.
        exact = 0.0 if perturbation == "virtual" else 1e-5
        assert abs(closure_of(by_hand)().item() - fitness) <= exact * abs(fitness)


def test_one_pass_adds_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(theta: torch.Tensor, coefficients: list[float], **options: Any) -> torch.Tensor:
        calls.append((theta.numel(), options["draws"]))
        return kernels.apply_(theta, coefficients, **options)

    model = mlp()
    optimizer = zoopt.EvolutionStrategy(model.named_parameters(), population_size=12, seed=1)
    fitness = optimizer.evaluate(closure_of(model))
    monkeypatch.setattr(engine_noise, "apply_", spy)
    optimizer.update(fitness)
    assert calls == [(param.numel(), list(range(6))) for param in model.parameters()]


def test_low_rank_members_make_no_matrix() -> None:
    """Neither while they are evaluated nor in the update, which is one product in place."""
    model = nn.Linear(1000, 1200, bias=False)
    x = torch.randn(4, 1000)
    optimizer = zoopt.EvolutionStrategy(model.parameters(), population_size=10, rank=1, seed=1)
    optimizer.step(lambda: model(x).square().mean())
    peak = peak_bytes(lambda: optimizer.step(lambda: model(x).square().mean()), model.parameters())
    # Five draws' vectors, as they are made and side by side, a few times over.
    assert peak <= 8 * 5 * (1000 + 1200) * 4
    assert peak < model.weight.nbytes / 10


def test_a_fitness_that_is_not_finite_is_left_out() -> None:
    results = []
    for shaping, kept in (("zscore", [0, 2, 3]), ("pair-sign", [2, 3])):
        weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer = zoopt.EvolutionStrategy(
            [weight], 0.5, sigma=0.1, population_size=4, shaping=shaping, seed=1, weight_decay=0.1
        )
        values = iter([1.0, math.nan, 3.0, 0.5])
        with pytest.warns(UserWarning, match="left out 1 of 4 members because a fitness") as seen:
            optimizer.step(lambda values=values: next(values))
        assert seen[0].filename == __file__
        record = optimizer.last_step
        assert record.skipped == optimizer.skipped_probes == 1
        assert math.isnan(record.fitness[1])
        expected = torch.zeros(5, dtype=torch.float64)
        chosen = shaped([(1.0, math.nan, 3.0, 0.5)[i] for i in kept], shaping)
        for i, w in zip(kept, chosen, strict=True):
            z = noise.normal(5, seed=1, stream=0, draw=i // 2).double()
            expected += 0.5 / 4 * w * (-1) ** i * z
        assert (weight.detach() - expected).abs().max() <= 1e-9
        results.append(record.shaped)
    assert results[0][1] == 0.0
    assert results[1] == (0.0, 0.0, 1.0, -1.0)


def test_a_population_without_fitness_changes_nothing() -> None:
    model = mlp()
    before = copy.deepcopy(model)
    optimizer = zoopt.EvolutionStrategy(
        model.parameters(), 0.5, population_size=4, perturbation="virtual", weight_decay=0.5, seed=1
    )
    with pytest.warns(UserWarning, match="left out 4 of 4 members"):
        optimizer.update([math.nan, math.inf, -math.inf, math.nan])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: closure_of(model)() * math.nan)
    assert same(model, before)
    assert optimizer.skipped_probes == 8
    assert optimizer.param_groups[0]["draw"] == 4
    # The same fitness for all says nothing, but it decays.
    optimizer.update([2.0] * 4)
    assert not same(model, before)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_micro_batches_add_up(perturbation: str) -> None:
    models = [mlp(torch.float64), mlp(torch.float64)]
    whole, parts = (
        zoopt.EvolutionStrategy(
            m.parameters(), 1e-2, sigma=0.1, population_size=6, seed=5, perturbation=perturbation
        )
        for m in models
    )
    x = torch.randn(64, 6, dtype=torch.float64)
    whole.step(lambda: models[0](x).square().sum())
    for part in x.chunk(4):
        parts.probe(lambda part=part: models[1](part).square().sum())
    with pytest.raises(RuntimeError, match="while probes are pending"):
        parts.update([0.0] * 6)
    parts.step()
    assert parts.last_step.fitness == pytest.approx(whole.last_step.fitness, rel=1e-12)
    assert len(parts.last_step.losses) == 4 * 6
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p - q).abs().max() <= 1e-11
    # One micro-batch that fails takes its member out for good.
    for value in (1.0, math.nan, 1.0):
        factors = iter([1.0, 1.0, value, 1.0, 1.0, 1.0])
        parts.probe(lambda factors=factors: models[1](x).sum() * next(factors))
    with pytest.warns(UserWarning, match="left out 1 of 6"):
        parts.step()
    assert parts.last_step.shaped[2] == 0.0


def test_groups_have_their_own_numbers() -> None:
    """Per-group lr, sigma and rank; the fitness is one for all."""
    a, b = (nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2))
    groups = [
        {"params": [("a", a)], "lr": 0.1, "sigma": 0.2},
        {"params": [("b", b)], "lr": 0.3, "sigma": 0.4, "rank": 1, "weight_decay": 0.5},
    ]
    optimizer = zoopt.EvolutionStrategy(groups, population_size=2, shaping="pair-sign", seed=4)
    optimizer.step(lambda: a.sum() + b.sum())
    key = {"seed": 4, "draw": 0}
    z = noise.normal(12, stream=noise.stream("a"), **key).double().view(4, 3)
    both = noise.normal(7, stream=noise.stream("b"), **key).double()
    outer = both[:4, None] * both[None, 4:]
    slope = float(0.2 * z.sum() + 0.4 * outer.sum())
    assert optimizer.last_step.fitness == pytest.approx((24 + slope, 24 - slope), abs=1e-12)
    assert (a - (1 + 0.1 * math.copysign(1.0, slope) * z)).abs().max() <= 1e-12
    assert (b - (1 - 0.3 * 0.5 + 0.3 * math.copysign(1.0, slope) * outer)).abs().max() <= 1e-12


def test_added_groups_join_the_run() -> None:
    model = mlp()
    optimizer = zoopt.EvolutionStrategy(model[0].parameters(), population_size=4, seed=6)
    optimizer.step(closure_of(model))
    optimizer.param_groups[0]["population_size"] = 6
    optimizer.add_param_group({"params": list(model[3].parameters()), "sigma": 0.5})
    assert optimizer.param_groups[1]["draw"] == 2
    assert optimizer.param_groups[1]["population_size"] == 6
    before = copy.deepcopy(model[3])
    optimizer.step(closure_of(model))
    assert len(optimizer.last_step.fitness) == 6
    assert not same(model[3], before)
    for key, value in (("population_size", 8), ("shaping", "rank"), ("antithetic", False)):
        with pytest.raises(ValueError, match=f"{key} must be the same in every param group"):
            optimizer.add_param_group({"params": list(model[2].parameters()), key: value})
    assert len(optimizer.param_groups) == 2


INVALID = [
    ({"sigma": 0.0}, ValueError, "sigma must be a finite number > 0, got 0.0"),
    ({"lr": math.nan}, ValueError, "lr must be a finite number >= 0, got nan"),
    ({"population_size": 1}, ValueError, "population_size must be at least 2, got 1"),
    ({"population_size": 2.0}, TypeError, "population_size must be a positive int, got 2.0"),
    ({"population_size": 5}, ValueError, "must be even with antithetic=True, got 5: .* make it 6"),
    ({"rank": 0}, ValueError, "rank must be a positive int, got 0"),
    ({"rank": True}, TypeError, "rank must be a positive int, got True"),
    ({"shaping": "none"}, ValueError, "shaping must be one of 'zscore', 'rank', 'pair-sign', got"),
    (
        {"shaping": "pair-sign", "antithetic": False},
        ValueError,
        "antithetic must be True with shaping='pair-sign'",
    ),
    ({"antithetic": 1}, TypeError, "antithetic must be a bool, got 1"),
    (
        {"rank": 1, "distribution": "rademacher"},
        ValueError,
        "distribution must be 'normal' with a rank, got 'rademacher'",
    ),
    ({"maximize": "yes"}, TypeError, "maximize must be a bool, got 'yes'"),
]


@pytest.mark.parametrize(("options", "error", "message"), INVALID)
def test_constructor_errors(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        zoopt.EvolutionStrategy(mlp().parameters(), **options)
    with pytest.raises(error, match=message):
        zoopt.EvolutionStrategy([{"params": mlp().parameters(), **options}])


def of_update(fitness: Any) -> Callable[[zoopt.EvolutionStrategy], Any]:
    return lambda optimizer: optimizer.update(fitness)


def of_members(members: Any) -> Callable[[zoopt.EvolutionStrategy], Any]:
    return lambda optimizer: optimizer.evaluate(lambda: 1.0, members)


CALLS = [
    (of_update({0: 1.0, 2: 1.0}), ValueError, r"each member, 0 to 3, .* got none for 1, 3; gather"),
    (of_update(dict.fromkeys(range(9), 1.0)), ValueError, "got some for 4, 5, 6, 7, 8;"),
    (of_update({0: 1.0, 1: 1.0, 2: 1.0, "3": 1.0}), ValueError, "none for 3 and some for '3'"),
    (of_update([1.0] * 3), ValueError, "got none for 3"),
    (of_update(torch.ones(5)), ValueError, "got some for 4"),
    (
        of_update([1.0, 1.0, None, 1.0]),
        TypeError,
        r"fitness\[2\] must be one real number, got None",
    ),
    (of_update(torch.ones(4, 2)), TypeError, r"fitness\[0\] must be one real number, got \[1.0, 1"),
    (of_update(torch.tensor(1.0)), TypeError, "a mapping from members to .* got float"),
    (of_update("1234"), TypeError, "fitness must be a mapping .* got str"),
    (of_members([0, 4]), ValueError, r"distinct numbers in \[0, 4\), .* got \[0, 4\]"),
    (of_members([1, 1]), ValueError, "members must be distinct numbers"),
    (of_members([0.5]), TypeError, r"members must be the numbers of members, range\(4\) for all"),
    (of_members(3), TypeError, "members must be the numbers of members, .* got 3"),
    (lambda opt: opt.evaluate(None), TypeError, "evaluate needs a closure"),
    (lambda opt: opt.evaluate(lambda: None), TypeError, "got NoneType; end it with"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_calls_that_cannot_be(call: Callable, error: type[Exception], message: str) -> None:
    model = mlp()
    before = copy.deepcopy(model)
    # Nothing reads the model here, which only in-place perturbation can bear.
    optimizer = zoopt.EvolutionStrategy(
        model.parameters(), population_size=4, seed=1, perturbation="inplace"
    )
    state = str(optimizer.state_dict())
    with pytest.raises(error, match=message):
        call(optimizer)
    assert str(optimizer.state_dict()) == state
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert (p - q).abs().max() <= 2 * 2.0**-24 * 2
    assert optimizer.last_step is None


@pytest.mark.parametrize("rank", [None, 1])
def test_a_discrete_fitness_is_learned(rank: int | None) -> None:
    """Accuracy, which has no gradient."""
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    x = torch.cat((x, -x))  # as many of one class as of the other
    targets = (x[:, 0] > x[:, 1]).long()
    model = mlp()
    optimizer = zoopt.EvolutionStrategy(
        model.named_parameters(), 0.1, sigma=0.2, population_size=20, rank=rank, seed=0
    )

    def accuracy() -> float:
        return (model(x).argmax(1) == targets).float().mean().item()

    assert accuracy() < 0.5
    for _ in range(80):
        optimizer.step(accuracy)
    assert accuracy() > 0.95


def narrow(model: nn.Module, members: int | None = None) -> Callable[[], Any]:
    """Fitnesses around 3 in bfloat16, whose spacing hides what a perturbation changes."""
    x = torch.ones(members or 1, 6)

    def fitness() -> Any:
        values = 3.0 + 1e-4 * model(x).sum(1)
        return (values if members else values.sum()).bfloat16()

    return fitness


PARTS: dict[str, Callable[[zoopt.EvolutionStrategy, nn.Module], Any]] = {
    "evaluate": lambda opt, model: opt.evaluate(narrow(model)),
    "batched": lambda opt, model: opt.evaluate_batched(narrow(model, 8)),
    "one by one": lambda opt, model: opt.update(
        {i: f for j in range(8) for i, f in opt.evaluate(narrow(model), [j]).items()}
    ),
    "tensor": lambda opt, model: opt.update(torch.full((8,), 3.0, dtype=torch.bfloat16)),
    "tensors": lambda opt, model: opt.update(list(torch.full((8,), 3.0, dtype=torch.float16))),
    "numpy": lambda opt, model: opt.update(list(np.full(8, 3.0, dtype=np.float16))),
}


@pytest.mark.parametrize("way", PARTS)
def test_fitnesses_of_16_bits_are_warned_of_however_they_come(way: str) -> None:
    model = mlp()
    optimizer = zoopt.EvolutionStrategy(
        model.named_parameters(), population_size=8, rank=1, sigma=1e-3, seed=1
    )
    with pytest.warns(UserWarning, match="compute the fitness in float32.*raise sigma") as caught:
        PARTS[way](optimizer, model)
    assert [warning.filename for warning in caught] == [__file__]
    PARTS[way](optimizer, model)


def test_fitnesses_of_16_bits_that_differ_are_not_warned_of() -> None:
    optimizer = zoopt.EvolutionStrategy(mlp().parameters(), population_size=8, seed=1)
    for values in (torch.arange(8.0).bfloat16(), torch.zeros(8, dtype=torch.bfloat16), [3.0] * 8):
        optimizer.update(values)
