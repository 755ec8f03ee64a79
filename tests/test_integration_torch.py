"""What torch does with optimizers: schedulers, hooks, copies, distributed checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import zoopt
from tests.compare import same
from zoopt.noise import stream

SEED = 7


def build(**options: Any) -> tuple[nn.Module, zoopt.MeZO, Callable[[nn.Module], Tensor]]:
    """A model, its optimizer and the loss of such a model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(16, 4)
    options = {"lr": 1e-2, "seed": SEED, **options}
    return model, zoopt.MeZO(model.named_parameters(), **options), lambda m: m(x).square().mean()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "window": {"momentum": 0.9, "momentum_window": 2},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "linear": lambda opt: lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=4),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=4),
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.1, total_steps=5, cycle_momentum=False
    ),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_step_uses_the_schedulers_lr(name: str, tensor_lr: bool) -> None:
    lr: Any = torch.tensor(1e-2) if tensor_lr else 1e-2
    model, opt, loss = build(lr=lr, perturbation="virtual")
    scheduler = SCHEDULERS[name](opt)
    rates = []
    for draw in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        rates.append(float(scheduler.get_last_lr()[0]))
        opt.step(lambda: loss(model))
        scheduler.step()
        assert opt.last_step is not None
        [g] = opt.last_step.projected_grads
        for n, param in model.named_parameters():
            key = zoopt.kernels.NoiseKey(SEED, stream(n))
            moved = zoopt.kernels.perturb(before[n], -rates[-1] * g, key=key, draw=draw)
            assert torch.equal(param, moved)
    assert len(set(rates)) > 1


def test_one_cycle_drives_the_momentum_too() -> None:
    model, opt, loss = build(lr=1e-3, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=5)
    used = []
    for _ in range(4):
        used.append((float(opt.param_groups[0]["lr"]), opt.param_groups[0]["momentum"]))
        twin, other = copy.deepcopy(model), None
        other = zoopt.MeZO(twin.named_parameters(), lr=used[-1][0], momentum=used[-1][1])
        other.load_state_dict(opt.state_dict())
        opt.step(lambda: loss(model))
        other.step(lambda twin=twin: loss(twin))
        assert same(model, twin)
        scheduler.step()
    assert len(set(used)) == 4
    assert opt.state_dict()["state"][0]["momentum_buffer"].abs().sum() > 0


def test_reduce_on_plateau_lowers_the_lr() -> None:
    model, opt, loss = build()
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    for value in (1.0, 2.0, 3.0):
        opt.step(lambda: loss(model))
        scheduler.step(value)
    assert opt.param_groups[0]["lr"] == 1e-2 / 4


def test_step_hooks_run_around_the_step_and_see_the_closure() -> None:
    model, opt, loss = build()
    events: list[Any] = []

    def closure() -> Tensor:
        events.append("closure")
        return loss(model)

    opt.register_step_pre_hook(lambda o, args, kwargs: events.append((o, args, kwargs)))
    opt.register_step_post_hook(lambda o, _args, _kw: events.append(o.param_groups[0]["step"]))
    value = opt.step(closure)
    first, *rest = events
    assert rest == ["closure", "closure", "closure", 1]  # the run's first is repeated
    assert first[0] is opt
    assert closure in (*first[1], *first[2].values())
    assert isinstance(value, float)


def test_a_step_pre_hook_can_wrap_the_closure() -> None:
    model, opt, loss = build()
    twin, other, _ = build(maximize=True)
    opt.register_step_pre_hook(lambda _o, args, kwargs: ((args[0], lambda: -args[1]()), kwargs))
    opt.step(lambda: loss(model))
    other.step(lambda: loss(twin))
    assert same(model, twin)


def test_state_dict_hooks_run_and_are_honoured() -> None:
    _, opt, _ = build()
    events = []
    opt.register_state_dict_pre_hook(lambda _o: events.append("before"))
    opt.register_state_dict_post_hook(lambda _o, state: {**state, "extra": len(events)})
    assert opt.state_dict()["extra"] == 1


@every_option
def test_load_state_dict_hooks_run_and_are_honoured(options: dict[str, Any]) -> None:
    model, opt, loss = build(**options)
    opt.step(lambda: loss(model))
    saved = opt.state_dict()
    intact = copy.deepcopy(saved)
    _, fresh, _ = build(**options)
    events: list[Any] = []

    def halve_lr_and_clear(_opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        events.append("first")
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {"state": {}, "param_groups": groups}

    fresh.register_load_state_dict_pre_hook(halve_lr_and_clear)
    fresh.register_load_state_dict_pre_hook(lambda _o, state: events.append(state["state"]))
    fresh.register_load_state_dict_post_hook(lambda o: events.append(o.param_groups[0]["step"]))
    fresh.load_state_dict(saved)
    assert events == ["first", {}, 1]
    assert fresh.param_groups[0]["lr"] == 5e-3
    assert not fresh.state_dict()["state"]
    assert saved["param_groups"] == intact["param_groups"]
    assert saved["state"].keys() == intact["state"].keys()

    fresh.load_state_dict(intact)  # the hooks are still there, once each
    assert events == ["first", {}, 1] * 2


@every_option
def test_one_checkpoint_can_be_loaded_again_and_again(options: dict[str, Any]) -> None:
    model, opt, loss = build(**options)
    opt.step(lambda: loss(model))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    records = []
    for _ in range(3):
        model.load_state_dict(weights)
        opt.load_state_dict(saved)
        assert opt.state_dict()["param_groups"] == saved["param_groups"]
        opt.step(lambda: loss(model))
        records.append(opt.last_step)
    assert records[0] == records[1] == records[2]


@every_option
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_like_the_original(way: str, options: dict[str, Any]) -> None:
    model, opt, loss = build(**options)
    opt.step(lambda: loss(model))
    pair = (model, opt)
    twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert repr(other) == repr(opt)
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    for _ in range(2):
        assert opt.step(lambda: loss(model)) == other.step(lambda: loss(twin))
    assert other.last_step == opt.last_step
    assert other.skipped_probes == 0
    assert same(model, twin)


@every_option
@pytest.mark.parametrize("steps", [0, 2])
def test_distributed_checkpoints_leave_no_trace(options: dict[str, Any], steps: int) -> None:
    model, opt, loss = build(**options)
    twin, other, _ = build(**options)
    for _ in range(steps):
        opt.step(lambda: loss(model))
        other.step(lambda: loss(twin))
    rng, before = torch.get_rng_state(), copy.deepcopy(opt.state_dict())
    record = get_optimizer_state_dict(model, opt)
    assert torch.equal(torch.get_rng_state(), rng)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert opt.state_dict()["state"].keys() == before["state"].keys()
    assert record["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]
    opt.step(lambda: loss(model))
    other.step(lambda: loss(twin))
    assert opt.last_step == other.last_step
    assert same(model, twin)


@every_option
def test_distributed_checkpoints_restore_a_run(options: dict[str, Any]) -> None:
    model, opt, loss = build(**options)
    for _ in range(2):
        opt.step(lambda: loss(model))
    record = copy.deepcopy(get_optimizer_state_dict(model, opt))
    twin, other, _ = build(**{**options, "seed": 99})
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, record)
    opt.step(lambda: loss(model))
    other.step(lambda: loss(twin))
    assert opt.last_step == other.last_step
    assert same(model, twin)
