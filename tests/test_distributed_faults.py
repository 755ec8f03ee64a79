"""What goes wrong on one of several ranks: an error in all, and never different weights on two."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import zoopt
from tests.optimizer_table import closure_of, mlp
from tests.processes import (
    Scenario,
    bits,
    connect,
    everywhere,
    failure,
    refusal,
    run_all,
    scenario_cases,
)
from tests.test_distributed import whole

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How ranks share a step.

    Attributes:
        exact: whether weights come back to theta to the bit.
    """

    parallel: str
    perturbation: str
    sharded: bool

    @property
    def exact(self) -> bool:
        return self.perturbation == "virtual"

    def model(self) -> nn.Module:
        model = mlp()
        if self.sharded:
            fully_shard(model[3])
            fully_shard(model)
        return model

    def build(self, model: nn.Module, **options: Any) -> zoopt.MeZO:
        options = {"lr": 0.1, "num_probes": 2, "seed": 7, **options}
        return zoopt.MeZO(
            model.named_parameters(),
            perturbation=self.perturbation,  # type: ignore[arg-type]
            process_group=dist.group.WORLD,
            parallel=self.parallel,  # type: ignore[arg-type]
            **options,
        )


KINDS = [
    Kind(parallel, mode, sharded)
    for parallel, sharded in (("data", False), ("probes", False), ("data", True))
    for mode in ("inplace", "virtual")
]


def here(model: nn.Module) -> list[torch.Tensor]:
    """What this process holds of the weights."""
    return [zoopt.distributed.sharding.local(p).detach().clone() for p in model.parameters()]


def assert_back(model: nn.Module, before: list[torch.Tensor], kind: Kind) -> None:
    for p, q in zip(here(model), before, strict=True):
        if kind.exact:
            assert torch.equal(p, q), kind
        # Seven moves by up to 2 zo_eps |z| < 1e-2, each rounded.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def assert_untouched(model: nn.Module, before: list[torch.Tensor], kind: Kind) -> None:
    assert bits(here(model)) == bits(before), kind


def assert_equal_everywhere(model: nn.Module, what: Any) -> None:
    first, *others = everywhere(bits([whole(param) for param in model.parameters()]))
    assert all(other == first for other in others), what


def not_a_number(loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A loss of NaN."""
    return lambda: loss() * math.nan


def a_loss_of_nan_in_one_rank_is_skipped_in_all(folder: Path) -> None:
    for kind in KINDS:
        model = kind.model()
        optimizer = kind.build(model)
        optimizer.step(closure_of(model))
        before, loss = here(model), closure_of(model)
        bad = not_a_number(loss) if dist.get_rank() == 1 else loss
        with pytest.warns(UserWarning, match="skipped . of 2 probes"):
            optimizer.step(bad)
        # Divided, the other rank's direction is left.
        assert optimizer.skipped_probes == (2 if kind.parallel == "data" else 1), kind
        if kind.parallel == "data":
            assert_back(model, before, kind)
        assert_equal_everywhere(model, kind)
        optimizer.step(loss)
        assert_equal_everywhere(model, kind)


def failing(model: nn.Module) -> Callable[[], torch.Tensor]:
    """A loss whose second evaluation raises in rank 1."""
    calls, loss = iter(range(99)), closure_of(model)

    def closure() -> torch.Tensor:
        if next(calls) == 1 and dist.get_rank() == 1:
            raise MemoryError("no room")
        return loss()

    return closure


def an_error_in_one_rank_is_one_in_all(folder: Path) -> None:
    """Weights are as before, and alike to the bit; the next step is taken."""
    for kind in KINDS:
        if kind.sharded:
            continue  # See `ends`: the others wait in a forward pass.
        model = kind.model()
        optimizer = kind.build(model, num_probes=3)
        optimizer.step(closure_of(model))
        before = here(model)
        message = refusal(functools.partial(optimizer.step, failing(model)))
        expected = "MemoryError: no room"
        if dist.get_rank() == 0:
            expected = "RuntimeError: rank 1's closure has raised an error"
        assert message.startswith(expected), message
        assert_back(model, before, kind)
        assert optimizer.param_groups[0]["step"] == 1
        assert_equal_everywhere(model, kind)
        optimizer.step(closure_of(model))
        assert_equal_everywhere(model, kind)


def weight(optimizer: Any, model: Any) -> None:
    with torch.no_grad():
        model[2].bias[3] += 2.0**-20


def swap(optimizer: Any, model: Any) -> None:
    with torch.no_grad():
        model[0].weight[[0, 1]] = model[0].weight[[1, 0]]


def setting(name: str, value: Any) -> Callable[[Any, nn.Module], None]:
    def change(optimizer: Any, model: nn.Module) -> None:
        optimizer.param_groups[0][name] = value

    return change


DIFFER = "must be the same in all ranks"
SAME = "the weights must be the same in all ranks, got others for {} in rank 1 than in rank 0"
#: What rank 1 does by itself, and what both are told. Parts of sharded parameters have no replicas.
CHANGES: list[tuple[Callable[[Any, nn.Module], Any], str]] = [
    (setting("seed", 8), f"seed {DIFFER}, or they drift apart, got 7 in rank 0"),
    (setting("lr", 0.2), f"lr {DIFFER}, or they drift apart, got 0.1 in rank 0"),
    (setting("num_probes", 5), f"num_probes {DIFFER}"),
    (setting("step", 2), f"step {DIFFER}"),
    (weight, SAME.format("'2.bias'")),
    (swap, SAME.format("'0.weight'")),
]


def ranks_that_differ_say_in_what(folder: Path) -> None:
    """At the first step, and at a later one within `check_every` steps of the change."""
    for kind in KINDS:
        for change, expected in CHANGES:
            for steps in (0, 1):
                if kind.sharded and change in (weight, swap):
                    continue
                model = kind.model()
                optimizer = kind.build(model)
                optimizer.check_every = 4
                for _ in range(steps):
                    optimizer.step(closure_of(model))
                if dist.get_rank() == 1:
                    change(optimizer, model)
                message = ""
                while not message and optimizer.param_groups[0]["step"] < 5:
                    before = here(model)
                    message = refusal(lambda o=optimizer, m=model: o.step(closure_of(m)))
                assert expected in message, (kind, steps, message)
                assert len(set(everywhere(message))) == 1, "not the same error in all ranks"
                assert_untouched(model, before, kind)


def other_models_are_refused(folder: Path) -> None:
    rank = dist.get_rank()
    for kind in KINDS:
        own = nn.Sequential(nn.Linear(3, 2 + rank))
        if kind.sharded:
            fully_shard(own)
        optimizer = kind.build(own)
        message = refusal(lambda o=optimizer, m=own: o.step(lambda: m(torch.ones(1, 3)).sum()))
        told = "all ranks must train the same parameters, got '0.weight' (float32 (2, 3)) in rank 0"
        assert told in message, message
        assert "(float32 (3, 3)) in rank 1" in message
    more = nn.ModuleList([nn.Linear(3, 2) for _ in range(1 + rank)])
    optimizer = KINDS[0].build(more)
    message = refusal(lambda: optimizer.step(lambda: more[0].weight.sum() + more[-1].bias.sum()))
    assert "all ranks must train the same parameters, got 2 in rank 0 and 4 in rank 1" in message


def other_calls_are_refused(folder: Path) -> None:
    """One rank probes a second micro-batch, the other takes the step."""
    for kind in KINDS:
        model = kind.model()
        optimizer = kind.build(model)
        optimizer.probe(closure_of(model))
        before = here(model)
        call: Callable[[], Any] = optimizer.step
        if dist.get_rank() == 0:
            call = functools.partial(optimizer.probe, closure_of(model))
        message = refusal(call)
        assert message.startswith("RuntimeError: call must be the same in all ranks"), message
        assert_untouched(model, before, kind)
        assert optimizer.param_groups[0]["step"] == 0
        optimizer.zero_grad()
        optimizer.step(closure_of(model))
        assert_equal_everywhere(model, kind)


SCENARIOS: dict[int, list[Scenario]] = {
    2: [
        a_loss_of_nan_in_one_rank_is_skipped_in_all,
        an_error_in_one_rank_is_one_in_all,
        ranks_that_differ_say_in_what,
        other_models_are_refused,
        other_calls_are_refused,
    ]
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(SCENARIOS, tmp_path_factory.mktemp("faults"))


@scenario_cases(SCENARIOS)
def test_together(processes: int, scenario: Scenario, ran: Path) -> None:
    message = failure(scenario, processes, ran)
    assert message is None, message


def killed() -> None:
    os._exit(0)


def raises() -> None:
    raise MemoryError("no room")


#: How one rank's step ends, so that the other hears only of the process's end: within an
#: evaluation; and before it, as in a program that has fewer steps.
ENDS = {"killed": killed, "raises": raises, "takes fewer steps": None}


def cases() -> Iterator[tuple[Kind, str]]:
    for kind in KINDS:
        yield kind, "killed"
    yield KINDS[0], "takes fewer steps"
    for kind in KINDS:
        if kind.sharded:
            yield kind, "takes fewer steps"
            yield kind, "raises"


def ends(number: int, folder: Path) -> None:
    """The first process takes steps with each of the others in turn, and the other one ends."""
    for victim, (kind, how) in enumerate(cases(), 1):
        if number not in (0, victim):
            continue
        rank = min(number, 1)
        connect(rank, 2, folder / f"store{victim}")
        model = kind.model()
        optimizer = kind.build(model)
        optimizer.step(closure_of(model))
        before, action, loss = here(model), ENDS[how], closure_of(model)
        if rank == 1 and action is None:
            os._exit(0)

        def closure(rank: int = rank, action: Any = action, loss: Any = loss) -> Any:
            return action() if rank == 1 else loss()

        message = refusal(functools.partial(optimizer.step, closure))
        if rank == 1:
            good = message == "MemoryError: no room"
            assert_back(model, before, kind)
            os._exit(0 if good else 1)
        for _ in range(2):
            if not kind.sharded:
                assert message.startswith("RuntimeError: rank 0 could not exchange"), message
            assert message, (kind, how)
            assert_back(model, before, kind)
            assert optimizer.param_groups[0]["step"] == 1
            message = refusal(functools.partial(optimizer.step, loss))
        (folder / f"done{victim}").write_text("yes", encoding="utf-8")
        dist.destroy_process_group()


def test_a_rank_that_ends_in_a_step_is_an_error_in_the_others(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    count = len(list(cases()))
    torch.multiprocessing.start_processes(
        ends, (tmp_path,), nprocs=1 + count, start_method="forkserver"
    )
    assert len(list(tmp_path.glob("done*"))) == count
