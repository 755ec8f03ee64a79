"""What torch's own optimizer tests feed to an optimizer, from the harness in torch's wheel.

It is private to torch: this file alone imports it. The test bodies are not in the wheel, and are
written anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal import common_optimizers as harness

import zoopt
from tests.first_order_table import ROWS, Row

CLASSES = list({row.cls: row for row in reversed(ROWS)}.values())
every_class = pytest.mark.parametrize("row", CLASSES, ids=str)
DEVICE, DTYPE = torch.device("cpu"), torch.float64
#: What torch's AdamW is given in its tests, but for the options that zoopt's leaves out.
INPUTS = [
    given
    for given in [
        *harness.optim_inputs_func_adamw(DEVICE, DTYPE),
        *harness.optim_inputs_func_adam("cuda", DTYPE),
    ]
    if not given.kwargs.get("amsgrad")
]
ERRORS = harness.get_error_inputs_for_all_optims(DEVICE, DTYPE)


class Layers(nn.Module):
    """Weights, biases and convolutions, and a scalar as the last one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        shapes = ((6, 5), (6,), (4, 3, 2), (3, 6), (3,), ())
        self.values = nn.ParameterList(
            torch.randn(shape, generator=generator, dtype=DTYPE) for shape in shapes
        )

    def differentiate(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for number, param in enumerate(self.values):
            param.grad = torch.randn(param.shape, generator=generator, dtype=DTYPE)
            if (step == 3 and number == 1) or (step in (4, 5) and number in (2, 3)):
                param.grad = None  # missing once; frozen for two steps


@pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.desc)
@pytest.mark.parametrize("way", ["plain", "for-loop", "fused"])
def test_adamw_is_torchs_for_all_that_its_tests_give_it(given: Any, way: str) -> None:
    """Seven steps in float64: roundings of quotients near 1, times rates of 1e-2 at most."""
    options = {key: value for key, value in given.kwargs.items() if key != "capturable"}
    flags: dict[str, Any] = {"plain": {}, "for-loop": {"foreach": False}, "fused": {"fused": True}}[
        way
    ]
    model, twin = Layers(), Layers()
    ours = zoopt.AdamW(model.parameters(), **copy.deepcopy(options), **flags)
    theirs = torch.optim.AdamW(twin.parameters(), **_floats(options))
    for step in range(7):
        model.differentiate(step)
        twin.differentiate(step)
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-14)
    assert [int(ours.state[p]["step"]) for p in model.parameters()] == [
        int(theirs.state[p]["step"]) for p in twin.parameters()
    ]


def _floats(options: dict[str, Any]) -> dict[str, Any]:
    """Tensors as numbers: torch computes its step size in their float32."""
    return {
        key: tuple(map(float, value))
        if isinstance(value, tuple)
        else float(value)
        if isinstance(value, Tensor)
        else value
        for key, value in options.items()
    }


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.optimizer_error_input.desc)
@every_class
def test_refuses_what_every_optimizer_refuses(row: Row, error: Any) -> None:
    """The types of errors are torch's; what it only warns of may be an error."""
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.ones(1, 1))] if given.params is None else given.params
    kinds = (error.error_type, ValueError) if error.error_type is UserWarning else error.error_type
    with pytest.raises(kinds):
        row.cls(params, **{**row.options, **given.kwargs})  # type: ignore[call-arg]


def contiguous(weight: Tensor) -> Tensor:
    return weight


def strided(weight: Tensor) -> Tensor:
    return torch.stack((weight, weight), -1)[..., 0]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("layout", [contiguous, strided], ids=lambda layout: layout.__name__)
@every_class
def test_goes_in_the_right_direction(
    row: Row, layout: Callable[[Tensor], Tensor], scheduled: bool
) -> None:
    """torch's body: a product of weights and input, whose loss falls in 20 steps, by a closure.

    In one half of the cases the rate falls on the way, by an exponential schedule.
    """
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    weight, bias, x = (nn.Parameter(layout(draw(10, 5))), nn.Parameter(layout(draw(10))), draw(5))
    assert weight.is_contiguous() == (layout is contiguous)
    maximize = bool(row.options.get("maximize"))
    optimizer: Any = row.cls([weight, bias], **row.options)  # type: ignore[call-arg]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) if scheduled else None

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
        if schedule is not None:
            schedule.step()
    last = closure().item()
    assert last > first if maximize else last < first


@every_class
def test_missing_gradients_leave_no_state(row: Row) -> None:
    """torch's body for gradients that are None: nothing moves, and nothing is kept."""
    model = Layers()
    before = copy.deepcopy(model)
    optimizer = row.build(model)
    for _ in range(2):
        optimizer.step()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not optimizer.state
