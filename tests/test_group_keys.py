"""Keys of param groups: whose they are, over both contract tables, and what keeps them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import zoopt
from tests.test_state_contract import ROWS, advance, begun, bits, build, fresh, refuses
from zoopt.groups import GROUP_KEYS

CLASSES = list({row.cls: row for row in ROWS}.values())
every_class = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)


def hyperparameters() -> dict[str, Any]:
    """Each group key of each class, with a value that it takes there."""
    found: dict[str, Any] = {}
    for row in CLASSES:
        optimizer = build(row, [nn.Parameter(torch.ones(4, 3))], **free(row))
        [group] = optimizer.param_groups
        found |= {key: value for key, value in group.items() if key != "params"}
    return found


def free(row: Any) -> dict[str, Any]:
    """Options that name parameters, taken away."""
    return {key: None for key in ("mask", "blocks") if key in row.options}


HYPERPARAMETERS = hyperparameters()


@every_class
def test_a_key_of_another_class_is_refused_by_its_name(row: Any) -> None:
    _model, optimizer = begun(row, **free(row))
    extra = nn.Parameter(torch.ones(4, 3))
    before, saved = bits(optimizer.state_dict()), optimizer.state_dict()
    foreign = {k: v for k, v in HYPERPARAMETERS.items() if k not in optimizer.defaults}
    assert len(foreign) > 10
    for key, value in (foreign | {"nesterov": False, "alpha": 0.99}).items():
        # The sentence itself, or one that says what to use in its place.
        match = rf"(got '{key}'|{key} must not be among the keys of {row.cls.__name__})"
        with pytest.raises(ValueError, match=match):
            build(row, [{"params": [extra], key: value}], **free(row))
        with pytest.raises(ValueError, match=match):
            optimizer.add_param_group({"params": [("x", extra)], key: value})
        damaged = {**saved, "param_groups": [{**saved["param_groups"][0], key: value}]}
        with pytest.raises(ValueError, match=f"got '{key}'"):
            optimizer.load_state_dict(damaged)
        assert bits(optimizer.state_dict()) == before
    assert not {*optimizer.defaults} & GROUP_KEYS


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 1, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 2]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.StepLR(opt, 2)], [1]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.01, total_steps=9, cycle_momentum=cycles(opt)
    ),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(
        opt, base_lr=1e-4, max_lr=1e-2, step_size_up=2, cycle_momentum=cycles(opt)
    ),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.05),
    "own": lambda opt: Warm(opt),
}


def cycles(optimizer: Any) -> bool:
    """Whether it has a momentum of torch's kind: zeroth-order momentum has its own bounds."""
    return isinstance(optimizer.defaults.get("betas"), tuple)


class Warm(lr_scheduler.LRScheduler):
    """A scheduler of someone's, which keeps what it needs in the groups."""

    def __init__(self, optimizer: Any) -> None:
        for number, group in enumerate(optimizer.param_groups):
            group.setdefault("warm_factor", 0.25 * (number + 1))
            group.setdefault("curve", [0.25, 0.5, 1.0])
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        curve = min(self.last_epoch, 2)
        return [
            base * group["curve"][curve] * group["warm_factor"]
            for base, group in zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        ]


@pytest.mark.filterwarnings("ignore:.*call.*lr_scheduler.step.*before:UserWarning")
@pytest.mark.parametrize(
    ("row", "name"),
    [
        (row, name)
        for row in CLASSES
        for name in SCHEDULERS
        # All of torch's over one class of each family, and those with keys of each kind over all.
        if row.cls in (zoopt.MeZO, zoopt.AdamW) or name in ("OneCycleLR", "own")
    ],
    ids=lambda value: value if isinstance(value, str) else value.cls.__name__,
)
def test_what_a_scheduler_writes_survives_a_checkpoint(row: Any, name: str) -> None:
    """Loaded before the scheduler is made, and after: the run goes on, to the bit."""
    model = fresh(row)
    optimizer = build(row, model.named_parameters())
    scheduler = SCHEDULERS[name](optimizer)

    def go_on(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> None:
        for step in range(steps):
            advance(row, model, optimizer, 1)
            scheduler.step(*([float(step)] if name == "ReduceLROnPlateau" else []))

    go_on(model, optimizer, scheduler, 2)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    weights = copy.deepcopy(model.state_dict())
    saved = torch.load(file, weights_only=name not in ("MultiStepLR", "SequentialLR"))
    go_on(model, optimizer, scheduler, 2)
    for first in (True, False):
        twin = fresh(row)
        twin.load_state_dict(weights)
        other = build(row, twin.named_parameters())
        if first:
            other.load_state_dict(saved[0])
        again = SCHEDULERS[name](other)
        other.load_state_dict(copy.deepcopy(saved[0]))
        again.load_state_dict(copy.deepcopy(saved[1]))
        go_on(twin, other, again, 2)
        assert bits(other.state_dict()) == bits(optimizer.state_dict())
        assert bits(twin.state_dict()) == bits(model.state_dict())


@every_class
def test_what_is_nearly_a_key_is_no_scheduler_of_anyones(row: Any) -> None:
    _model, optimizer = begun(row)
    saved = optimizer.state_dict()
    [group] = saved["param_groups"]
    for key in ("weight_deacy", "weight_decay_", "Weight_Decay", "maximise", "roundings", 3, None):
        refuses(optimizer, {**saved, "param_groups": [{**group, key: 0.1}]}, f"got {key!r}")
    for key in ("lr_mult", "step_size", "warmup", "layer", "min_momentum", "is_expert"):
        optimizer.load_state_dict({**saved, "param_groups": [{**group, key: 0.5}]})
        assert optimizer.param_groups[0][key] == 0.5
        assert copy.deepcopy(optimizer).state_dict()["param_groups"][0][key] == 0.5
        with pytest.raises(ValueError, match=f"got '{key}'"):
            build(row, [{"params": [nn.Parameter(torch.ones(4, 3))], key: 0.5}], **free(row))


def test_a_scheduler_may_be_made_over_both_halves() -> None:
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = zoopt.Hybrid(zoopt.MeZO([early], seed=1), zoopt.AdamW([late], seed=1))
    Warm(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    other = zoopt.Hybrid(zoopt.MeZO([early], seed=1), zoopt.AdamW([late], seed=1))
    other.load_state_dict(saved)
    assert [group["warm_factor"] for group in other.param_groups] == [0.25, 0.5]
