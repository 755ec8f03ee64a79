"""Processes that have seeds of their own: the optimizers' is one, or they say that it is not."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zoopt
from tests.optimizer_table import ROWS, closure_of, mlp
from tests.processes import Scenario, connect, failure, run_all, scenario_cases
from zoopt.distributed.seed import SharedSeed, default_seed

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
#: One row a class: how the seed is made is the same for all of a class's variants.
CLASSES = list({row.cls: row for row in ROWS}.values())


def impatient() -> None:
    """What will never be said is waited for only briefly. All else must have been said before."""
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(datetime.timedelta(seconds=0.2))


def from_everyone(value: Tensor) -> list[Tensor]:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return values


def assert_same_everywhere(model: nn.Module) -> None:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    first, *others = from_everyone(flat)
    assert all(torch.equal(first, other) for other in others)


def refusal(error: type[Exception], call: Callable[[], Any]) -> str | None:
    """What the call is refused with, or None."""
    try:
        call()
    except error as refused:
        return str(refused)
    return None


def assert_one_refuses(message: str | None) -> None:
    """The process that comes second: the first has nothing to compare with yet."""
    refusals = from_everyone(torch.tensor(int(message is not None)))
    assert sorted(map(int, refusals)) == [0, 1]
    if message is not None:
        assert "seed must be the same in all processes, or their replicas drift apart" in message
        assert "pass one seed to all, or none: rank 0's is then taken" in message


def a_seed_a_rank_gives_equal_replicas(folder: Path) -> None:
    for row in CLASSES:
        torch.manual_seed(1337 + dist.get_rank())
        model = mlp()
        optimizer = row.build(model, seed=None)
        assert optimizer.param_groups[0]["seed"] == 1337
        for _ in range(3):
            optimizer.step(closure_of(model))
        assert_same_everywhere(model)


def another_seed_is_refused_when_it_is_made(folder: Path) -> None:
    build = lambda: zoopt.MeZO(mlp().parameters(), seed=dist.get_rank())  # noqa: E731
    assert_one_refuses(refusal(ValueError, build))


def a_checkpoint_of_another_seed_may_be_loaded_by_all(folder: Path) -> None:
    model = mlp()
    optimizer = zoopt.MeZO(model.named_parameters(), lr=1e-2)
    other = zoopt.MeZO(mlp().named_parameters(), seed=5)
    optimizer.load_state_dict(other.state_dict())
    for _ in range(2):
        optimizer.step(closure_of(model))
    assert optimizer.param_groups[0]["seed"] == 5
    assert_same_everywhere(model)


def checkpoints_of_two_seeds_are_refused(folder: Path) -> None:
    """By both processes, or by the second one where the first steps before it is made."""
    model = mlp()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = zoopt.MeZO(model.named_parameters())
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["seed"] = 10 + dist.get_rank()
    optimizer.load_state_dict(state_dict)
    message = refusal(RuntimeError, lambda: optimizer.step(closure_of(model)))
    if message is not None:
        assert re.search(r"got 1\d for MeZO in rank . and 1\d in rank", message)
        assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert any(from_everyone(torch.tensor(message is not None)))


def a_checkpoint_loaded_before_another_process_begins_is_found_there(folder: Path) -> None:
    model = mlp()
    state_dict = zoopt.MeZO(mlp().named_parameters(), seed=10).state_dict()
    if dist.get_rank() == 0:
        optimizer = zoopt.MeZO(model.named_parameters())
        optimizer.load_state_dict(state_dict)
        optimizer.step(closure_of(model))
    dist.barrier()
    if dist.get_rank() == 1:
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = zoopt.MeZO(model.named_parameters())
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"got 1337 for MeZO in rank 1 and 10 in rank 0"):
                optimizer.step(closure_of(model))
        assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
        optimizer.load_state_dict(state_dict)
        optimizer.step(closure_of(model))
    assert_same_everywhere(model)


def a_change_between_steps_before_another_process_begins_is_found_there(folder: Path) -> None:
    """At the step that the other process took with another seed, and not before."""
    for again in (False, True):
        model = mlp()
        state_dict = zoopt.MeZO(mlp().named_parameters(), seed=10).state_dict()
        if dist.get_rank() == 0:
            optimizer = zoopt.MeZO(model.named_parameters())
            optimizer.step(closure_of(model))
            optimizer.load_state_dict(state_dict)
            optimizer.step(closure_of(model))
        dist.barrier()
        if dist.get_rank() == 1:
            optimizer = zoopt.MeZO(model.named_parameters())
            if again:  # A step that is repeated is the same one.
                with pytest.raises(MemoryError):
                    optimizer.step(no_room)
            optimizer.step(closure_of(model))
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"got 1337 for MeZO in rank 1 and 10 in ra"):
                    optimizer.step(closure_of(model))
            assert torch.equal(
                before, torch.cat([p.detach().flatten() for p in model.parameters()])
            )
            optimizer.load_state_dict(state_dict)
            optimizer.step(closure_of(model))
        assert_same_everywhere(model)


def no_room() -> None:
    raise MemoryError("no room")


def a_seed_that_one_process_changes_is_refused_there(folder: Path) -> None:
    model = mlp()
    optimizer = zoopt.MeZO(model.named_parameters())
    if dist.get_rank() == 0:
        optimizer.step(closure_of(model))  # before the change, of which it would be told otherwise
    dist.barrier()
    if dist.get_rank() == 1:
        impatient()
        optimizer.param_groups[0]["seed"] += 1
        with pytest.raises(RuntimeError, match="the seed of MeZO in rank 0, which has not said it"):
            optimizer.step(closure_of(model))


def one_process_alone_waits_for_no_one(folder: Path) -> None:
    if dist.get_rank() == 0:
        model = mlp()
        optimizer = zoopt.ZOAdam(model.parameters())
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][0]["seed"] = 10
        optimizer.load_state_dict(state_dict)
        optimizer.step(closure_of(model))
        zoopt.LOZO(model.parameters(), seed=3)
    dist.barrier()
    if dist.get_rank() == 1:
        impatient()
        with pytest.raises(RuntimeError, match="the seed of lonely in rank 0"):
            SharedSeed(None, "lonely")


def an_optimizer_from_before_the_group_is_compared_at_its_first_step(folder: Path) -> None:
    rank = dist.get_rank()
    dist.destroy_process_group()
    model = mlp()
    optimizer = zoopt.FZOO(model.parameters())
    connect(rank, 2, folder / "later")
    assert optimizer.param_groups[0]["seed"] == 1337 + rank
    assert_one_refuses(refusal(ValueError, lambda: optimizer.step(closure_of(model))))


SCENARIOS: dict[int, list[Scenario]] = {
    2: [
        a_seed_a_rank_gives_equal_replicas,
        another_seed_is_refused_when_it_is_made,
        a_checkpoint_of_another_seed_may_be_loaded_by_all,
        checkpoints_of_two_seeds_are_refused,
        a_checkpoint_loaded_before_another_process_begins_is_found_there,
        a_change_between_steps_before_another_process_begins_is_found_there,
        a_seed_that_one_process_changes_is_refused_there,
        one_process_alone_waits_for_no_one,
        an_optimizer_from_before_the_group_is_compared_at_its_first_step,
    ]
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(SCENARIOS, tmp_path_factory.mktemp("seeds"))


@scenario_cases(SCENARIOS)
def test_processes(processes: int, scenario: Scenario, ran: Path) -> None:
    message = failure(scenario, processes, ran)
    assert message is None, message


def test_alone_the_default_is_torchs_seed() -> None:
    torch.manual_seed(-1)
    assert SharedSeed(None, "anything").value == default_seed() == 2**64 - 1
    shared = SharedSeed(3, "anything")
    shared.check(4)
    assert shared.value == 4
    with pytest.raises(ValueError, match=r"seed must be an int in \[0, 2\^64\), got -1"):
        SharedSeed(-1, "anything")
