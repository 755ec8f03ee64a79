"""torch.compile of a step, of a function that takes one, and of a whole training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from tests.compare import equal
from tests.first_order_table import ROWS, Row, backward, batch, net

ROWS = list({row.cls: row for row in reversed(ROWS)}.values())
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    # torch's own, of a loss that is alive across a graph break.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="eager")


def of_a_step(model: nn.Module, optimizer: Any, compiled: Callable[..., Any]) -> None:
    step = compiled(optimizer.step)
    for _ in range(2):
        backward(model)
        step()


def of_a_function_that_steps(model: nn.Module, optimizer: Any, compiled: Any) -> None:
    @compiled
    def update() -> int:
        optimizer.step()
        optimizer.zero_grad()
        return 1

    for _ in range(2):
        backward(model)
        assert update() == 1


def of_a_training_step(model: nn.Module, optimizer: Any, compiled: Any) -> None:
    x, y = batch()

    @compiled
    def train() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(2):
        train()


def of_a_closure(model: nn.Module, optimizer: Any, compiled: Any) -> None:
    forward = compiled(model)
    x, y = batch()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (forward(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def of_a_fused_backward(model: nn.Module, optimizer: Any, compiled: Any) -> None:
    with zoopt.fuse_backward(model, optimizer):
        of_a_training_step(model, optimizer, compiled)


USES = (of_a_step, of_a_function_that_steps, of_a_training_step)
#: What goes through no other code of a class than these.
OTHER_USES = (of_a_closure, of_a_fused_backward)


@pytest.mark.parametrize(
    ("row", "use"),
    [(row, use) for row in ROWS for use in USES]
    + [(row, use) for row in ROWS[:2] for use in OTHER_USES],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_compilation_changes_no_bit(row: Row, use: Callable[..., None]) -> None:
    runs = []
    for wrap in (lambda function: function, compiled):
        model = net()
        optimizer = row.build(model)
        use(model, optimizer, wrap)
        runs.append((model.state_dict(), optimizer.state_dict()))
    assert equal(*runs)


def test_a_compiled_model_in_a_closure_stays_compiled() -> None:
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    model = net()
    forward = torch.compile(model, backend=backend)
    optimizer = zoopt.AdamW(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = forward(batch()[0]).sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert len(calls) == 3
