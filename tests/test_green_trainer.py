"""GreenTrainer: the choice against brute force, the count of operations, a run that resumes."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import zoopt
from bench import green_trainer as bench
from zoopt.selection.budget import Cost, backward_costs, choose, in_units

ROOT = Path(__file__).parents[1]


def cost_of(chosen: tuple[int, ...], costs: list[tuple[int, int]]) -> int:
    return sum(reach for reach, _ in costs[: max(chosen) + 1]) + sum(costs[k][1] for k in chosen)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(-1.0, 4.0)),
        min_size=1,
        max_size=9,
    ),
    st.integers(0, 60),
)
def test_the_choice_is_the_best_one(items: list[tuple[int, int, float]], budget: int) -> None:
    """By trying all sets."""
    costs, worth = [item[:2] for item in items], [item[2] for item in items]
    best = max(
        (
            sum(worth[k] for k in chosen)
            for size in range(1, len(items) + 1)
            for chosen in itertools.combinations(range(len(items)), size)
            if cost_of(chosen, costs) <= budget
        ),
        default=0.0,
    )
    chosen = tuple(choose(costs, worth, budget))
    found = sum(worth[k] for k in chosen)
    assert found == pytest.approx(max(best, 0.0), abs=1e-9)
    assert not chosen or cost_of(chosen, costs) <= budget


def test_the_choice_among_twelve() -> None:
    """All 4095 sets of twelve tensors, at every budget of some."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        draw = torch.randint(1, 8, (12, 2), generator=generator).tolist()
        costs = [(reach, own) for reach, own in draw]
        worth = torch.rand(12, generator=generator).tolist()
        sets = [
            (cost_of(chosen, costs), sum(worth[k] for k in chosen))
            for size in range(1, 13)
            for chosen in itertools.combinations(range(12), size)
        ]
        for budget in (7, 25, 50, 75, 90):
            best = max((value for cost, value in sets if cost <= budget), default=0.0)
            assert sum(worth[k] for k in choose(costs, worth, budget)) == pytest.approx(best)


def test_units_never_make_a_set_cheaper() -> None:
    costs = [Cost(7, 3), Cost(0, 5), Cost(11, 0), Cost(2, 9)]
    units = in_units(costs, 10)
    plain = [(cost.reach, cost.own) for cost in costs]
    for size in range(1, 5):
        for chosen in itertools.combinations(range(4), size):
            assert cost_of(chosen, units) * 37 >= cost_of(chosen, plain) * 10


def mlp(widths: tuple[int, ...] = (8, 16, 16, 4)) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for m, n in itertools.pairwise(widths):
        layers += [nn.Linear(m, n), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def loss_of(model: nn.Module, batch: int = 32) -> torch.Tensor:
    width = next(model.parameters()).shape[1]
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(1))
    out = model(x)
    return (out - torch.sin(3 * x[:, : out.shape[1]])).square().mean()


def test_counts_of_operations() -> None:
    """By hand: own 2 t m n of each weight, and the same to reach the one before it; any set costs
    what torch counts where only that set requires gradients."""
    model = mlp()
    params = list(model.parameters())
    order, costs = backward_costs(loss_of(model), params)
    of = dict(zip(order, costs, strict=True))
    assert [of[number].own for number in (4, 2, 0)] == [2 * 32 * s for s in (64, 256, 128)]
    reach = dict.fromkeys(range(6), 0)
    for layer in (2, 1, 0):
        reach[2 * layer] = of[2 * layer].reach + of[2 * layer + 1].reach
    assert [reach[number] for number in (4, 2, 0)] == [0, 2 * 32 * 64, 2 * 32 * 256]
    assert all(of[number].own == 0 for number in (1, 3, 5))
    for chosen in ((4,), (2,), (0,), (0, 4), (0, 2, 4), (2, 3)):
        for number, param in enumerate(params):
            param.requires_grad_(number in chosen)
        loss = loss_of(model)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        places = [place for place, number in enumerate(order) if number in chosen]
        planned = sum(cost.reach for cost in costs[: max(places) + 1])
        planned += sum(costs[place].own for place in places)
        assert counter.get_total_flops() == planned, chosen


def green(model: nn.Module, budget: float, every: int = 4, **options: Any) -> Any:
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2, **options)
    trainer = zoopt.GreenTrainer(
        model, optimizer, lambda: loss_of(model), budget=budget, select_every=every
    )
    return optimizer, trainer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("budget", [0.3, 0.5, 1.0])
def test_only_the_chosen_train_and_cost_what_was_planned(budget: float) -> None:
    model = mlp((16, 64, 64, 64, 8))
    optimizer, trainer = green(model, budget)
    whole = sum(cost.reach + cost.own for cost in trainer.costs)
    losses = []
    for _ in range(12):
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        chosen = {id(param) for param in trainer.chosen}
        assert {id(p) for p in model.parameters() if p.requires_grad} == chosen
        assert trainer.planned_share <= budget
        with FlopCounterMode(display=False) as counter:
            loss = loss_of(model)
            forward = counter.get_total_flops()
            optimizer.zero_grad()
            loss.backward()
        assert (counter.get_total_flops() - forward) / whole == pytest.approx(
            trainer.planned_share, abs=1e-9
        )
        optimizer.step()
        for name, param in model.named_parameters():
            assert torch.equal(param, before[name]) is (id(param) not in chosen), name
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trainer.remove()
    assert all(param.requires_grad for param in model.parameters())
    assert not any(key.startswith("green") for key in optimizer.param_groups[0])


def test_a_choice_changes_nothing_else() -> None:
    """Weights, state, gradients, random numbers and the optimizer's count."""
    model = mlp()
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2)
    for _ in range(3):
        step(model, optimizer)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    gradients = [param.grad.clone() for param in model.parameters()]
    state = str(optimizer.state_dict())
    rng = torch.get_rng_state()
    trainer = zoopt.GreenTrainer(
        model,
        optimizer,
        lambda: loss_of(model) + 0 * torch.rand(()),
        budget=1.0,
    )
    assert torch.equal(torch.get_rng_state(), rng)
    for (name, param), grad in zip(model.named_parameters(), gradients, strict=True):
        assert torch.equal(param, weights[name])
        if param.requires_grad:
            assert torch.equal(param.grad, grad)
    trainer.remove()
    assert str(optimizer.state_dict()) == state


def test_resume_is_exact() -> None:
    whole = mlp()
    optimizer, _ = green(whole, 0.5)
    for number in range(11):
        if number == 6:
            file = io.BytesIO()
            torch.save([whole.state_dict(), optimizer.state_dict()], file)
        step(whole, optimizer)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = mlp()
    resumed.load_state_dict(weights)
    optimizer, trainer = green(resumed, 0.5, every=100)
    optimizer.load_state_dict(state)
    assert trainer._run["green_select_every"] == 4
    for _ in range(5):
        step(resumed, optimizer)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_the_backward_pass_makes_the_products_that_were_planned() -> None:
    """One for each weight that trains, and one for each layer that a gradient passes: none for what
    rests. `python -m bench.green_trainer` measures the time."""
    model = mlp((32,) * 9)
    trainer = green(model, 0.5)[1]
    assert 0.4 < trainer.planned_share <= 0.5
    chosen = {id(param) for param in trainer.chosen}
    places = [
        place
        for place, number in enumerate(trainer.order)
        if id(list(model.parameters())[number]) in chosen
    ]
    planned = sum(trainer.costs[place].own > 0 for place in places)
    planned += sum(cost.reach > 0 for cost in trainer.costs[: max(places) + 1])
    loss = loss_of(model)
    with Products() as products:
        loss.backward()
    assert products.count == planned
    assert [p.grad is not None for p in model.parameters()] == [
        id(p) in chosen for p in model.parameters()
    ]


def test_the_time_of_the_backward_pass_falls_as_planned() -> None:
    """Within 15 %: the committed measurement. A new one makes the same rows."""
    committed = json.loads((ROOT / "bench/results/green_trainer_cpu.json").read_text())["rows"]
    assert {row["model"] for row in committed} == set(bench.MODELS)
    assert len(committed) == len(bench.MODELS) * len(bench.BUDGETS)
    for row in committed:
        assert row["median"] == pytest.approx(row["planned"], rel=0.15), row["name"]
    row = bench.measure(*bench.chain(16, 4, rows=8), 0.5, repeats=3)
    assert row.keys() | {"model"} == committed[0].keys()
    assert row["repeats"] == 3
    assert 0.2 < row["planned"] <= 0.5


def test_refuses() -> None:
    model = mlp()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for optimizer, options, error, message in (
        (adamw, {"budget": 0.0}, ValueError, "budget must be a finite number > 0 and <= 1, got 0"),
        (adamw, {"select_every": 0}, ValueError, "select_every must be a positive int, got 0"),
        (3, {}, TypeError, "optimizer must be a torch optimizer, got int"),
        (adamw, {"probe": 3}, TypeError, "probe must be a function that returns a loss, got int"),
        (
            torch.optim.AdamW([p for p in model.parameters() if p.dim() > 1], lr=1e-2),
            {"budget": 1e-4},
            ValueError,
            r"budget must allow one tensor at least, 0\.\d+ of the backward pass, got 0.0001",
        ),
        (
            torch.optim.AdamW(model.parameters(), lr=0.0),
            {},
            RuntimeError,
            "no parameter is of importance",
        ),
    ):
        with pytest.raises(error, match=message):
            zoopt.GreenTrainer(
                *(model, optimizer),
                **{"probe": lambda: loss_of(model), "budget": 0.5, **options},  # type: ignore[arg-type]
            )
        assert all(param.requires_grad for param in model.parameters())
    for probe, got in (
        (lambda: 0.5, "float"),
        (lambda: loss_of(model).detach(), "one without"),
        (lambda: next(model.parameters()), r"a tensor of shape \(16, 8\)"),
    ):
        with pytest.raises(
            ValueError, match=f"probe must return a loss with a graph .*, got {got}"
        ):
            zoopt.GreenTrainer(model, adamw, probe, budget=0.5)  # type: ignore[arg-type]
    fused = zoopt.AdamW(model.named_parameters())
    with zoopt.fuse_backward(model, fused), pytest.raises(ValueError, match="must not be fused"):
        zoopt.GreenTrainer(model, fused, lambda: loss_of(model), budget=0.5)
    zoopt.GreenTrainer(model, adamw, lambda: loss_of(model), budget=0.5)
    with pytest.raises(ValueError, match="must not be under GreenTrainer yet"):
        zoopt.GreenTrainer(model, adamw, lambda: loss_of(model), budget=0.5)
