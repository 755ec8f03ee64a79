"""What torch expects of an optimizer, of the first-order ones."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from tests.first_order_table import ROWS as TABLE
from tests.first_order_table import Row, backward, batch, net

FORMATS = ("AdamW bfloat16", "AdamW int8", "AdamW int4", "GaLoreAdamW int8", "GaLoreAdamW int4")
#: One row of each class, and each format of a moment.
ROWS = list({row.cls: row for row in reversed(TABLE)}.values())
ROWS += [row for row in TABLE if row.name in FORMATS and row not in ROWS]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(bits(p), bits(q)) for p, q in pairs)


def equal(first: Any, second: Any) -> bool:
    """Whether two state dicts agree to the bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(bits(first), bits(second))
    return bool(first == second)


def go_on(model: nn.Module, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()


def build(row: Row, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    model = net(dtype)
    return model, row.build(model, **options)


SCHEDULED = ("AdamW", "GaLoreAdamW", "LDAdamW")
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=4),
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=5),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-2, step_size_up=2),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("row", [r for r in ROWS if r.cls.__name__ in SCHEDULED], ids=str)
def test_each_step_uses_what_the_scheduler_set(row: Row, name: str, tensor_lr: bool) -> None:
    """As an optimizer does whose groups are set by hand. OneCycleLR and CyclicLR turn betas too."""
    start = torch.tensor(2.0**-7) if tensor_lr else 2.0**-7
    (model, scheduled), (twin, other) = build(row, lr=start), build(row, lr=0.5)
    scheduler = SCHEDULERS[name](scheduled)
    seen = set()
    for step in range(4):
        for group, own in zip(scheduled.param_groups, other.param_groups, strict=True):
            assert isinstance(group["lr"], Tensor) == tensor_lr
            own["lr"] = float(group["lr"])
            if "betas" in group:
                own["betas"] = tuple(group["betas"])
            seen.add((own["lr"], own.get("betas")))
        go_on(model, scheduled)
        go_on(twin, other)
        assert same(model, twin)
        scheduler.step(*([float(step)] if name == "plateau" else []))
    assert len(seen) > 1


@every_row
def test_groups_added_later_join_the_run(row: Row) -> None:
    model, whole = build(row)
    twin = net()
    named = list(twin.named_parameters())
    grown = row.cls(named[:3], **row.options)  # type: ignore[call-arg]
    grown.add_param_group({"params": named[3:]})
    for _ in range(3):
        go_on(model, whole)
        go_on(twin, grown)
    assert same(model, twin)
    with pytest.raises(ValueError, match="seed must be the same in every param group"):
        grown.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))], "seed": 1})
    assert len(grown.param_groups) == 2


@every_row
def test_groups_have_their_own_hyperparameters(row: Row) -> None:
    model = net()
    named = list(model.named_parameters())
    groups = [{"params": named[:3], "lr": 0.0, "weight_decay": 0.0}, {"params": named[3:]}]
    optimizer = row.cls(groups, **row.options)  # type: ignore[call-arg]
    go_on(model, optimizer, 2)
    moved = [
        not torch.equal(p, q) for p, q in zip(model.parameters(), net().parameters(), strict=True)
    ]
    assert moved == [False] * 3 + [True] * (len(named) - 3)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@every_row
def test_copies_go_on_like_the_original(row: Row, way: str) -> None:
    pair = build(row)
    model, optimizer = pair
    go_on(model, optimizer, 2)
    model.zero_grad()
    twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert repr(other) == repr(optimizer)
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    go_on(model, optimizer, 2)
    go_on(twin, other, 2)
    assert same(model, twin)
    assert equal(optimizer.state_dict(), other.state_dict())


@every_row
def test_hooks_run_around_steps_and_state_dicts(row: Row) -> None:
    model, optimizer = build(row)
    events: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    optimizer.register_step_post_hook(lambda *_: events.append("after"))
    optimizer.register_state_dict_pre_hook(lambda _: events.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    go_on(model, optimizer)
    assert events == ["before", "after"]
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    assert events[2:] == ["saving"]
    _, fresh = build(row)

    def halve_lr(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    fresh.register_load_state_dict_pre_hook(halve_lr)
    fresh.register_load_state_dict_post_hook(lambda opt: events.append(str(len(opt.state))))
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] / 2
    assert events[3:] == [str(len(optimizer.state))]


@every_row
def test_a_closure_is_evaluated_once_with_gradients_on(row: Row) -> None:
    (model, optimizer), (twin, other) = build(row), build(row)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        return backward(model)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss) == float(backward(twin))
    other.step()
    assert calls == [1]
    assert same(model, twin)


class Odd(nn.Module):
    """Parameters of unusual shapes and layouts."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        matrix = torch.randn(24, 40, generator=generator)
        image = torch.randn(6, 4, 3, 3, generator=generator)
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.matrix = nn.Parameter(matrix if dense else matrix.t().contiguous().t())
        strided = torch.zeros(6, 8, 3, 3)
        strided[:, ::2] = image
        self.image = nn.Parameter(image if dense else strided[:, ::2])
        self.last = nn.Parameter(
            image.clone() if dense else image.to(memory_format=torch.channels_last)
        )

    def loss(self) -> Tensor:
        return sum((p.sin().square().sum() for p in self.parameters()), torch.zeros(()))


@every_row
def test_odd_shapes_and_layouts_are_those_of_dense_tensors(row: Row) -> None:
    """Elements are counted in row-major order of their indices, whatever the strides.

    Sums over a strided gradient may be made in another order: float32 to 3e-6 after two steps.
    """
    models = [Odd(True), Odd(False)]
    assert not models[1].matrix.is_contiguous()
    for model in models:
        optimizer = row.build(model)
        for _ in range(2):
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
        assert model.scalar.item() != 1.5
    strides = [p.stride() for p in Odd(False).parameters()]
    assert [p.stride() for p in models[1].parameters()] == strides
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=3e-6)


@every_row
def test_mixed_dtypes_and_the_default_dtype(row: Row) -> None:
    """A model in float64 and bfloat16; torch's default dtype changes no state."""
    torch.set_default_dtype(torch.float64)
    try:
        model = net()
        for i, param in enumerate(model.parameters()):
            param.data = param.data.to((torch.float64, torch.float32, torch.bfloat16)[i % 3])
        optimizer = row.build(model)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert param.isfinite().all()
            for name, spec in optimizer.declared_state(param, group).items():
                assert optimizer.state[param][name].dtype == spec.dtype


class Tied(nn.Module):
    """A matrix, and some of its rows as another parameter."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        values = torch.linspace(-1.0, 1.0, 48).view(6, 8).clone()
        self.whole = nn.Parameter(values)
        if parts:
            self.rows = nn.Parameter(values[1:3])
            self.first = nn.Parameter(values[0])


@every_row
def test_parameters_that_share_some_memory_step_in_turn(row: Row) -> None:
    """As in torch. Gradients of 0 for parts of another parameter change nothing."""
    models = [Tied(parts) for parts in (True, False)]
    for model in models:
        optimizer = row.build(model, weight_decay=0.0)
        for step in range(3):
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            model.whole.grad = torch.linspace(-1.0, 2.0, 48).view(6, 8) + step
            optimizer.step()
    assert torch.equal(models[0].whole, models[1].whole)
    assert not torch.equal(models[0].whole, Tied(parts=False).whole)


@every_row
def test_zero_gradients_change_nothing_without_decay(row: Row) -> None:
    model, optimizer = build(row, weight_decay=0.0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert same(model, net())


@every_row
def test_a_gradient_scaler_unscales_and_skips(row: Row) -> None:
    """Scaled by powers of two: the same bits. A step with an infinite gradient is left out."""
    (model, optimizer), (twin, other) = build(row), build(row)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        x, y = batch()
        for m in (model, twin):
            m.zero_grad()
        loss = (model(x) - y).square().mean()
        scaler.scale(loss * (math.inf if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            (twin(x) - y).square().mean().backward()
            other.step()
    assert same(model, twin)


@every_row
def test_state_dicts_are_deterministic_and_carry_names(row: Row) -> None:
    states = []
    for _ in range(2):
        model, optimizer = build(row)
        go_on(model, optimizer, 2)
        states.append(optimizer.state_dict())
    assert equal(*states)
    assert pickle.dumps([s["param_groups"] for s in states[:1]]) == pickle.dumps(
        [s["param_groups"] for s in states[1:]]
    )
    [group] = states[0]["param_groups"]
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    assert group["shapes"] == [list(param.shape) for param in model.parameters()]


@DTYPES
@every_row
def test_distributed_checkpoints_leave_no_trace(row: Row, dtype: torch.dtype) -> None:
    """State is made, in order to have its form, but no step is counted."""
    (model, optimizer), (twin, other) = build(row, dtype), build(row, dtype)
    record = get_optimizer_state_dict(model, optimizer)
    assert record["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]
    assert same(model, twin)
    go_on(model, optimizer, 2)
    go_on(twin, other, 2)
    assert same(model, twin)
    assert equal(optimizer.state_dict(), other.state_dict())


@DTYPES
@every_row
@pytest.mark.filterwarnings("ignore:.*process group.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
def test_distributed_checkpoints_restore_every_bit(
    row: Row, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In both of torch's forms, nested and flat."""
    flatten = dtype == torch.bfloat16
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = build(row, dtype)
    go_on(model, optimizer, 3)
    record = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"model": model.state_dict(), "optimizer": record}, checkpoint_id=tmp_path)

    twin, other = build(row, dtype, seed=99, lr=0.5)
    empty = get_optimizer_state_dict(twin, other, options=options)
    loaded = {"model": twin.state_dict(), "optimizer": empty}
    dcp.load(loaded, checkpoint_id=tmp_path)
    twin.load_state_dict(loaded["model"])
    set_optimizer_state_dict(twin, other, loaded["optimizer"], options=options)
    assert equal(other.state_dict()["state"], optimizer.state_dict()["state"])
    go_on(model, optimizer, 3)
    go_on(twin, other, 3)
    assert same(model, twin)
    assert equal(other.state_dict(), optimizer.state_dict())
