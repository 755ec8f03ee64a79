"""Zeroth-order steps that several processes take together: the bits of one, or an error in all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import zoopt
from tests.optimizer_table import CASES, ROWS, closure_of, mlp, regression
from tests.processes import (
    Scenario,
    bits,
    everywhere,
    failure,
    refusal,
    run_all,
    scenario_cases,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
STEPS = 3
#: One row a class.
CLASSES = list({row.cls: row for row in ROWS}.values())


def world() -> Any:
    return dist.group.WORLD


def assert_equal_everywhere(model: nn.Module, what: str) -> None:
    first, *others = everywhere(bits(model))
    assert all(other == first for other in others), what


def together(folder: Path, parallel: str, process_group: Any = None) -> None:
    """The weights, state and record of one process: of each method where nothing is divided. Rank 0
    writes the run down, and one process that replays it has the same weights."""
    cases = CASES if parallel == "probes" else [(row, "auto") for row in CLASSES]
    for number, (row, mode) in enumerate(cases):
        single, model = mlp(), mlp()
        options = {"perturbation": mode}
        alone = row.build(single, **options)
        group = process_group or world()
        shared = row.build(model, process_group=group, parallel=parallel, **options)
        path, recorder = folder / f"{parallel} {dist.get_world_size()} {number}.zoopt", None
        if row.cls.recordable:  # type: ignore[attr-defined]
            recorder = shared.record(path, model)
        for _ in range(STEPS):
            expected = alone.step(closure_of(single))
            assert shared.step(closure_of(model)) == expected, (row.name, mode)
        assert bits(model) == bits(single), (row.name, mode)
        assert shared.last_step == alone.last_step, (row.name, mode)
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            for key, value in alone.state[q].items():
                assert torch.equal(shared.state[p][key], value), (row.name, mode, key)
        if recorder is not None:
            recorder.close()
            dist.barrier()
            again = mlp()
            replayed = zoopt.replay(again, path)
            assert bits(again) == bits(model), (row.name, mode)
            for p, q in zip(model.parameters(), again.parameters(), strict=True):
                for key, value in shared.state[p].items():
                    assert torch.equal(replayed.state[q][key], value), (row.name, mode, key)


def ranks_with_equal_data_are_one_process(folder: Path) -> None:
    """The mean of two equal losses is the loss."""
    together(folder, "data")


def divided_probes_are_those_of_one_process(folder: Path) -> None:
    together(folder, "probes")


def a_mesh_of_equal_data_and_divided_probes_is_one_process(folder: Path) -> None:
    together(folder, "data", init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "probes")))


def part_of(model: nn.Module, part: slice) -> Callable[[], torch.Tensor]:
    x, y = (values[part] for values in regression(torch.float64))
    return lambda: (model(x) - y).pow(2).mean()


def parts_of_a_batch_make_the_whole(folder: Path) -> None:
    """In float64, 64 terms in another order: 1e-15 a loss, over 2 zo_eps = 2e-3."""
    mesh, group = None, world()
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "probes"))
        group = mesh
    first = (mesh.get_local_rank("data") if mesh is not None else dist.get_rank()) == 0
    own, weight = (slice(0, 40), 40) if first else (slice(40, 64), 24)
    for row in CLASSES:
        single, model = mlp(torch.float64), mlp(torch.float64)
        alone, shared = row.build(single), row.build(model, process_group=group)
        for _ in range(STEPS):
            loss = shared.step(part_of(model, own), weight=weight)
            assert loss == pytest.approx(alone.step(part_of(single, slice(64))), rel=1e-12)
        assert_equal_everywhere(model, row.name)
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            # 3 steps of lr g z, lr at most 1e-2 and |z| < 8.
            torch.testing.assert_close(p, q, rtol=0.0, atol=1e-12, msg=row.name)


def micro_batches_add_up(folder: Path) -> None:
    parts = [(slice(0, 16), 16), (slice(16, 40), 24), (slice(40, 56), 16), (slice(56, 64), 8)]
    single, model = mlp(torch.float64), mlp(torch.float64)
    options: dict[str, Any] = {"lr": 1e-2, "num_probes": 2, "seed": 7}
    alone = zoopt.MeZO(single.named_parameters(), **options)
    shared = zoopt.MeZO(model.named_parameters(), process_group=world(), **options)
    rank = dist.get_rank()
    for _ in range(STEPS):
        for i in (0, 2):
            own, weight = parts[i + rank]
            shared.probe(part_of(model, own), weight=weight)
            alone.probe(part_of(single, slice(parts[i][0].start, parts[i + 1][0].stop)))
        assert shared.step() == pytest.approx(alone.step(), rel=1e-12)
    assert_equal_everywhere(model, "micro-batches")
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-10)


def nothing(loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A loss of NaN."""
    return lambda: loss() * math.nan


def a_rank_without_weight_counts_for_nothing(folder: Path) -> None:
    single, model = mlp(), mlp()
    alone = zoopt.MeZO(single.parameters(), seed=7, perturbation="virtual")
    shared = zoopt.MeZO(model.parameters(), seed=7, perturbation="virtual", process_group=world())
    alone.step(closure_of(single))
    idle = dist.get_rank() == 1
    loss = closure_of(model)
    shared.step(nothing(loss) if idle else loss, weight=0.0 if idle else 8.0)
    assert bits(model) == bits(single)
    before = bits(model)
    message = refusal(lambda: shared.step(closure_of(model), weight=0.0))
    assert "weight must be positive in a rank at least" in message
    assert bits(model) == before
    assert "weight must be a finite number >= 0, got -1" in refusal(
        lambda: shared.step(closure_of(model), weight=-1.0)
    )


def random_numbers_stay_alike(folder: Path) -> None:
    """Ranks that divide probes see the same dropout, also one that has nothing to evaluate."""
    single, model = (nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(2))
    x, _ = regression()
    for parallel, options in (
        ("probes", {"estimator": "one-sided", "num_probes": 1}),
        ("probes", {"num_probes": 3}),
    ):
        torch.manual_seed(3)
        alone = zoopt.MeZO(single.parameters(), seed=7, **options)  # type: ignore[arg-type]
        for _ in range(STEPS):
            alone.step(lambda: single(x).square().mean())
        torch.manual_seed(3)
        shared = zoopt.MeZO(
            model.parameters(),
            seed=7,
            process_group=world(),
            parallel=parallel,  # type: ignore[arg-type]
            **options,  # type: ignore[arg-type]
        )
        for _ in range(STEPS):
            shared.step(lambda: model(x).square().mean())
        assert bits(model) == bits(single)
        assert len(set(everywhere(torch.get_rng_state().numpy().tobytes()))) == 1


def other_random_numbers_are_warned_of(folder: Path) -> None:
    model = nn.Sequential(mlp(), nn.Dropout(0.5))
    torch.manual_seed(dist.get_rank())
    optimizer = zoopt.MeZO(model.parameters(), seed=7, process_group=world(), parallel="probes")
    x, _ = regression()
    with pytest.warns(UserWarning, match="must compute the same function in all ranks"):
        optimizer.step(lambda: model(x).square().mean())
    assert_equal_everywhere(model, "dropout")


def a_rank_alone_is_told_so_once(folder: Path) -> None:
    model = mlp()
    optimizer = zoopt.FZOO(model.parameters(), seed=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(closure_of(model))
    [warning] = caught
    assert "FZOO takes its steps alone in a job of several processes" in str(warning.message)
    optimizer.join(world())
    optimizer.probe(closure_of(model))
    with pytest.raises(RuntimeError, match="join must not be called while probes are pending"):
        optimizer.join(None)


def codes_move_together(folder: Path) -> None:
    """Each rank has its own batch; an error of one, and other codes of one, are told to all."""

    def made(**options: Any) -> tuple[nn.Module, zoopt.QES, Callable[[], torch.Tensor]]:
        model = mlp()
        zoopt.nn.convert_to_quantised(model)
        optimizer = zoopt.QES(model, lr=50.0, seed=1, num_probes=2, **options)
        loss = closure_of(model)
        return model, optimizer, lambda: loss() * (1 + dist.get_rank())

    def codes(model: nn.Module) -> torch.Tensor:
        return torch.cat([own.flatten() for own in model.buffers()])

    model, optimizer, loss = made(process_group=world())
    before = codes(model)
    mean = optimizer.step(loss)
    assert set(everywhere(mean)) == {mean}
    optimizer.step(loss, weight=float(dist.get_rank()))
    moved = codes(model)
    assert not torch.equal(moved, before)
    assert set(map(tuple, everywhere(moved.tolist()))) == {tuple(moved.tolist())}
    with pytest.raises(RuntimeError if dist.get_rank() else ZeroDivisionError):
        optimizer.step(loss if dist.get_rank() else lambda: 1 / 0)
    assert torch.equal(codes(model), moved)
    optimizer.step(loss)
    assert len(set(map(tuple, everywhere(codes(model).tolist())))) == 1
    model, optimizer, loss = made(process_group=world())
    if dist.get_rank():
        next(model.buffers()).bitwise_xor_(1)
    with pytest.raises(RuntimeError, match="all ranks must take the same step"):
        optimizer.step(loss)
    _, alone, loss = made()
    with pytest.warns(UserWarning, match="QES takes its steps alone in a job of several"):
        alone.step(loss)
    alone.step(loss)


def what_is_no_group_is_refused(folder: Path) -> None:
    params = list(mlp().parameters())
    build: Any = zoopt.MeZO
    assert "process_group must be a process group or a DeviceMesh, got str" in refusal(
        lambda: build(params, process_group="gloo")
    )
    assert "parallel must be one of 'data', 'probes', got 'model'" in refusal(
        lambda: build(params, process_group=world(), parallel="model")
    )
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("a", "b"))
    assert "two that are named 'data' and 'probes', got 2 named ('a', 'b')" in refusal(
        lambda: build(params, process_group=mesh)
    )
    alone = dist.new_group([0])
    if dist.get_rank() == 1:
        assert "process_group must be one that this process is in" in refusal(
            lambda: build(params, process_group=alone)
        )
    early, late = nn.Linear(2, 2), nn.Linear(2, 2)
    half = build(early.parameters(), seed=7, process_group=world())
    assert "zeroth_order must have no process_group" in refusal(
        lambda: zoopt.Hybrid(half, zoopt.AdamW(late.parameters()))
    )
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    model = mlp()
    build(model.parameters(), seed=7, process_group=line).step(closure_of(model))
    assert_equal_everywhere(model, "a line")


def a_population_by_hand_is_nobodys_exchange(folder: Path) -> None:
    single, model = mlp(), mlp()
    options: dict[str, Any] = {"population_size": 6, "seed": 7, "perturbation": "virtual"}
    alone = zoopt.EvolutionStrategy(single.parameters(), **options)
    shared = zoopt.EvolutionStrategy(model.parameters(), process_group=world(), **options)
    alone.step(closure_of(single))
    mine = shared.evaluate(closure_of(model), members=range(dist.get_rank(), 6, 2))
    parts = everywhere(mine)
    shared.update({**parts[0], **parts[1]})
    assert shared.last_step == alone.last_step


def a_rank_comes_back_from_the_record(folder: Path) -> None:
    """Rank 0 records; rank 1 loses all and replays the file."""
    for mode in ("inplace", "virtual"):
        path = folder / f"{mode}.zoopt"
        model = mlp()
        options: dict[str, Any] = {"perturbation": mode, "num_probes": 2, "seed": 7, "lr": 1e-2}
        optimizer = zoopt.MeZO(model.named_parameters(), process_group=world(), **options)
        recorder = optimizer.record(path, model)
        rank = dist.get_rank()
        part = slice(32 * rank, 32 * rank + 32)

        def loss(model: nn.Module, part: slice = part) -> Callable[[], torch.Tensor]:
            x, y = (values[part] for values in regression())
            return lambda: (model(x) - y).pow(2).mean()

        for _ in range(2):
            optimizer.step(loss(model))
        optimizer.probe(loss(model))
        optimizer.probe(loss(model))
        optimizer.step()
        dist.barrier()
        if rank == 1:
            model = mlp()
            optimizer = zoopt.replay(model, path)  # type: ignore[assignment]
            optimizer.join(world())
        assert_equal_everywhere(model, mode)
        optimizer.step(loss(model))
        assert_equal_everywhere(model, mode)
        recorder.close()
        dist.barrier()
        again = mlp()
        zoopt.replay(again, path)
        assert bits(again) == bits(model)


def a_divided_population_is_recorded(folder: Path) -> None:
    path, model = folder / "population.zoopt", mlp()
    optimizer = zoopt.EvolutionStrategy(
        model.named_parameters(),
        population_size=6,
        seed=7,
        process_group=world(),
        parallel="probes",
    )
    recorder = optimizer.record(path, model)
    for _ in range(STEPS):
        optimizer.step(closure_of(model))
    recorder.close()
    dist.barrier()
    again = mlp()
    zoopt.replay(again, path)
    assert bits(again) == bits(model)


SCENARIOS: dict[int, list[Scenario]] = {
    4: [
        a_mesh_of_equal_data_and_divided_probes_is_one_process,
        parts_of_a_batch_make_the_whole,
    ],
    2: [
        ranks_with_equal_data_are_one_process,
        divided_probes_are_those_of_one_process,
        parts_of_a_batch_make_the_whole,
        micro_batches_add_up,
        a_rank_without_weight_counts_for_nothing,
        random_numbers_stay_alike,
        other_random_numbers_are_warned_of,
        a_rank_alone_is_told_so_once,
        codes_move_together,
        what_is_no_group_is_refused,
        a_population_by_hand_is_nobodys_exchange,
        a_rank_comes_back_from_the_record,
        a_divided_population_is_recorded,
    ],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(SCENARIOS, tmp_path_factory.mktemp("steps"))


@scenario_cases(SCENARIOS)
def test_together(processes: int, scenario: Scenario, ran: Path) -> None:
    message = failure(scenario, processes, ran)
    assert message is None, message
