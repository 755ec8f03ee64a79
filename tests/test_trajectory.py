"""Recorded runs: the same weights from the file, and no wrong ones from a damaged file."""

from __future__ import annotations

import copy
import multiprocessing
import os
import random
import sys
import time
import warnings
from concurrent.futures import wait
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zoopt
from tests.compare import equal, same
from tests.optimizer_table import CASES, Row, closure_of, mlp
from tests.processes import KERNELS
from zoopt.cli import main
from zoopt.trajectory import TrajectoryError, replay, resume, script
from zoopt.trajectory.format import Event, Kind, encode, encode_header, read
from zoopt.zeroth_order.engine import chunks
from zoopt.zeroth_order.engine import noise as engine_noise

RECORDABLE = [(row, mode) for row, mode in CASES if row.cls.recordable]  # type: ignore[attr-defined]


def recorded(
    path: Path, row: Row, mode: str, dtype: torch.dtype, steps: int = 4, close: bool = True
) -> tuple[nn.Module, nn.Module, Any]:
    """The model before and after a recorded run with a scheduler, and the optimizer."""
    base = mlp(dtype)
    model = copy.deepcopy(base)
    optimizer = row.build(model, perturbation=mode)
    optimizer.record(path, model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, 5)
    for _ in range(steps):
        optimizer.step(closure_of(model, dtype))
        scheduler.step()
    if close:
        optimizer.recorder.close()
    return base, model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("row", "mode"), RECORDABLE, ids=str)
def test_a_replay_has_the_bits_of_the_run(
    row: Row, mode: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, model, optimizer = recorded(tmp_path / "run", row, mode, dtype)
    again = replay(base, tmp_path / "run")
    assert same(base, model)
    assert again.last_step == optimizer.last_step
    assert str(again.state_dict()["state"]) == str(optimizer.state_dict()["state"])


#: Steps that read nothing but losses, of parameters without state but a momentum buffer.
SCRIPTED = {
    *("momentum", "momentum probes decay", "indices momentum"),
    *("plain", "probes", "one-sided", "rademacher", "decay", "window", "window one-sided"),
    *("clipped", "ascent", "blocks", "blocks window", "random mask", "indices", "scalar"),
    *("elementwise", "projected", "three", "reused"),
    *("zscore None", "rank None", "pair-sign None", "single"),
}


@pytest.mark.parametrize("row", {row.name: row for row, _ in RECORDABLE}.values(), ids=str)
def test_many_steps_are_one_pass(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they can be; elsewhere each is made alone, as the run made it."""
    base, _, _ = recorded(tmp_path / "run", row, "inplace", torch.float32)
    passes: list[int] = []
    made = script.write_each_

    def counted(theta: Any, writes: Any, **options: Any) -> Any:
        passes.append(len(writes))
        return made(theta, writes, **options)

    monkeypatch.setattr(script, "write_each_", counted)
    can_be = row.name.partition(" ")[2] in SCRIPTED or row.name in ("FZOO", "ZOAdam window")
    can_be = can_be and not row.options.get("rank")
    if can_be:
        for module in (chunks, engine_noise):
            monkeypatch.delattr(module, "apply_")  # by which each would be made alone
    replay(base, tmp_path / "run")
    assert bool(passes) is can_be
    assert min(passes, default=2) >= 2  # of a block, where there are several


@pytest.mark.parametrize("steps", [1, 3])
def test_passes_of_few_steps_have_the_bits_of_one(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model, _ = recorded(tmp_path / "run", *CASES[0], torch.float32, steps=8)
    monkeypatch.setattr(sys.modules["zoopt.trajectory.replay"], "_STEPS", steps)
    replay(base, tmp_path / "run")
    assert same(base, model)


def test_parameters_tied_by_their_data_are_replayed(tmp_path: Path) -> None:
    """Two of a layer's shape in one memory: their writes take turns, in each step."""

    def tied() -> nn.Module:
        torch.manual_seed(1)
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        for one, two in zip(first.parameters(), second.parameters(), strict=True):
            two.data = one.data
        return nn.Sequential(first, second)

    base, model = tied(), tied()
    optimizer = zoopt.MeZO(model.named_parameters(), 1e-2, seed=1)
    optimizer.record(tmp_path / "run", model)
    for _ in range(4):
        optimizer.step(lambda: model(torch.ones(2, 4)).square().sum())
    optimizer.recorder.close()
    replay(base, tmp_path / "run")
    assert same(base, model)


def mezo(model: nn.Module, **options: Any) -> zoopt.MeZO:
    return zoopt.MeZO(model.named_parameters(), **{"lr": 1e-2, "seed": 3, **options})


def test_everything_that_happens_between_steps_is_recorded(tmp_path: Path) -> None:
    """Micro-batches, dropped probes, losses that are not finite, and changed groups."""
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model, momentum=0.9, momentum_window=3, num_probes=2)
    optimizer.record(tmp_path / "run", model)
    closure = closure_of(model)
    optimizer.step(closure)
    optimizer.probe(closure)
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.probe(lambda: closure() / 2)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.step()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(lambda: closure() * float("nan"))
    optimizer.param_groups[0].update(zo_eps=1e-2, lr=torch.tensor(1e-3))
    next(model.parameters()).requires_grad_(False)
    for _ in range(3):
        optimizer.step(closure)
    again = replay(base, tmp_path / "run")
    assert same(base, model)
    assert again.param_groups[0]["zo_eps"] == 1e-2
    assert again.skipped_probes == optimizer.skipped_probes == 2


@pytest.mark.parametrize("mode", ["inplace", "virtual"])
def test_evaluations_that_fail_are_part_of_the_run(mode: str, tmp_path: Path) -> None:
    """In place they leave rounding behind, which a replay repeats."""
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model, perturbation=mode, zo_eps=0.1)
    optimizer.record(tmp_path / "run", model)
    closure = closure_of(model)
    for calls in (0, 1):
        left = iter(range(calls))

        def failing(left: Any = left) -> torch.Tensor:
            if next(left, None) is None:
                raise ValueError("of the user")
            return closure()

        optimizer.probe(closure)
        with pytest.raises(ValueError, match="of the user"):
            optimizer.step(failing)
        optimizer.step()
    assert replay(base, tmp_path / "run").param_groups[0]["step"] == 2
    assert same(base, model)


def test_a_warning_that_is_an_error_ends_no_recording(tmp_path: Path) -> None:
    """It comes last: the step, which learnt nothing, is taken and recorded."""
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model, perturbation="inplace")
    optimizer.record(tmp_path / "run", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not finite"):
            optimizer.step(lambda: closure_of(model)() * float("nan"))
    optimizer.step(closure_of(model))
    assert replay(base, tmp_path / "run").param_groups[0]["step"] == 2
    assert same(base, model)


def test_an_error_between_evaluations_ends_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes were made that no record tells of; virtually none are made."""
    for mode in ("inplace", "virtual"):
        model = mlp()
        optimizer = mezo(model, perturbation=mode)
        optimizer.record(tmp_path / mode, model)
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "_refine", lambda *_: [][0])
            with pytest.raises(IndexError):
                optimizer.step(closure_of(model))
        if mode == "virtual":
            optimizer.step(closure_of(model))
            continue
        with pytest.raises(TrajectoryError, match="has ended: an error came in the middle"):
            optimizer.step(closure_of(model))


def test_a_step_after_a_closure_that_failed_has_no_losses_of_it(tmp_path: Path) -> None:
    base = mlp(torch.bfloat16)
    model = copy.deepcopy(base)
    optimizer = mezo(model)
    optimizer.record(tmp_path / "run", model)
    closure = closure_of(model, torch.bfloat16)
    returned: list[int] = []

    def failing() -> torch.Tensor:
        if len(returned) == 1:
            raise ValueError("of the user")
        returned.append(1)
        return closure()

    for _ in range(2):
        optimizer.probe(closure)
        returned.clear()
        with pytest.raises(ValueError, match="of the user"):
            optimizer.step(failing)
        optimizer.step()
    replay(base, tmp_path / "run")
    assert same(base, model)


def test_what_is_changed_before_a_drop_is_recorded(tmp_path: Path) -> None:
    """Groups, which a replay changes too, and weights, which it cannot."""
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model)
    recorder = optimizer.record(tmp_path / "run", model)
    optimizer.probe(closure_of(model))
    optimizer.param_groups[0]["zo_eps"] = 1e-2
    optimizer.zero_grad()
    optimizer.step(closure_of(model))
    replay(base, tmp_path / "run")
    assert same(base, model)
    optimizer.probe(closure_of(model))
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    optimizer.zero_grad()
    with pytest.raises(TrajectoryError, match="by somebody else"):
        optimizer.step(closure_of(model))
    recorder.close()


def test_what_was_probed_before_a_kill_is_not_there_afterwards(tmp_path: Path) -> None:
    """A probe behind the last step: the run that goes on knows nothing of it."""
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model)
    recorder = optimizer.record(tmp_path / "run", model)
    optimizer.step(closure_of(model))
    optimizer.probe(closure_of(model))
    recorder.close()
    going_on = copy.deepcopy(base)
    resumed = resume(going_on, tmp_path / "run")
    resumed.step(lambda: closure_of(going_on)() * 2)
    resumed.recorder.close()  # type: ignore[union-attr]
    replay(base, tmp_path / "run")
    assert same(base, going_on)


@pytest.mark.parametrize("rank", [None, 2])
def test_fitnesses_from_elsewhere_are_recorded(rank: int | None, tmp_path: Path) -> None:
    base = mlp()
    model = copy.deepcopy(base)
    options: dict[str, Any] = {"lr": 1e-2, "population_size": 4, "seed": 3, "rank": rank}
    optimizer = zoopt.EvolutionStrategy(model.named_parameters(), perturbation="virtual", **options)
    optimizer.record(tmp_path / "run")
    optimizer.step(closure_of(model))
    optimizer.update(optimizer.evaluate(closure_of(model)))
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.update([0.5, float("nan"), 0.25, 1.0])
    optimizer.step(closure_of(model))
    again = replay(base, tmp_path / "run")
    assert same(base, model)
    assert str(again.last_step) == str(optimizer.last_step)
    in_place = zoopt.EvolutionStrategy(base.named_parameters(), perturbation="inplace", **options)
    in_place.record(tmp_path / "other")
    with pytest.raises(ValueError, match="perturbation must be 'virtual' to call evaluate"):
        in_place.evaluate(closure_of(base))


def test_a_run_can_be_recorded_from_the_start(tmp_path: Path) -> None:
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model, record=tmp_path / "run")
    optimizer.step(closure_of(model))
    optimizer.recorder.close()  # type: ignore[union-attr]
    replay(base, tmp_path / "run")
    assert same(base, model)
    with pytest.raises(ValueError, match="an optimizer made from named parameters, got neither"):
        zoopt.MeZO(model.parameters(), record=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("row", {row.name: row for row, _ in RECORDABLE}.values(), ids=str)
def test_every_class_that_can_be_recorded_has_the_argument(row: Row, tmp_path: Path) -> None:
    """It begins the same file as `record`, and is no hyperparameter."""
    model = mlp()
    optimizer = row.build(model, record=tmp_path / "argument")
    assert "record" not in optimizer.param_groups[0]
    row.build(model).record(tmp_path / "method", model)
    assert (tmp_path / "argument").read_bytes() == (tmp_path / "method").read_bytes()
    optimizer.step(closure_of(model))
    assert read(tmp_path / "argument").steps == 1


def test_a_run_goes_on_after_an_earlier_step(tmp_path: Path) -> None:
    """The later steps are gone from the file, and the others are as they were."""
    base = mlp()
    path = tmp_path / "run"
    optimizer = mezo(model := copy.deepcopy(base))
    optimizer.record(path, model)
    for _ in range(2):
        optimizer.step(closure_of(model))
    kept = path.read_bytes()
    for _ in range(3):
        optimizer.step(closure_of(model))
    optimizer.recorder.close()  # type: ignore[union-attr]
    whole, going_on = path.read_bytes(), copy.deepcopy(base)
    with pytest.raises(ValueError, match=r"until must be in \[0, 5\]"):
        resume(going_on, path, until=6)
    assert path.read_bytes() == whole
    resumed = resume(going_on, path, until=2)
    assert path.read_bytes() == kept
    resumed.step(lambda: closure_of(going_on)() * 2)
    resumed.recorder.close()  # type: ignore[union-attr]
    assert read(path).steps == 3
    replay(base, path)
    assert same(base, going_on)
    assert not same(base, model)


def test_weights_that_somebody_else_writes_are_told(tmp_path: Path) -> None:
    model = mlp()
    optimizer = mezo(model)
    optimizer.record(tmp_path / "run", model)
    optimizer.step(closure_of(model))
    model.load_state_dict(mlp().state_dict())
    with pytest.raises(TrajectoryError, match="the weights were written since the last step"):
        optimizer.step(closure_of(model))


def test_replays_until_any_step(tmp_path: Path) -> None:
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model)
    optimizer.record(tmp_path / "run", model)
    states = [copy.deepcopy(model)]
    for _ in range(4):
        optimizer.step(closure_of(model))
        states.append(copy.deepcopy(model))
    for until, expected in enumerate(states):
        restored = copy.deepcopy(base)
        assert replay(restored, tmp_path / "run", until=until).param_groups[0]["step"] == until
        assert same(restored, expected)
    with pytest.raises(ValueError, match=r"until must be in \[0, 4\]"):
        replay(copy.deepcopy(base), tmp_path / "run", until=5)


def test_a_run_can_be_applied_to_other_weights(tmp_path: Path) -> None:
    base, _, _ = recorded(tmp_path / "run", *CASES[0], torch.float32)
    other = mlp()
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1.0)
    before = copy.deepcopy(other)
    with pytest.raises(TrajectoryError, match="weights are not those"):
        replay(other, tmp_path / "run")
    assert same(other, before)
    replay(other, tmp_path / "run", check_base=False)
    replay(base, tmp_path / "run")
    for moved, trained in zip(other.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(moved - 1.0, trained, atol=1e-6, rtol=0)


def test_a_step_takes_fifteen_bytes(tmp_path: Path) -> None:
    """20,000 steps of plain MeZO in less than 400 KB; the header is the model's."""
    losses = Event(Kind.STEP, (0.5, 0.25))
    record, _ = encode(losses, 7)
    assert len(record) == 15
    model = nn.Linear(4, 1)
    optimizer = mezo(model)
    optimizer.record(tmp_path / "run", model)
    start = (tmp_path / "run").stat().st_size
    x = torch.ones(2, 4)
    for _ in range(100):
        optimizer.step(lambda: model(x).pow(2).sum())
    size = (tmp_path / "run").stat().st_size - start
    assert size <= 100 * 15 + 4  # the first evaluation is repeated
    assert start + 200 * size < 400e3


def test_twenty_thousand_steps_take_less_than_400_kilobytes(tmp_path: Path) -> None:
    assert len(contents_of(tmp_path / "run", 20_000)) < 400e3 - 4096  # a header's
    assert read(tmp_path / "run").steps == 20_000


@pytest.mark.parametrize(("sync_every", "forced"), [(0.0, 5), (1e9, 0)])
def test_a_file_is_forced_to_the_disk_as_often_as_asked(
    sync_every: float, forced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written at each step it is in any case: another process can read it."""
    model = mlp()
    optimizer = mezo(model)
    recorder = optimizer.record(tmp_path / "run", model, sync_every=sync_every)
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    for step in range(1, 6):
        optimizer.step(closure_of(model))
        assert read(tmp_path / "run").steps == step
    assert len(calls) == forced
    recorder.close()
    assert len(calls) == forced + 1


@pytest.mark.parametrize("sync_every", [0.0, 1e-9])
def test_a_disk_that_cannot_be_synced_is_told_and_no_step_is_written_twice(
    sync_every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or, where the file is synced beside the steps, at the next sync."""
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model)
    recorder: Any = optimizer.record(tmp_path / "run", model, sync_every=sync_every)
    fsync, left = os.fsync, iter(range(1))

    def failing(file: int) -> None:
        if next(left, None) is not None:
            raise OSError(5, "Input/output error")
        fsync(file)

    monkeypatch.setattr(os, "fsync", failing)
    told = 0
    for _ in range(4):
        try:
            optimizer.step(closure_of(model))
        except OSError:
            told += 1
        if recorder._syncing is not None:
            wait([recorder._syncing])
    assert told == 1
    recorder.close()
    assert read(tmp_path / "run").steps == optimizer.param_groups[0]["step"] == 4
    replay(base, tmp_path / "run")
    assert same(base, model)


@pytest.mark.parametrize("end", ["close", "flush"])
def test_the_last_sync_beside_the_steps_is_told_too(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk tells of a loss once: the next sync of the file succeeds."""
    model = mlp()
    optimizer = mezo(model)
    recorder: Any = optimizer.record(tmp_path / "run", model, sync_every=1e-9)

    def failing(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        optimizer.step(closure_of(model))
        wait([recorder._syncing])
    with pytest.raises(OSError, match="Input/output error"):
        getattr(recorder, end)()
    assert (optimizer.recorder is None) == (end == "close")
    recorder.flush()
    recorder.close()
    assert optimizer.recorder is None
    assert read(tmp_path / "run").steps == 1


def contents_of(path: Path, steps: int) -> bytes:
    """A file of that many steps whose losses say where they belong."""
    header = encode_header({"format": 1, "groups": [{}], "zoopt": "0"})
    chain = int.from_bytes(header[-4:], "little")
    data = header
    for step in range(steps):
        record, chain = encode(Event(Kind.STEP, (float(step), -float(step))), chain)
        data += record
    path.write_bytes(data)
    return data


def test_damage_is_an_error_or_a_shorter_run(tmp_path: Path) -> None:
    """300 random flips, cuts, swaps and duplications: never other losses than were recorded."""
    choose = random.Random(5)
    path = tmp_path / "run"
    data = contents_of(path, 40)
    whole = [event.losses for event in read(path).events]
    shorter = 0
    for trial in range(300):
        damaged = bytearray(data)
        kind = trial % 4
        at, length = choose.randrange(len(data)), choose.randrange(1, 60)
        if kind == 0:
            damaged[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del damaged[at:]
        elif kind == 2:
            other = choose.randrange(len(data))
            a, b = sorted((at, other))
            a_end, b_end = min(a + length, b), min(b + length, len(data))
            damaged = (
                damaged[:a]
                + damaged[b:b_end]
                + damaged[a_end:b]
                + damaged[a:a_end]
                + (damaged[b_end:])
            )
        else:
            damaged = damaged[:at] + damaged[at : at + length] * 2 + damaged[at + length :]
        path.write_bytes(damaged)
        try:
            contents = read(path)
        except TrajectoryError:
            continue
        losses = [event.losses for event in contents.events]
        assert losses == whole[: len(losses)]
        # Only what was cut off, or a last record that cannot be told from one, is left out.
        assert kind == 1 or bytes(damaged) == data or len(losses) >= len(whole) - 5, kind
        shorter += len(losses) < len(whole)
    assert shorter


def test_only_the_end_of_a_file_is_cut_off(tmp_path: Path) -> None:
    """A length in the middle that leads beyond the end is damage, and no torn record."""
    path = tmp_path / "run"
    data = bytearray(contents_of(path, 40))
    middle = len(data) - 15 * 20
    data[middle + 1] = 0x7F
    path.write_bytes(data)
    with pytest.raises(TrajectoryError, match="a length does not have its checksum"):
        read(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"PK" + data, "is no trajectory of zoopt"),
        (lambda data: data[:20], "ends within its header"),
        (lambda data: data[:30] + b"\0" + data[31:], "is damaged in its header"),
        (
            lambda data: encode_header({"format": 9, "groups": [], "zoopt": "7"}),
            "must be of format 1, got 9; install the version of zoopt that wrote it, 7",
        ),
    ],
)
def test_other_files_are_told(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    recorded(path, *CASES[0], torch.float32, steps=1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrajectoryError, match=message):
        replay(mlp(), path)


def test_other_models_are_told(tmp_path: Path) -> None:
    recorded(tmp_path / "run", *CASES[0], torch.float32, steps=1)
    with pytest.raises(TrajectoryError, match=r"must have a parameter '0.weight', torch.float32"):
        replay(mlp(torch.bfloat16), tmp_path / "run")
    with pytest.raises(TrajectoryError, match=r"must have a parameter '0.weight'.* got none"):
        replay(nn.Linear(2, 2), tmp_path / "run")


def test_what_cannot_be_recorded_is_told(tmp_path: Path) -> None:
    model = mlp()
    optimizer = mezo(model)
    with pytest.raises(ValueError, match="must be one of the model's"):
        optimizer.record(tmp_path / "run", nn.Linear(2, 2))
    optimizer.step(closure_of(model))
    with pytest.raises(ValueError, match="must begin before the first step, got MeZO at step 1"):
        optimizer.record(tmp_path / "run", model)
    with pytest.raises(ValueError, match="ForwardGrad cannot be recorded"):
        zoopt.ForwardGrad(model.parameters()).record(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()
    mezo(model).record(tmp_path / "run", model)
    with pytest.raises(FileExistsError, match="a recording must begin in a new file"):
        mezo(model).record(tmp_path / "run", model)


def test_two_writers_are_told(tmp_path: Path) -> None:
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model)
    optimizer.record(tmp_path / "run", model)
    optimizer.step(closure_of(model))
    with pytest.raises(TrajectoryError, match="another process writes to"):
        resume(base, tmp_path / "run")


def test_a_full_disk_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that could not be written is written by the next call."""
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model)
    recorder = optimizer.record(tmp_path / "run", model)
    optimizer.step(closure_of(model))
    write = recorder._write

    def full(data: bytes) -> None:
        write(data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        optimizer.step(closure_of(model))
    monkeypatch.setattr(recorder, "_write", write)
    optimizer.step(closure_of(model))
    recorder.close()
    assert read(tmp_path / "run").steps == 3
    replay(base, tmp_path / "run")
    assert same(base, model)


@pytest.mark.parametrize("how", ["write", "part of a write", "sync"])
@pytest.mark.parametrize("call", ["probe", "zero_grad", "probe and zero_grad"])
def test_a_probe_or_drop_that_could_not_be_written_is_written_before_the_next_event(
    call: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = mlp()
    model = copy.deepcopy(base)
    optimizer = mezo(model)
    recorder = optimizer.record(tmp_path / "run", model, sync_every=0.0)
    write = os.write

    def failing(file: int, data: bytes = b"") -> int:
        if how == "part of a write" and len(data) > 5:
            return write(file, data[:5])
        raise OSError(28, "No space left on device")

    def with_a_full_disk(function: Any, *args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync" if how == "sync" else "write", failing)
            with pytest.raises(OSError, match="No space left"):
                function(*args)

    if "probe" in call:
        with_a_full_disk(optimizer.probe, closure_of(model))
    else:
        optimizer.probe(closure_of(model))
    if "zero_grad" in call:
        with_a_full_disk(optimizer.zero_grad)
        assert not optimizer.has_pending
        optimizer.zero_grad()
        optimizer.probe(closure_of(model))
    optimizer.step()
    optimizer.step(closure_of(model))
    recorder.close()
    kinds = {"probe": "PA", "zero_grad": "PDPA", "probe and zero_grad": "PDPA"}[call]
    names = {"P": Kind.PROBE, "D": Kind.DROP, "A": Kind.APPLY}
    contents = read(tmp_path / "run")
    assert [event.kind for event in contents.events] == [*(names[k] for k in kinds), Kind.STEP]
    assert contents.steps == 2
    replay(base, tmp_path / "run")
    assert same(base, model)


def train(path: Path, ready: Connection) -> None:
    """Go on with the run, or begin it."""
    model = mlp()
    if path.exists():
        optimizer = resume(model, path)
    else:
        optimizer = mezo(model)
        optimizer.record(path, model)
    ready.send(path.stat().st_size)
    for _ in range(3000):
        optimizer.step(closure_of(model))


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Killed three times, and compared with the run that never stopped."""
    path = tmp_path / "run"
    choose = random.Random(11)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *KERNELS])
    for _ in range(3):
        ours, ready = context.Pipe(duplex=False)
        child = context.Process(target=train, args=(path, ready))
        child.start()
        ready.close()
        begun = ours.recv()
        while child.is_alive() and path.stat().st_size < begun + 100:
            time.sleep(0.01)
        assert path.stat().st_size >= begun + 100
        time.sleep(choose.uniform(0.0, 0.2))
        child.kill()
        child.join()
    steps = read(path).steps
    assert steps > 0
    restored, expected = mlp(), mlp()
    replay(restored, path)
    optimizer = mezo(expected)
    for _ in range(steps):
        optimizer.step(closure_of(expected))
    assert same(restored, expected)


def test_a_torn_record_is_reported_and_cut_off(tmp_path: Path) -> None:
    base, _, optimizer = recorded(tmp_path / "run", *CASES[0], torch.float32, close=False)
    data = (tmp_path / "run").read_bytes()
    os.close(optimizer.recorder._file)  # As a kill does.
    (tmp_path / "run").write_bytes(data[:-3])
    model = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="a record that was cut off; the steps before it, 3, are"):
        optimizer = resume(model, tmp_path / "run")
    optimizer.step(closure_of(model))
    optimizer.recorder.close()  # type: ignore[union-attr]
    assert read(tmp_path / "run").torn == 0
    replay(base, tmp_path / "run")
    assert same(base, model)


def test_the_command_reads_checks_and_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(tmp_path / "run"), tmp_path / "out.safetensors"
    base, model, _ = recorded(tmp_path / "run", *CASES[0], torch.bfloat16)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    assert main(["trajectory", "info", path]) == 0
    table = capsys.readouterr().out
    assert "MeZO" in table
    assert "6 tensors, 112 elements" in table
    assert main(["trajectory", "verify", path]) == 0
    arguments = ["replay", path, "--base", str(tmp_path / "base.safetensors"), "--out", str(out)]
    assert main(["trajectory", *arguments]) == 0
    trained = load_file(out)
    assert all(torch.equal(trained[name], p) for name, p in model.named_parameters())
    assert main(["trajectory", *arguments, "--delta"]) == 0
    for name, delta in load_file(out).items():
        moved = model.get_parameter(name).float() - base.get_parameter(name).float()
        assert torch.equal(delta, moved)
    assert main(["trajectory", *arguments, "--until", "0"]) == 0
    untrained = load_file(out)
    assert all(torch.equal(untrained[name], p) for name, p in base.named_parameters())
    capsys.readouterr()
    assert main(["trajectory", *arguments, "--until", "9"]) == 2
    assert "until must be in [0, 4]" in capsys.readouterr().err
    damaged = bytearray((tmp_path / "run").read_bytes())
    damaged[-20] ^= 1
    (tmp_path / "run").write_bytes(damaged)
    assert main(["trajectory", "verify", path]) == 1
    assert "is damaged at byte" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "decay", "window", "blocks", "random mask", "indices"])
def test_the_closed_form_is_the_run_but_for_rounding(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In float32 a step in place rounds each weight, below 4, at most three times by 2^-23 / 2; in
    bfloat16 once, stochastically, by less than 2^-6. The closed form rounds twice (and its sum of
    8 terms, which are smaller)."""
    [row] = [row for row, mode in CASES if row.name == f"MeZO {name}" and mode == "inplace"]
    mode = "inplace" if dtype == torch.float32 else "virtual"
    base, model, optimizer = recorded(tmp_path / "run", row, mode, dtype, steps=8)
    assert max(p.abs().max() for p in model.parameters()) < 4
    again = replay(base, tmp_path / "run", exact=False)
    assert equal(again.state_dict(), optimizer.state_dict())
    bound = (8 * 3 + 3) * 4 * 2.0**-24 if dtype == torch.float32 else 9 * 2.0**-6
    for p, q in zip(base.parameters(), model.parameters(), strict=True):
        assert (p.double() - q.double()).abs().max() <= bound
    assert not same(base, mlp(dtype))


def test_what_has_no_closed_form_is_told(tmp_path: Path) -> None:
    for name in ("ZOSignSGD elementwise", "ZOAdam window", "ZOAdam dense", "MeZO momentum"):
        row = next(row for row, _ in CASES if row.name == name)
        path = tmp_path / name
        base, _, _ = recorded(path, row, "inplace", torch.float32)
        before = copy.deepcopy(base)
        message = f"exact must be True for this run of {row.cls.__name__}, got False"
        with pytest.raises(ValueError, match=message):
            replay(base, path, exact=False)
        assert same(base, before)
