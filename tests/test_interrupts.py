"""Errors and signals in the middle of a step: the step is taken, or it is not."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoopt
from tests.optimizer_table import ROWS, Row, closure_of, mlp
from zoopt.kernels.noise import cpu
from zoopt.zeroth_order.engine import chunks

INPLACE = [row for row in ROWS if "inplace" in row.perturbations]
ZEROTH_ORDER = str(Path(zoopt.__file__).parent / "zeroth_order")


class Injected(BaseException):
    """Not an Exception: as KeyboardInterrupt is not."""


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Runs:
    """A row's weights after 0, 1, 2 ... undisturbed steps in place."""

    def __init__(self, row: Row) -> None:
        self.row = row
        model, optimizer = self.new()
        self.after = [weights(model)]
        for _ in range(3):
            optimizer.step(closure_of(model))
            self.after.append(weights(model))

    def new(self) -> tuple[torch.nn.Module, Any]:
        # A zo_eps at which a displacement that stays is far from rounding.
        scale = {"sigma": 0.05} if self.row.cls is zoopt.EvolutionStrategy else {"zo_eps": 0.05}
        model = mlp()
        return model, self.row.build(model, perturbation="inplace", **scale)

    def check(self, model: torch.nn.Module, optimizer: Any) -> None:
        """The weights are those of the steps that are counted, and the run goes on as it would."""
        count = optimizer.param_groups[0]["step"]
        assert_close(weights(model), self.after[count])
        while optimizer.param_groups[0]["step"] < 3:
            optimizer.step(closure_of(model))
        assert_close(weights(model), self.after[3])


def assert_close(value: Tensor, expected: Tensor) -> None:
    # Restored weights are off by rounding, 1e-7, which losses carry over 2 zo_eps into the next
    # steps; a displacement that stays would be 0.05.
    assert (value - expected).abs().max() <= 2e-4


def kernels(monkeypatch: pytest.MonkeyPatch, around: Callable[[Callable[[], Any]], Any]) -> None:
    """Let `around` call whatever writes weights."""

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return around(lambda: original(*args, **kwargs))

        monkeypatch.setattr(owner, name, call)

    for name in ("weighted_sum", "momentum_sum", "adam_window"):
        wrap(cpu, name)
    wrap(torch.Tensor, "addmm_")
    wrap(torch.Tensor, "copy_")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("row", INPLACE, ids=str)
def test_an_error_at_any_pass(row: Row, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seventh kernel of the second step in turn raises, before it has written or after."""
    runs, position = Runs(row), 0
    calls, last = 0, -1

    def around(original: Callable[[], Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == last and not after:
            raise Injected
        result = original()
        if calls == last:
            raise Injected
        return result

    # Pieces of few elements, so that a pass has several.
    monkeypatch.setattr(chunks, "_CHUNK", {"cpu": 24, "cuda": 24})
    kernels(monkeypatch, around)
    while True:
        model, optimizer = runs.new()
        optimizer.step(closure_of(model))
        position += 1 if position < 2 else 7
        calls, last = 0, position
        try:
            optimizer.step(closure_of(model))
        except Injected:
            last = -1
            runs.check(model, optimizer)
        else:
            break
    assert position > 3


@pytest.mark.parametrize(
    "name", ["MeZO plain", "MeZO momentum", "ZOAdam dense", "LOZO momentum", "ConMeZO"]
)
def test_an_error_at_any_line(name: str) -> None:
    """Of what runs in zoopt.zeroth_order during a step: each 97th."""
    [row] = [row for row in ROWS if str(row) == name]
    runs = Runs(row)
    for position in range(0, 100_000, 97):
        model, optimizer = runs.new()
        optimizer.step(closure_of(model))
        seen = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal seen
            if not frame.f_code.co_filename.startswith(ZEROTH_ORDER):
                return None
            if event == "line":
                seen += 1
                if seen == position + 1:  # noqa: B023
                    sys.settrace(None)
                    raise Injected
            return trace

        closure = closure_of(model)
        sys.settrace(trace)
        try:
            optimizer.step(closure)
        except Injected:
            pass
        else:
            break
        finally:
            sys.settrace(None)
        runs.check(model, optimizer)
    assert position > 100


@pytest.fixture
def _raised_signals() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_raised_signals")
@pytest.mark.parametrize("name", ["MeZO plain", "ZOAdam dense"])
def test_ctrl_c_at_any_instant(name: str) -> None:
    """Thirty of them at times of their own, from another thread."""
    [row] = [row for row in ROWS if str(row) == name]
    runs = Runs(row)
    interrupted = 0
    for i in range(30):
        model, optimizer = runs.new()
        closure = closure_of(model)

        def interrupt(delay: float = 2e-4 * i) -> None:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        try:
            thread.start()
            while optimizer.param_groups[0]["step"] < 3:
                optimizer.step(closure)
            thread.join()
            time.sleep(1e-3)
        except KeyboardInterrupt:
            interrupted += 1
        thread.join()
        runs.check(model, optimizer)
    assert interrupted == 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("row", {row.cls: row for row in INPLACE}.values(), ids=str)
def test_a_warning_that_is_an_error_comes_last(row: Row) -> None:
    """The step, which had nothing to learn, is counted, and the weights are where they were."""
    model, optimizer = Runs(row).new()
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not finite"):
            optimizer.step(lambda: closure_of(model)() * torch.nan)
    assert optimizer.param_groups[0]["step"] == 1
    decay = 1.0 - row.options["lr"] * row.options.get("weight_decay", 0.0)
    assert_close(weights(model), before * (decay if not optimizer.last_step.skipped else 1.0))


@pytest.mark.parametrize("row", {row.cls: row for row in INPLACE}.values(), ids=str)
def test_hyperparameters_are_checked_before_anything_moves(row: Row) -> None:
    model, optimizer = Runs(row).new()
    before = weights(model)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return closure_of(model)()

    for key, value in (("lr", None), ("lr", -1.0), ("weight_decay", None)):
        good, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
        with pytest.raises((TypeError, ValueError), match=rf"{key} must be a finite number"):
            optimizer.step(closure)
        optimizer.param_groups[0][key] = good
    assert not calls
    assert torch.equal(weights(model), before)
    if row.cls is zoopt.ZOConservativeSGD:
        return
    optimizer.probe(closure)
    good, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], None
    with pytest.raises((TypeError, ValueError), match="lr must be a finite number"):
        optimizer.step()
    assert_close(weights(model), before)
    optimizer.param_groups[0]["lr"] = good
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("row", [row for row in INPLACE if row.state_bytes((9, 9), 4)], ids=str)
def test_state_is_made_before_the_first_evaluation(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no memory for it, the weights have not moved, and less of it may do."""
    model, optimizer = Runs(row).new()
    before = weights(model)

    def none_left(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(type(optimizer), "_state", none_left)
    with pytest.raises(MemoryError):
        optimizer.step(lambda: pytest.fail("evaluated"))
    monkeypatch.undo()
    assert torch.equal(weights(model), before)
    optimizer.step(closure_of(model))


@pytest.mark.parametrize("row", INPLACE, ids=str)
def test_an_update_that_cannot_be_finished_is_finished_later(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the weights that it has not reached stand at theta, and the step is not counted."""
    runs = Runs(row)
    model, optimizer = runs.new()
    update = type(optimizer)._update
    [*_, last] = optimizer._new_pending().sites[:2]
    broken = True

    def failing(self: Any, site: Any, *args: Any) -> None:
        if broken and site.param is last.param:
            raise MemoryError
        update(self, site, *args)

    monkeypatch.setattr(type(optimizer), "_update", failing)
    with pytest.raises(MemoryError):
        optimizer.step(closure_of(model))
    assert optimizer.param_groups[0]["step"] == 0
    params = list(model.parameters())
    theta, updated = (value.split([p.numel() for p in params]) for value in runs.after[:2])
    reached = [param is last.param for param in params].index(True)
    for i, param in enumerate(params):
        assert_close(param.detach().flatten(), (updated if i < reached else theta)[i])
    for call in (lambda: optimizer.step(closure_of(model)), optimizer.state_dict):
        with pytest.raises(MemoryError):
            call()
    broken = False
    assert copy.deepcopy(optimizer.state_dict())["param_groups"][0]["step"] == 1
    runs.check(model, optimizer)
