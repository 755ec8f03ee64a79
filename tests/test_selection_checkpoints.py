"""torch.distributed.checkpoint and what chooses the parameters that train.

It leaves out state of parameters that do not require a gradient, and of a flattened checkpoint also
what the optimizer has no entry for. A run that is resumed from it is equal to the bit, or refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import zoopt
from tests.test_selection_contract import ROWS, Net, Run, loss_of, same

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*process group.*:UserWarning", "ignore:.*torch.distributed.*:UserWarning"
)
flattened = pytest.mark.parametrize("flatten", [False, True])


def over(build: Callable[[nn.Module], Any], kind: str = "half") -> Callable[[nn.Module, int], Run]:
    """A choice over another optimizer."""

    def run(model: nn.Module, seed: int) -> Run:
        optimizer = build(model)
        if kind == "half":
            handle: Any = zoopt.HalfFineTuning(model, optimizer, round_steps=3, seed=seed)
        else:
            probe = lambda: loss_of(model, 2)  # noqa: E731
            handle = zoopt.GreenTrainer(model, optimizer, probe, budget=0.5, select_every=3)
        return Run(model, optimizer, handle=handle)

    return run


def owlore(model: nn.Module, seed: int) -> Run:
    options: Any = {"rank": 4, "update_proj_gap": 2, "sampling_gap": 3, "num_layers": 1}
    batch = [torch.ones(4, 8)]
    return Run(model, zoopt.OwLore(model, lr=1e-2, calibration=batch, seed=seed, **options))


def sgd(model: nn.Module) -> Any:
    """A zero buffer of momentum is none: the first gradient is not dampened."""
    options = {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    return torch.optim.SGD(model.parameters(), lr=1e-2, **options)


CASES = {
    **{name: row for name, row in ROWS.items() if name != "qes"},  # no torch optimizer
    "half, torch": over(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2)),
    "half, dampened": over(sgd),
    "half, stateless": over(lambda m: torch.optim.SGD(m.parameters(), lr=1e-2)),
    "half, adamax": over(lambda m: torch.optim.Adamax(m.parameters(), lr=1e-2)),
    "half, mezo": over(lambda m: zoopt.MeZO(m.named_parameters(), momentum=0.9, seed=0)),
    "green, dampened": over(sgd, "green"),
    "owlore": owlore,
}


def advance(run: Run, steps: int) -> None:
    for _ in range(steps):
        run.step()
    if hasattr(run.handle, "restore"):  # Its noise is on the weights until the next step.
        run.handle.restore()


def save(run: Run, path: Path, options: StateDictOptions) -> None:
    state = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options)}
    parts = {"model": run.model, "own": run.own}
    state |= {name: part.state_dict() for name, part in parts.items() if part is not None}
    dcp.save(state, checkpoint_id=path)


def load(run: Run, path: Path, options: StateDictOptions) -> None:
    state = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options)}
    parts = {"model": run.model, "own": run.own}
    state |= {name: part.state_dict() for name, part in parts.items() if part is not None}
    dcp.load(state, checkpoint_id=path)
    run.model.load_state_dict(state["model"])
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=options)
    if run.own is not None:
        run.own.load_state_dict(state["own"])


@flattened
@pytest.mark.parametrize("name", CASES)
def test_a_distributed_checkpoint_resumes_to_the_bit(
    name: str, flatten: bool, tmp_path: Path
) -> None:
    """In a round whose parameters are others than the first round's; saving leaves no trace."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    runs = [CASES[name](Net(torch.float32), 3) for _ in range(2)]
    for run in runs:
        advance(run, 7)
    save(runs[0], tmp_path, options)
    for run in runs:
        advance(run, 6)
    assert same(runs[0].model, runs[1].model)
    resumed = CASES[name](Net(torch.float32), 8)
    load(resumed, tmp_path, options)
    advance(resumed, 6)
    assert same(runs[0].model, resumed.model)


@pytest.mark.parametrize(
    "name", ["half fine-tuning", "half, dampened", "green trainer", "owlore", "cofitune"]
)
def test_a_full_state_dict_resumes_to_the_bit(name: str) -> None:
    """torch takes lists in it apart, and puts them together by those of the run that loads it."""
    options = StateDictOptions(full_state_dict=True)
    run, resumed = CASES[name](Net(torch.float32), 3), CASES[name](Net(torch.float32), 8)
    advance(run, 7)
    record = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=options))
    resumed.model.load_state_dict(run.model.state_dict())
    set_optimizer_state_dict(resumed.model, resumed.optimizer, record, options=options)
    if run.own is not None:
        resumed.own.load_state_dict(run.own.state_dict())
    for each in (run, resumed):
        advance(each, 6)
    assert same(run.model, resumed.model)


@flattened
@pytest.mark.parametrize("kind", ["half", "green"])
def test_a_distributed_checkpoint_is_of_names_in_any_order(
    kind: str, flatten: bool, tmp_path: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    forwards = over(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), kind)
    backwards = over(lambda m: torch.optim.AdamW([*m.parameters()][::-1], lr=1e-2), kind)
    run, resumed = forwards(Net(torch.float32), 3), backwards(Net(torch.float32), 8)
    advance(run, 8)
    save(run, tmp_path, options)
    load(resumed, tmp_path, options)
    trains = [
        {n for n, p in own.model.named_parameters() if p.requires_grad} for own in (run, resumed)
    ]
    assert trains[0] == trains[1]
    for each in (run, resumed):
        advance(each, 6)
    assert same(run.model, resumed.model)


@flattened
@pytest.mark.parametrize("name", ["half fine-tuning", "half, dampened", "owlore"])
def test_a_distributed_checkpoint_before_the_first_step(
    name: str, flatten: bool, tmp_path: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    runs = [CASES[name](Net(torch.float32), 3) for _ in range(3)]
    save(runs[0], tmp_path, options)
    load(runs[1], tmp_path, options)
    for run in runs:
        advance(run, 7)
    assert same(runs[0].model, runs[1].model)
    assert same(runs[0].model, runs[2].model)


@flattened
@pytest.mark.parametrize("name", ["half fine-tuning", "half, dampened", "owlore"])
def test_a_run_that_has_begun_refuses_what_torch_leaves_out(
    name: str, flatten: bool, tmp_path: Path
) -> None:
    """And loads all of it by each remedy that the error names."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    run = CASES[name](Net(torch.float32), 3)
    advance(run, 7)
    save(run, tmp_path, options)
    advance(run, 4)
    for remedy in ("clear", "loading"):
        other = CASES[name](Net(torch.float32), 8)
        advance(other, 2)
        if name == "owlore" and remedy == "loading":
            continue
        if remedy == "clear":
            before = copy.deepcopy(other.optimizer.state_dict()["param_groups"])
            trains = [p.requires_grad for p in other.model.parameters()]
            match = r"all state .* must be loaded, .* left out .*(state\.clear\(\)|loading\(\))"
            with pytest.raises(RuntimeError, match=match):
                load(other, tmp_path, options)
            assert other.optimizer.state_dict()["param_groups"] == before
            assert [p.requires_grad for p in other.model.parameters()] == trains
            other.optimizer.zero_grad()
            other.optimizer.state.clear()
        with other.handle.loading() if remedy == "loading" else contextlib.nullcontext():
            load(other, tmp_path, options)
        advance(other, 4)
        assert same(run.model, other.model)


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    run = CASES["half fine-tuning"](Net(torch.float32), 3)
    twin = CASES["half fine-tuning"](Net(torch.float32), 3)
    with run.handle.loading():
        pass
    assert not run.optimizer.state
    record = get_optimizer_state_dict(run.model, run.optimizer)
    del record["state"]["head.weight"]
    with pytest.raises(RuntimeError, match="Missing optimizer state"):
        set_optimizer_state_dict(run.model, run.optimizer, record)
    for each in (run, twin):
        advance(each, 5)
    assert same(run.model, twin.model)


@flattened
def test_state_of_frozen_parameters_is_not_lost(flatten: bool) -> None:
    """A run that freezes a layer until later, without any choice: torch leaves out its state."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, again = Net(torch.float32), Net(torch.float32)
    runs = [Run(each, zoopt.AdamW(each.named_parameters(), seed=0)) for each in (model, again)]
    advance(runs[0], 2)
    record = get_optimizer_state_dict(model, runs[0].optimizer, options=options)
    again.load_state_dict(model.state_dict())
    again.first.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"left out that of 'first.weight' and of 1 others"):
        set_optimizer_state_dict(again, runs[1].optimizer, copy.deepcopy(record), options=options)
    again.first.requires_grad_(True)
    runs[1].optimizer.state.clear()
    set_optimizer_state_dict(again, runs[1].optimizer, record, options=options)
    for run in runs:
        advance(run, 2)
    assert same(model, again)


def hybrid(model: Any) -> Any:
    early, late = [], []
    for name, param in model.named_parameters():
        (early if name.startswith(("first", "layers.0")) else late).append((name, param))
    return zoopt.Hybrid(zoopt.MeZO(early, seed=0), torch.optim.AdamW(late))


def test_hybrid_is_refused_whole_and_half_fine_tuned_in_halves() -> None:
    model = Net(torch.float32)
    optimizer = hybrid(model)
    with pytest.raises(RuntimeError, match="must be given the two optimizers of a Hybrid one by"):
        get_optimizer_state_dict(model, optimizer)
    get_optimizer_state_dict(model, optimizer.first_order)
    with zoopt.HalfFineTuning(model, optimizer, round_steps=2, seed=0):
        for half in (optimizer.zeroth_order, optimizer.first_order):
            with pytest.raises(RuntimeError, match="Hybrid under HalfFineTuning must be saved"):
                get_optimizer_state_dict(model, half)


@pytest.mark.parametrize("name", ["half", "green", "cofitune"])
def test_what_chooses_refuses_owlore(name: str) -> None:
    """Each would let parameters train that the other lets rest."""
    model = Net(torch.float32)
    optimizer = owlore(model, 0).optimizer
    losses = [lambda: loss_of(model)]
    build: dict[str, Callable[[], Any]] = {
        "half": lambda: zoopt.HalfFineTuning(model, optimizer, round_steps=1),
        "green": lambda: zoopt.GreenTrainer(model, optimizer, losses[0], budget=0.5),
        "cofitune": lambda: zoopt.CoFiTune(model, optimizer, losses, target=["*.up"]),
    }
    trains = [param.requires_grad for param in model.parameters()]
    with pytest.raises(ValueError, match="optimizer must not be OwLore, which decides itself"):
        build[name]()
    assert [param.requires_grad for param in model.parameters()] == trains


def test_blank_state_is_checked() -> None:
    run = CASES["half fine-tuning"](Net(torch.float32), 3)
    saved = run.optimizer.state_dict()
    for bad in (3, [1], "-1", "1000000", "x", True, None):
        damaged = copy.deepcopy(saved)
        damaged["param_groups"][0]["blank_state"] = bad
        with pytest.raises(ValueError, match="blank_state must be a text of numbers of the 22"):
            run.optimizer.load_state_dict(damaged)
