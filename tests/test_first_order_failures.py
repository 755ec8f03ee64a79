"""Steps that an error ends: what can fail comes first, and the same step goes on where it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.first_order_table import ROWS, Row, backward, net
from tests.test_state_contract import bits

#: One of each class, and of each way to make a basis.
CHOSEN = list({(row.cls, row.options.get("projector")): row for row in reversed(ROWS)}.values())
LINALG = ("svd", "eigh", "qr", "cholesky_ex", "solve_triangular")


class Injected(RuntimeError):
    """As a solver's on a GPU."""


class Failing:
    """Lets the calls of some functions fail from number `at` on, counted from 1; 0: none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.at = self.calls = 0

    def wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise Injected
            return original(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, call)


class Due:
    """A model before its first step, or after five, where the bases of all parameters are due."""

    def __init__(self, row: Row, steps: int) -> None:
        model = net()
        optimizer = row.build(model, **({"stagger": False} if "stagger" in defaults(row) else {}))
        for _ in range(steps):
            backward(model)
            optimizer.step()
        backward(model)
        self._pair = model, optimizer

    def new(self) -> tuple[nn.Module, Any]:
        model, optimizer = copy.deepcopy(self._pair)
        for param, own in zip(model.parameters(), self._pair[0].parameters(), strict=True):
            assert own.grad is not None
            param.grad = own.grad.clone()
        return model, optimizer


def defaults(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = row.build(net()).defaults
    return found


def left(model: nn.Module, optimizer: Any) -> Any:
    """Weights and state, but for what makes bases, which are ready when the step goes on."""
    own = ("basis", "agreements", "doublings")
    state = [
        {name: v for name, v in optimizer.state[param].items() if not name.startswith(own)}
        for param in model.parameters()
        if optimizer.state.get(param)
    ]
    return bits(model.state_dict()), [bits(each) for each in state if each]


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("row", CHOSEN, ids=str)
def test_linear_algebra_that_fails_leaves_all_as_it_was(
    row: Row, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each ninth call; then the step is taken, and is the one that nothing disturbed."""
    due, failing = Due(row, steps), Failing(monkeypatch)
    for name in LINALG:
        failing.wrap(torch.linalg, name)
    whole, optimizer = due.new()
    optimizer.step()
    end, calls = bits(whole.state_dict()), failing.calls
    for failing.at in range(1, calls + 1, 9):
        failing.calls = 0
        model, optimizer = due.new()
        # State is made as zeros by a first step, which nothing else tells from none.
        before = left(model, optimizer)[0] if not steps else left(model, optimizer)
        with pytest.raises(Injected):
            optimizer.step()
        assert (left(model, optimizer)[0] if not steps else left(model, optimizer)) == before
        assert all(int(state.get("step", 0)) == steps for state in optimizer.state.values())
        optimizer.step()
        assert bits(model.state_dict()) == end
    if row.options.get("projector") not in (None, "random", "orthogonal", "columns"):
        assert calls


@pytest.mark.parametrize("row", CHOSEN, ids=str)
def test_a_step_that_breaks_off_goes_on(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the update of each parameter, or of those that are updated together: parameters that
    have been updated are not updated again from the same gradients."""
    due, failing = Due(row, 5), Failing(monkeypatch)
    for name in ("_step_param", "_update_together"):
        failing.wrap(row.cls, name)
    whole, optimizer = due.new()
    optimizer.step()
    end, calls = (bits(whole.state_dict()), bits(optimizer.state_dict())), failing.calls
    for failing.at in range(1, calls + 1, 2):
        failing.calls = 0
        model, optimizer = due.new()
        with pytest.raises(Injected):
            optimizer.step()
        optimizer.step()
        assert (bits(model.state_dict()), bits(optimizer.state_dict())) == end
    assert calls


FRESH: dict[str, Callable[[nn.Module], None]] = {
    "new": lambda model: copied(model, 1.0),
    "written": lambda model: torch._foreach_mul_([p.grad for p in model.parameters()], 1.0),
}


def copied(model: nn.Module, scale: float) -> None:
    for param in model.parameters():
        assert param.grad is not None
        param.grad = param.grad * scale


@pytest.mark.parametrize("way", FRESH)
@pytest.mark.parametrize("row", CHOSEN[:3], ids=str)
def test_other_gradients_are_another_step(
    row: Row, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    due, failing = Due(row, 5), Failing(monkeypatch)
    failing.wrap(row.cls, "_step_param")
    failing.wrap(row.cls, "_update_together")
    model, optimizer = due.new()
    optimizer.step()
    failing.at, failing.calls = failing.calls, 0
    model, optimizer = due.new()
    with pytest.raises(Injected):
        optimizer.step()
    once = [int(state["step"]) for state in optimizer.state.values()]
    FRESH[way](model)
    optimizer.step()
    assert [int(state["step"]) for state in optimizer.state.values()] == [n + 1 for n in once]
