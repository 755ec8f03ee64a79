"""Zeroth-order steps on parameters that FSDP2 has sharded: the bits of the unsharded run."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import zoopt
from tests.optimizer_table import CASES, INDICES, ROWS, mlp, regression
from tests.processes import Scenario, bits, everywhere, failure, refusal, run_all, scenario_cases
from tests.test_distributed import whole

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
STEPS = 2
SHARDING = {zoopt.MeZO, zoopt.ZOAdam, zoopt.ZOSignSGD, zoopt.ZOConservativeSGD, zoopt.FZOO}
CLASSES = list({row.cls: row for row in reversed(ROWS)}.values())
#: Further ones: with state of their own, and other noise.
OTHERS = {"MeZO momentum", "MeZO window", "MeZO random mask", "MeZO blocks", "ZOAdam window"}
SHARDING |= {zoopt.HiZOO, zoopt.EvolutionStrategy}


def shards(row: Any) -> bool:
    """Whether the row's method can step parts of parameters."""
    free = row.options.get("mask") in (None, "random") and row.options.get("rank") is None
    return row.cls in SHARDING and free


def sharded(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """10, 10 and 2 rows: of unequal shards, on four processes of empty ones too."""
    model = mlp(dtype)
    fully_shard(model[3], **options)
    return fully_shard(model, **options)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Equal in all ranks: each gathers all weights, and has all data."""
    x, y = regression(dtype)
    return (model(x) - y).double().pow(2).mean()


def assert_same(model: nn.Module, optimizer: Any, plain: nn.Module, other: Any, what: Any) -> None:
    full = [whole(param) for param in model.parameters()]
    assert bits(full) == bits(plain), what
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys(), what
        for key, value in optimizer.state[p].items():
            assert torch.equal(whole(value), other.state[q][key]), (what, key)


def steps(optimizer: Any, model: nn.Module, dtype: torch.dtype, count: int = STEPS) -> None:
    for _ in range(count):
        optimizer.step(functools.partial(loss_of, model, dtype))


def equals_the_unsharded_run(folder: Path) -> None:
    cases = [(row, "virtual") for row in CLASSES]
    if dist.get_world_size() == 2:
        cases = [case for case in CASES if case[0] in CLASSES or case[0].name in OTHERS]
    for row, mode in cases:
        for dtype in (torch.float32, torch.bfloat16):
            narrow = dtype == torch.bfloat16
            if not shards(row) or (narrow and (mode == "inplace" or row not in CLASSES)):
                continue
            plain, model = mlp(dtype), sharded(dtype)
            other = row.build(plain, perturbation=mode)
            optimizer = row.build(model, perturbation=mode, process_group=dist.group.WORLD)
            steps(other, plain, dtype)
            steps(optimizer, model, dtype)
            assert_same(model, optimizer, plain, other, (row.name, mode, dtype))


def what_is_gathered_is_let_go(folder: Path) -> None:
    """FSDP keeps a root's parameters gathered after a forward pass without a backward pass."""
    model, plain = sharded(), mlp()
    options: dict[str, Any] = {"lr": 0.1, "seed": 7}
    optimizer = zoopt.MeZO(model.named_parameters(), process_group=dist.group.WORLD, **options)
    other = zoopt.MeZO(plain.named_parameters(), **options)
    with torch.no_grad():
        loss_of(model)
    steps(optimizer, model, torch.float32)
    steps(other, plain, torch.float32)
    with torch.no_grad():
        assert loss_of(model) == loss_of(plain)
    assert all(zoopt.distributed.sharding.is_sharded(param) for param in optimizer._params())


def copies_are_exact(folder: Path) -> None:
    """16-bit shards that move from a copy come back to where they were, to the bit."""
    model = sharded(torch.bfloat16)
    optimizer = zoopt.MeZO(
        model.named_parameters(), lr=0.1, num_probes=3, seed=7, process_group=dist.group.WORLD
    )
    before = [whole(param).clone() for param in model.parameters()]
    optimizer.probe(functools.partial(loss_of, model, torch.bfloat16))
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(param), value)

    def fails() -> torch.Tensor:
        loss_of(model, torch.bfloat16)
        raise MemoryError("no room")

    assert "MemoryError" in refusal(lambda: optimizer.step(fails))
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(param), value)


def float32_shards_compute_in_bfloat16(folder: Path) -> None:
    """As one process does that casts its weights in each forward pass."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    plain, model = mlp(), sharded(mp_policy=policy)
    x, y = regression(torch.bfloat16)

    def cast() -> torch.Tensor:
        weights = {name: param.bfloat16() for name, param in plain.named_parameters()}
        out = torch.func.functional_call(plain, weights, (x,))
        return (out - y).double().pow(2).mean()

    options: dict[str, Any] = {"lr": 1e-2, "zo_eps": 1e-2, "seed": 7}
    optimizer = zoopt.MeZO(model.named_parameters(), process_group=dist.group.WORLD, **options)
    other = zoopt.MeZO(plain.named_parameters(), **options)
    for _ in range(STEPS):
        optimizer.step(lambda: (model(x) - y).double().pow(2).mean())
        other.step(cast)
    assert_same(model, optimizer, plain, other, "bfloat16")


def adam(model: nn.Module, **options: Any) -> zoopt.ZOAdam:
    group = {"process_group": dist.group.WORLD} if options.pop("together", True) else {}
    return zoopt.ZOAdam(model.named_parameters(), **{"lr": 1e-2, "seed": 7, **group, **options})  # type: ignore[arg-type]


def checkpoints_resume_to_the_bit(folder: Path) -> None:
    """Saved at step 2 by four processes; loaded by as many as there are, nested and flat."""
    plain = mlp()
    other = adam(plain, together=False)
    steps(other, plain, torch.float32)
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        path = folder / f"checkpoint {flat}"
        if dist.get_world_size() == 4:
            model = sharded()
            optimizer = adam(model)
            steps(optimizer, model, torch.float32)
            record = get_optimizer_state_dict(model, optimizer, options=options)
            dcp.save({"model": model.state_dict(), "optimizer": record}, checkpoint_id=path)
        again = sharded()
        resumed = adam(again, lr=0.5)
        loaded = {
            "model": again.state_dict(),
            "optimizer": get_optimizer_state_dict(again, resumed, options=options),
        }
        dcp.load(loaded, checkpoint_id=path)
        again.load_state_dict(loaded["model"])
        set_optimizer_state_dict(again, resumed, loaded["optimizer"], options=options)
        assert resumed.param_groups[0]["lr"] == 1e-2
        assert_same(again, resumed, plain, other, flat)
        steps(resumed, again, torch.float32)
        on, further = copy.deepcopy(plain), None
        further = adam(on, together=False)
        further.load_state_dict(other.state_dict())
        steps(further, on, torch.float32)
        assert_same(again, resumed, on, further, flat)


def what_cannot_be_sharded_is_refused(folder: Path) -> None:
    model = sharded()
    named = list(model.named_parameters())
    rest = "must have whole parameters with these hyperparameters, got '0.weight'"
    build: Any
    for build, options in (
        (zoopt.LOZO, {}),
        (zoopt.SubZero, {}),
        (zoopt.ZOMuon, {}),
        (zoopt.ConMeZO, {}),
        (zoopt.ForwardGrad, {}),
        (zoopt.EvolutionStrategy, {"rank": 1}),
        (zoopt.MeZO, {"mask": "magnitude", "density": 0.5}),
        (zoopt.MeZO, {"mask": {"0.weight": INDICES["0.weight"]}}),
    ):
        message = refusal(functools.partial(build, named, seed=7, **options))
        assert rest in message, (build, message)
    other = fully_shard(nn.Linear(4, 4, bias=False), shard_placement_fn=lambda _: Shard(1))
    message = refusal(lambda: zoopt.MeZO(other.parameters(), seed=7))
    assert "sharded along dimension 0, got dimension 1" in message
    alone = zoopt.MeZO(named, seed=7)
    message = refusal(lambda: alone.record(folder / "run.zoopt", model))
    assert "parameters must be whole to be recorded, got '0.weight', which is sharded" in message
    message = refusal(lambda: alone.step(functools.partial(loss_of, model)))
    assert "MeZO must have a process_group where parameters are sharded" in message
    assert len(set(everywhere(message))) == 1


SCENARIOS: dict[int, list[Scenario]] = {
    4: [equals_the_unsharded_run, checkpoints_resume_to_the_bit],
    2: [
        equals_the_unsharded_run,
        what_is_gathered_is_let_go,
        copies_are_exact,
        float32_shards_compute_in_bfloat16,
        checkpoints_resume_to_the_bit,
        what_cannot_be_sharded_is_refused,
    ],
    1: [equals_the_unsharded_run],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(SCENARIOS, tmp_path_factory.mktemp("shards"))


@scenario_cases(SCENARIOS)
def test_sharded(processes: int, scenario: Scenario, ran: Path) -> None:
    message = failure(scenario, processes, ran)
    assert message is None, message
