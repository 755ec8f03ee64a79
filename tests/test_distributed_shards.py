"""Zeroth-order steps on parameters that FSDP2 has sharded: the bits of the unsharded run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import zoopt
from tests.optimizer_table import CASES, INDICES, ROWS, Row, mlp, regression
from tests.processes import Scenario, bits, everywhere, failure, refusal, run_all, scenario_cases
from tests.test_distributed import whole
from zoopt.memory import plan
from zoopt.memory.meter import StorageMeter
from zoopt.memory.spec import ModelSpec

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
STEPS = 2
CLASSES = list({row.cls: row for row in reversed(ROWS)}.values())
#: One row a class, and those with state of their own or other noise.
OTHERS = ("momentum", "window", "random mask", "magnitude mask", "indices momentum", "blocks")
CHOSEN = {f"MeZO {other}" for other in OTHERS} | {"ZOAdam window"}
SOME = [row for row in ROWS if row in CLASSES or row.name in CHOSEN]
#: Tangents take the place of what operators read.
REFUSED = {zoopt.ForwardGrad}


def low_rank(row: Row) -> bool:
    """Whether products of factors are added, which BLAS rounds by the number of rows."""
    return row.options.get("rank") is not None


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


def assert_close(model: nn.Module, optimizer: Any, plain: nn.Module, other: Any, what: Any) -> None:
    """In float64. Losses near 1 differ by 1e-15, over 2 zo_eps = 2e-3 that is 1e-12 of a projected
    gradient; times lr <= 1e-2, |z| < 8 and two steps. Momenta are not multiplied by lr."""
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=0.0, atol=1e-12, msg=lambda m: f"{what}: {m}")
        assert optimizer.state[p].keys() == other.state[q].keys(), what
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(whole(value), other.state[q][key], rtol=0.0, atol=1e-10)


def equals_the_unsharded_run(folder: Path) -> None:
    cases = [(row, "virtual") for row in CLASSES]
    several = dist.get_world_size()
    if several == 2:
        cases = [case for case in CASES if case[1] == "inplace" or case[0] in SOME]
    for row, mode in cases:
        if row.cls in REFUSED:
            continue
        dtypes = [torch.float64] if low_rank(row) else [torch.float32]
        if mode == "virtual" and not low_rank(row) and (several == 2 or row.cls is zoopt.MeZO):
            dtypes.append(torch.bfloat16)
        for dtype in dtypes:
            plain, model = mlp(dtype), sharded(dtype)
            other = row.build(plain, perturbation=mode)
            optimizer = row.build(model, perturbation=mode, process_group=dist.group.WORLD)
            steps(other, plain, dtype)
            steps(optimizer, model, dtype)
            compare = assert_close if low_rank(row) else assert_same
            compare(model, optimizer, plain, other, (row.name, mode, dtype))


def factors_follow_a_new_basis(folder: Path) -> None:
    """Momenta and bases go over into another subspace; 16-bit shards move from copies."""
    for cls, options in (
        (zoopt.LOZO, {"rank": 2, "momentum": 0.7, "lr": 1e-2}),
        (zoopt.SubZero, {"rank": 3, "lr": 1e-2}),
        (zoopt.ZOMuon, {"rank": 3, "lr": 1e-2}),
    ):
        for mode in ("inplace", "virtual"):
            plain, model = mlp(torch.float64), sharded(torch.float64)
            built = {**options, "basis_update_gap": 2, "perturbation": mode, "seed": 7}
            other: Any = cls(plain.named_parameters(), **built)
            optimizer: Any = cls(model.named_parameters(), process_group=dist.group.WORLD, **built)
            steps(other, plain, torch.float64, 3)
            steps(optimizer, model, torch.float64, 3)
            assert_close(model, optimizer, plain, other, (cls, mode))
        narrow = sharded(torch.bfloat16)
        before = [whole(param).clone() for param in narrow.parameters()]
        optimizer = cls(
            narrow.named_parameters(), process_group=dist.group.WORLD, **options, seed=7
        )
        optimizer.probe(functools.partial(loss_of, narrow, torch.bfloat16))
        assert bits([whole(param) for param in narrow.parameters()]) == bits(before)
        optimizer.step()
        assert bits([whole(param) for param in narrow.parameters()]) != bits(before)


def records_replay_in_one_process(folder: Path) -> None:
    for number, (row, mode) in enumerate(CASES):
        if row.cls in REFUSED or low_rank(row) or row not in SOME:
            continue
        model = sharded()
        optimizer = row.build(model, perturbation=mode, process_group=dist.group.WORLD)
        path = folder / f"{number}.zoopt"
        recorder = optimizer.record(path, model)
        optimizer.step(functools.partial(loss_of, model))
        if row.cls is not zoopt.ZOConservativeSGD:
            optimizer.probe(functools.partial(loss_of, model))
            optimizer.probe(functools.partial(loss_of, model))
            optimizer.step()
        recorder.close()
        full = [whole(param) for param in model.parameters()]
        dist.barrier()
        again = sharded()
        zoopt.replay(again, path)
        assert bits([whole(param) for param in again.parameters()]) == bits(full), (row.name, mode)
        plain = mlp()
        other = zoopt.replay(plain, path)
        assert bits(plain) == bits(full), (row.name, mode)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            for key, value in optimizer.state[p].items():
                assert torch.equal(whole(value), other.state[q][key]), (row.name, mode, key)


def a_record_knows_who_else_writes(folder: Path) -> None:
    model = sharded()
    optimizer = zoopt.MeZO(model.named_parameters(), seed=7, process_group=dist.group.WORLD)
    optimizer.record(folder / "written.zoopt", model)
    optimizer.step(functools.partial(loss_of, model))
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    if dist.get_rank() == 0:
        message = refusal(lambda: optimizer.step(functools.partial(loss_of, model)))
        assert "the weights were written since the last step" in message, message


def probes_are_divided_over_copies_of_the_shards(folder: Path) -> None:
    """Two copies of the model, each sharded over two ranks, which evaluate the same points."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("probes", "data"))
    for row in CLASSES:
        if row.cls not in (zoopt.MeZO, zoopt.ConMeZO, zoopt.ZOConservativeSGD, zoopt.FZOO):
            continue
        plain, model = mlp(), sharded(mesh=mesh["data"])
        other = row.build(plain)
        optimizer = row.build(model, process_group=mesh)
        steps(other, plain, torch.float32)
        steps(optimizer, model, torch.float32)
        assert_same(model, optimizer, plain, other, row.name)


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


def layers(checkpointing: bool = False) -> nn.Module:
    """Layers that repeat, of rows that two processes share unequally, between two others."""
    repeated = [nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 7)) for _ in range(6)]
    return nn.Sequential(nn.Linear(5, 7), nn.Sequential(*repeated), nn.Linear(7, 3))


def a_plan_counts_copies_and_what_is_gathered(folder: Path) -> None:
    """Of the first process, which has the most rows, to the byte."""
    spec = ModelSpec("layers", layers, lambda batch, seq: {"input": torch.zeros(batch, 5)})
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        processes = dist.get_world_size()
        for cls in (zoopt.MeZO, zoopt.ZOAdam):
            planned = plan(spec, optimizers=cls.__name__, dtype=name, processes=processes)
            model = layers().to(dtype)
            for layer in model[1]:  # type: ignore[union-attr]
                fully_shard(layer)
            fully_shard(model)
            optimizer = cls(model.named_parameters(), seed=7, process_group=dist.group.WORLD)
            gathered, held = list[int](), list[int]()
            meter = StorageMeter()

            def count(
                *_: Any, model: Any = model, meter: Any = meter, gathered: Any = gathered
            ) -> None:
                whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
                gathered.append(sum(p.untyped_storage().nbytes() for p in whole))

            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(count)

            def loss(
                model: Any = model, meter: Any = meter, held: Any = held, dtype: Any = dtype
            ) -> torch.Tensor:
                held.append(meter.live["workspace"])
                loss: torch.Tensor = model(torch.ones(1, 5, dtype=dtype)).double().sum()
                return loss

            optimizer.step(loss)  # It makes the state.
            del held[:]
            own = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
            state = [v for each in optimizer.state.values() for v in each.values()]
            state = [v.to_local() if isinstance(v, DTensor) else v for v in state]
            meter.track([*own, *state], "parameters")
            with meter:
                optimizer.step(loss)
            [estimate] = planned.estimates
            shards = sum(part.nbytes for part in own)
            if dist.get_rank():
                continue
            rest, most = min(gathered), max(gathered)
            arriving = max(rest, most - rest) + most
            assert estimate.categories["parameters"] == shards + arriving
            assert estimate.categories["workspace"] == shards * (dtype == torch.bfloat16)
            # At the first evaluation, beside the copies: numbers of the exchange.
            assert estimate.categories["workspace"] <= held[0] < 512 + shards * (name != "float32")
            assert estimate.state == sum(value.nbytes for value in state)


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


#: State of each kind, and masks; by name.
STATES: dict[str, Callable[..., Any]] = {
    "adam": zoopt.ZOAdam,
    "magnitudes": functools.partial(zoopt.MeZO, mask="magnitude", density=0.5, momentum=0.9),
    "indices": functools.partial(zoopt.MeZO, mask=INDICES, momentum=0.9),
    "bases": functools.partial(zoopt.SubZero, rank=3),
}


def checkpoints_resume_to_the_bit(folder: Path) -> None:
    """Saved at step 2 by four processes; loaded by as many as there are, nested and flat."""
    for name, cls in STATES.items():
        thin = name == "bases"
        dtype, compare = (torch.float64, assert_close) if thin else (torch.float32, assert_same)

        def build(model: nn.Module, together: bool = True, cls: Any = cls, **options: Any) -> Any:
            group = {"process_group": dist.group.WORLD} if together else {}
            return cls(model.named_parameters(), **{"lr": 1e-2, "seed": 7, **group, **options})

        plain = mlp(dtype)
        other = build(plain, together=False)
        steps(other, plain, dtype)
        for flat in (False, True) if name == "adam" else (True,):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            path = folder / f"checkpoint {name} {flat}"
            if dist.get_world_size() == 4:
                model = sharded(dtype)
                optimizer = build(model)
                steps(optimizer, model, dtype)
                record = get_optimizer_state_dict(model, optimizer, options=options)
                dcp.save({"model": model.state_dict(), "optimizer": record}, checkpoint_id=path)
            again = sharded(dtype)
            resumed = build(again, lr=0.5)
            loaded = {
                "model": again.state_dict(),
                "optimizer": get_optimizer_state_dict(again, resumed, options=options),
            }
            dcp.load(loaded, checkpoint_id=path)
            again.load_state_dict(loaded["model"])
            set_optimizer_state_dict(again, resumed, loaded["optimizer"], options=options)
            assert resumed.param_groups[0]["lr"] == 1e-2
            compare(again, resumed, plain, other, (name, flat))
            steps(resumed, again, dtype)
            on = copy.deepcopy(plain)
            further = build(on, together=False)
            further.load_state_dict(other.state_dict())
            steps(further, on, dtype)
            compare(again, resumed, on, further, (name, flat))


def what_cannot_be_sharded_is_refused(folder: Path) -> None:
    model = sharded()
    named = list(model.named_parameters())
    for row in ROWS:
        if row.cls in REFUSED:
            message = refusal(functools.partial(row.build_from, named))
            assert f"{row.cls.__name__} must have whole parameters, got '0.weight'" in message
    columns = list(by_columns(mlp()).named_parameters())
    for row in ROWS:
        if row.cls not in REFUSED and not steps_runs(row):
            message = refusal(functools.partial(row.build_from, columns))
            expected = f"{row.cls.__name__} must have parameters sharded along dimension 0"
            assert expected in message, (row.name, message)
            assert "got dimension 1 for '0.weight'" in message, (row.name, message)
    alone = zoopt.MeZO(named, seed=7)
    message = refusal(lambda: alone.step(functools.partial(loss_of, model)))
    assert "MeZO must have a process_group where parameters are sharded" in message
    assert len(set(everywhere(message))) == 1
    lozo = zoopt.LOZO(named, seed=7)
    message = refusal(lambda: lozo.record(folder / "lozo.zoopt", model))
    assert "a low-rank run must have whole parameters to be recorded, got '0.weight'" in message
    assert not (folder / "lozo.zoopt").exists()
    population = zoopt.EvolutionStrategy(named, seed=7, process_group=dist.group.WORLD)
    for call in (population.evaluate, population.evaluate_batched):
        message = refusal(functools.partial(call, functools.partial(loss_of, model)))
        assert f"{call.__name__} must have whole parameters, got '0.weight'" in message


def shards_of_other_ranks_are_refused(folder: Path) -> None:
    """A forward pass gathers parts, so all that hold them must be at the same point."""
    model = sharded()
    before = bits([param.to_local() for param in model.parameters()])  # type: ignore[attr-defined]
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for options in (
        {"process_group": dist.group.WORLD, "parallel": "probes"},
        {"process_group": own},
    ):
        optimizer = zoopt.MeZO(model.named_parameters(), seed=7, **options)  # type: ignore[arg-type]
        message = refusal(functools.partial(optimizer.step, functools.partial(loss_of, model)))
        expected = "got '0.weight', which is divided over ranks [0, 1] and held by [0, 1]"
        assert expected in message, message
        assert optimizer.param_groups[0]["step"] == 0
        assert bits([param.to_local() for param in model.parameters()]) == before  # type: ignore[attr-defined]


def by_columns(model: nn.Module) -> nn.Module:
    """Matrices sharded along their second dimension, vectors along their only one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            value = distribute_tensor(param.detach(), mesh, [Shard(param.dim() - 1)])
            module.register_parameter(name, nn.Parameter(value))
    return model


def steps_runs(row: Row) -> bool:
    """Whether any elements that follow one another can be stepped by themselves."""
    apart = row.options.get("mask") in (None, "random") and not low_rank(row)
    return apart and row.cls not in {zoopt.ConMeZO, *REFUSED}


def columns_equal_the_unsharded_run(folder: Path) -> None:
    """The closure gathers them, so that its sums are those of one process; so are replays."""
    cases = [case for case in CASES if case[0] in SOME and steps_runs(case[0])]
    for number, (row, mode) in enumerate(cases):
        dtype = torch.bfloat16 if mode == "virtual" else torch.float32
        plain, model, skeleton = mlp(dtype), by_columns(mlp(dtype)), mlp(dtype)
        other = row.build(plain, perturbation=mode)
        optimizer = row.build(model, perturbation=mode, process_group=dist.group.WORLD)
        path = folder / f"columns {number}.zoopt"
        recorder = optimizer.record(path, model)
        steps(other, plain, dtype)
        for _ in range(STEPS):
            optimizer.step(functools.partial(gathered_loss, skeleton, model, dtype))
        recorder.close()
        assert_same(model, optimizer, plain, other, (row.name, mode))
        dist.barrier()
        whole_again, again = mlp(dtype), by_columns(mlp(dtype))
        replayed = zoopt.replay(whole_again, path)
        assert_same(model, optimizer, whole_again, replayed, (row.name, mode, "replayed"))
        replayed = zoopt.replay(again, path)
        assert_same(again, replayed, plain, other, (row.name, mode, "replayed on columns"))


def a_process_without_columns_takes_part(folder: Path) -> None:
    """It agrees with the others and counts its steps."""
    plain, skeleton = nn.Linear(1, 3, bias=False), nn.Linear(1, 3, bias=False)
    nn.init.constant_(plain.weight, 0.5)
    model = by_columns(copy.deepcopy(plain))
    options: dict[str, Any] = {"lr": 1e-2, "seed": 7}
    other = zoopt.ZOAdam(plain.named_parameters(), **options)
    optimizer = zoopt.ZOAdam(model.named_parameters(), process_group=dist.group.WORLD, **options)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(skeleton, {"weight": weight}, torch.ones(1, 1))).sum()

    for _ in range(3):
        other.step(lambda: loss(plain.weight))
        optimizer.step(lambda: loss(whole(model.weight)))
    assert_same(model, optimizer, plain, other, "one column")


def gathered_loss(skeleton: nn.Module, model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The loss of a model that has the whole of the other's parameters."""
    weights = {name: whole(param) for name, param in model.named_parameters()}
    x, y = regression(dtype)
    return (torch.func.functional_call(skeleton, weights, (x,)) - y).double().pow(2).mean()


def tensor_parallel_layers_train(folder: Path) -> None:
    """In float64, where losses near 1 differ by 1e-15: over 2 zo_eps = 2e-3 that is 1e-12 of a
    projected gradient; times lr = 1e-2, |z| < 8 and three steps."""
    layers = [(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2)) for _ in range(2)]
    plain, model = (nn.Sequential(*each).double() for each in layers)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        mine.data.fill_(0.25).view(-1)[::2] = -0.5
        theirs.data.copy_(mine)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    options: dict[str, Any] = {"lr": 1e-2, "seed": 7}
    other = zoopt.MeZO(plain.named_parameters(), **options)
    optimizer = zoopt.MeZO(model.named_parameters(), process_group=dist.group.WORLD, **options)
    steps(other, plain, torch.float64, 3)
    steps(optimizer, model, torch.float64, 3)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=0.0, atol=1e-12)


SCENARIOS: dict[int, list[Scenario]] = {
    4: [
        equals_the_unsharded_run,
        checkpoints_resume_to_the_bit,
        probes_are_divided_over_copies_of_the_shards,
    ],
    2: [
        equals_the_unsharded_run,
        factors_follow_a_new_basis,
        records_replay_in_one_process,
        a_record_knows_who_else_writes,
        what_is_gathered_is_let_go,
        copies_are_exact,
        a_plan_counts_copies_and_what_is_gathered,
        float32_shards_compute_in_bfloat16,
        checkpoints_resume_to_the_bit,
        what_cannot_be_sharded_is_refused,
        shards_of_other_ranks_are_refused,
        columns_equal_the_unsharded_run,
        a_process_without_columns_takes_part,
        tensor_parallel_layers_train,
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
