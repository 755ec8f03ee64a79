"""Recorded runs whose weights, state or file others change; file systems that lack something."""

from __future__ import annotations

import copy
import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import zoopt
from tests.compare import same
from tests.optimizer_table import closure_of, mlp
from tests.test_trajectory import mezo
from zoopt.cli import main
from zoopt.trajectory import TrajectoryError, delta, drop, merge, replay, resume, revert, watch
from zoopt.trajectory.format import read


def recorded(path: Path, steps: int = 2, **options: Any) -> tuple[nn.Module, Any]:
    """A model, and its optimizer after some recorded steps."""
    model = mlp()
    optimizer = mezo(model, **options)
    optimizer.record(path, model)
    for _ in range(steps):
        optimizer.step(closure_of(model))
    return model, optimizer


def changed_state(optimizer: Any) -> None:
    next(iter(optimizer.state.values()))["momentum_buffer"].zero_()


@pytest.mark.parametrize(
    "change", [changed_state, lambda optimizer: optimizer.state.clear()], ids=["written", "gone"]
)
def test_state_that_somebody_else_changes_is_told(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model, optimizer = recorded(tmp_path / "run", momentum=0.9)
    change(optimizer)
    with pytest.raises(TrajectoryError, match="the optimizer's state was changed since"):
        optimizer.step(closure_of(model))


def test_a_recorded_run_loads_no_state(tmp_path: Path) -> None:
    """Of a stateless class a checkpoint is numbers, which the file holds."""
    for options in ({"momentum": 0.9}, {"momentum": 0.9, "momentum_window": 3}):
        model = mlp()
        first = mezo(model, **options)
        first.step(closure_of(model))
        saved, base = copy.deepcopy(first.state_dict()), copy.deepcopy(model)
        path = tmp_path / str(len(options))
        optimizer = mezo(model, record=path, **options)
        if "momentum_window" not in options:
            before = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(ValueError, match="state must not be loaded while the run is"):
                optimizer.load_state_dict(saved)
            assert optimizer.state_dict() == before
            continue
        optimizer.load_state_dict(saved)
        optimizer.step(closure_of(model))
        optimizer.recorder.close()  # type: ignore[union-attr]
        assert replay(base, path).param_groups[0]["step"] == 2
        assert same(base, model)


@pytest.mark.parametrize("how", ["written", "replaced", "equal"])
def test_masks_that_change_are_recorded(how: str, tmp_path: Path) -> None:
    base = mlp()
    mask = {name: torch.arange(2) for name, _ in base.named_parameters()}
    model, optimizer = recorded(tmp_path / "run", mask=mask)
    held = optimizer.param_groups[0]["mask"]
    before = len(read(tmp_path / "run").events)
    if how == "written":
        held[0].add_(1)
    else:
        other = 0 if how == "equal" else 1
        optimizer.param_groups[0]["mask"] = [torch.arange(2).roll(other) for _ in held]
    optimizer.step(closure_of(model))
    assert len(read(tmp_path / "run").events) - before == (1 if how == "equal" else 2)
    replay(base, tmp_path / "run")
    assert same(base, model)


def test_writes_that_torch_does_not_count_are_found_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hash of a closed file, however the replay is asked for."""
    monkeypatch.setattr(watch, "_SAMPLED", 0)
    path, base = tmp_path / "run", mlp()
    model, optimizer = recorded(path)
    model[0].weight.data.view(-1)[3] += 1.0  # type: ignore[index, operator, union-attr]
    optimizer.step(closure_of(model))
    optimizer.recorder.close()
    again = copy.deepcopy(base)
    replay(copy.deepcopy(base), path, until=2)
    with pytest.raises(TrajectoryError, match=r"after step 3 are not those that .* has ended"):
        replay(copy.deepcopy(base), path)
    replay(again, path, check_base=False)
    again = copy.deepcopy(base)
    for use in (delta, lambda *given: merge(given[0], [path])):
        with pytest.raises(TrajectoryError, match="weights after step 3"):
            use(again, path)
        assert same(again, base)
    with pytest.raises(TrajectoryError, match="weights after step 3"):
        resume(again, path)
    resume(copy.deepcopy(base), path, check_base=False).recorder.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_writes_that_torch_does_not_count_are_found_at_once(how: str, tmp_path: Path) -> None:
    model, optimizer = recorded(tmp_path / "run")
    for param in model.parameters():
        if how == "written":
            param.data.mul_(0.5)
        else:
            param.data = param.data * 0.5
    with pytest.raises(TrajectoryError, match="the weights were written since the last step"):
        optimizer.step(closure_of(model))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 5)])
def test_every_element_is_looked_at_in_turn(shape: tuple[int, ...]) -> None:
    values = torch.arange(max(1, torch.Size(shape).numel())).view(shape)
    for tensor in (values, values.transpose(0, -1) if shape else values):
        seen = [watch._element(tensor, number) for number in range(1, 200)]
        numbers = {
            int.from_bytes(own, sys.byteorder) if isinstance(own, bytes) else int(own)
            for own in seen
        }
        assert numbers == set(values.flatten().tolist())


@pytest.mark.parametrize("mode", ["inplace", "virtual"])
def test_the_hash_at_the_end_is_of_the_last_step(mode: str, tmp_path: Path) -> None:
    """There is none behind probes, whose passes round the weights; a run that goes on has its own,
    and the file reads as one that was not closed."""
    path, base = tmp_path / "run", mlp()
    model, optimizer = recorded(path, perturbation=mode)
    optimizer.probe(closure_of(model))
    optimizer.recorder.close()
    assert read(path).trained is None
    again = copy.deepcopy(base)
    resumed = resume(again, path)
    resumed.recorder.close()  # type: ignore[union-attr]
    first = read(path)
    assert first.trained is not None
    assert [len(first.events), first.torn] == [2, 0]
    resumed = resume(copy.deepcopy(base), path)
    assert read(path).trained is None
    resumed.recorder.close()  # type: ignore[union-attr]
    assert read(path) == first
    with pytest.raises(ZeroDivisionError):
        mezo(again, record=tmp_path / "other").step(lambda: 1 / 0)
    replay(base, path)
    assert same(base, again)


def fails(monkeypatch: Any, name: str, error: int, only: Callable[[int], bool]) -> None:
    real = getattr(os, name)

    def failing(file: int, *data: bytes) -> Any:
        if only(file):
            raise OSError(error, os.strerror(error))
        return real(file, *data)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_file_that_cannot_be_begun_is_not_left_behind(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = mezo(model)
    with monkeypatch.context() as patch:
        fails(patch, where, errno.ENOSPC, lambda file: True)
        with pytest.raises(OSError, match="No space left"):
            optimizer.record(tmp_path / "run", model)
    assert not list(tmp_path.iterdir())
    assert optimizer.recorder is None
    optimizer.record(tmp_path / "run", model)


@pytest.mark.parametrize("lacks", ["locks", "a folder's sync", "sync"])
def test_file_systems_that_lack_something_are_recorded_to(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    base = mlp()
    if lacks == "locks":

        def without(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", without)
    else:
        fails(
            monkeypatch,
            "fsync",
            errno.EINVAL,
            lambda file: lacks == "sync" or stat.S_ISDIR(os.fstat(file).st_mode),
        )
    model, optimizer = recorded(tmp_path / "run", steps=1)
    optimizer.recorder.close()
    resumed = resume(base, tmp_path / "run")
    for own, trained in ((resumed, base), (optimizer, model)):
        own.step(closure_of(trained))
    resumed.recorder.close()  # type: ignore[union-attr]
    assert same(base, model)


@pytest.mark.parametrize("how", ["deleted", "replaced", "emptied", "written"])
def test_a_file_that_others_change_ends_the_recording(how: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    model, optimizer = recorded(path)
    if how == "deleted":
        path.unlink()
    elif how == "replaced":
        (tmp_path / "other").write_bytes(path.read_bytes())
        (tmp_path / "other").rename(path)
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        with path.open("ab") as file:
            file.write(b"x")
    message = "deleted or replaced" if how in ("deleted", "replaced") else "somebody else has writ"
    before = copy.deepcopy(model)
    with pytest.raises(TrajectoryError, match=f"has ended: .*{message}"):
        optimizer.step(closure_of(model))
    assert same(before, model)
    optimizer.recorder.close()
    optimizer.step(closure_of(model))


def test_a_file_that_is_moved_is_written_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of a relative path, after a change of the folder."""
    base = mlp()
    monkeypatch.chdir(tmp_path)
    model, optimizer = recorded(Path("run"))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    optimizer.step(closure_of(model))
    optimizer.recorder.close()
    assert replay(base, tmp_path / "elsewhere").param_groups[0]["step"] == 3
    assert same(base, model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_does_not_write_to_its_parents_file(tmp_path: Path) -> None:
    base = mlp()
    model, optimizer = recorded(tmp_path / "run")
    child = os.fork()
    if not child:
        try:
            optimizer.step(closure_of(model))
        except TrajectoryError as error:
            os._exit(7 if "was forked from" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    optimizer.step(closure_of(model))
    optimizer.recorder.close()
    replay(base, tmp_path / "run")
    assert same(base, model)


def test_a_run_is_recorded_once_at_a_time(tmp_path: Path) -> None:
    model, optimizer = recorded(tmp_path / "run", steps=0)
    with pytest.raises(ValueError, match="a run must be recorded to one file, got MeZO"):
        optimizer.record(tmp_path / "other", model)
    assert not (tmp_path / "other").exists()


def test_groups_that_are_added_end_the_recording_by_name(tmp_path: Path) -> None:
    model = mlp()
    named = list(model.named_parameters())
    optimizer = zoopt.MeZO(named[:2], 1e-2, seed=3)
    optimizer.record(tmp_path / "run", model)
    optimizer.add_param_group({"params": named[2:]})
    with pytest.raises(TrajectoryError, match="param groups cannot be added"):
        optimizer.step(closure_of(model))


def test_buffers_that_forward_passes_change_are_warned_of_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model.register_buffer("still", torch.zeros(2))
    optimizer = mezo(model, perturbation="virtual")
    optimizer.record(tmp_path / "run", model)
    x = torch.arange(24.0).view(4, 6)
    with pytest.warns(UserWarning, match="forward passes change buffers of the model, '1.num_bat"):
        optimizer.step(lambda: model(x).square().mean())
    optimizer.step(lambda: model(x).square().mean())
    model.eval()
    other = mezo(model)
    other.record(tmp_path / "other", model)
    other.step(lambda: model(x).square().mean())


def test_a_replay_that_raises_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Also which of its parameters train; and the file can be opened again."""
    path = tmp_path / "run"
    _, optimizer = recorded(path)
    optimizer.recorder.close()
    for model in (mlp(), nn.Sequential(mlp()[0], nn.Tanh(), nn.Linear(8, 9))):
        model.requires_grad_(False)
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        before = copy.deepcopy(model)
        for use in (replay, resume):
            with pytest.raises(TrajectoryError, match=r"weights are not those|must have a par"):
                use(model, path)
        assert same(model, before)
        assert not any(param.requires_grad for param in model.parameters())
    path.chmod(0o400)
    untrained = mlp()
    if os.getuid():
        with pytest.raises(PermissionError):
            resume(untrained, path)
        assert same(untrained, mlp())


def test_odd_arguments_are_told(tmp_path: Path) -> None:
    path = tmp_path / "run"
    model, optimizer = recorded(path)
    optimizer.recorder.close()
    for until in (None, True, 1.0):
        with pytest.raises(TypeError, match="until must be an int, the step to go back to, got"):
            revert(model, path, until)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="paths must be a sequence of files"):
        merge(mlp(), str(path))
    for p in (1.0, 0.99999, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"p must be a finite number >= 0 and <= 0\.99998"):
            drop(torch.ones(2), p, seed=0, name="x")
        with pytest.raises(ValueError, match=r"p must be a finite number >= 0 and <= 0\.99998"):
            merge(mlp(), [path], p=p)
    dropped = drop(torch.ones(1 << 20), 1.0 - 2.0**-16, seed=0, name="x")
    # 16 expected; a Poisson number is below 2 or above 40 once in 10^6.
    assert 2 <= int(dropped.count_nonzero()) <= 40
    assert set(dropped.unique().tolist()) == {0.0, 65536.0}


def test_the_command_keeps_metadata_and_looks_for_the_folder_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, base = tmp_path / "run", tmp_path / "base.safetensors"
    _, optimizer = recorded(path)
    optimizer.recorder.close()
    save_file(dict(mlp().state_dict()), base, {"format": "pt"})
    command = ["trajectory", "replay", str(path), "--base", str(base), "--out"]
    assert main([*command, str(tmp_path / "none" / "out")]) == 2
    assert "--out: there is no folder" in capsys.readouterr().err
    (tmp_path / "weights.bin").write_bytes(b"PK" * 40)
    other = [*command[:4], str(tmp_path / "weights.bin"), "--out", str(tmp_path / "out")]
    assert main(other) == 2
    assert "--base: cannot read" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out")]) == 0
    with safe_open(tmp_path / "out", "pt") as file:
        assert file.metadata() == {"format": "pt"}
