"""Counts of steps are integers: float32 ones stop at 2^24, and what follows from them with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import zoopt
from tests.compare import equal, same
from tests.first_order_table import ROWS, Row, backward, net

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def counts(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["step"] for state in optimizer.state.values() if "step" in state]


@every_row
def test_long_runs_go_on_counting(row: Row) -> None:
    """Over 2^24, where float32 ends, and over 2^32, where draws begin anew."""
    for start in (2**24 - 1, 2**32 - 2):
        model = net(torch.bfloat16)
        optimizer = row.build(model)
        backward(model)
        optimizer.step()
        for count in counts(optimizer):
            assert count.dtype == torch.int64
            count.fill_(start)
        for _ in range(3):
            before = copy.deepcopy(model)
            backward(model)
            optimizer.step()
            assert not same(before, model)
        assert all(int(count) == start + 3 for count in counts(optimizer))
        assert all(param.isfinite().all() for param in model.parameters())


def test_rounding_goes_on_drawing() -> None:
    """Steps of a hundredth of a bfloat16 spacing: each step, other weights of them move."""
    param = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = zoopt.AdamW([param], lr=4e-5, weight_decay=0.0, seed=1)
    moved = []
    for step in range(3):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.state[param]["step"].fill_(2**24 + step)
        moved.append(param.detach() != before)
    # 4e-5 of the spacing 2^-8 below 1, 1 %, in the first step, and more where the bias is taken for
    # corrected; the same bits would move the same weights.
    assert all(0 < int(which.sum()) < 2000 for which in moved)
    assert not torch.equal(moved[1], moved[2])


def test_bases_go_on_changing() -> None:
    model = net()
    optimizer: Any = zoopt.GaLoreAdamW(model.named_parameters(), rank=4, update_proj_gap=2, seed=0)
    weight = model[2].weight
    backward(model)
    optimizer.step()
    for count in counts(optimizer):
        count.fill_(2**24)
    changes = []
    for _ in range(4):
        before = optimizer.bases(weight)["basis"].clone()
        for param in model.parameters():
            param.grad = torch.randn(param.shape)
        optimizer.step()
        changes.append(not torch.equal(before, optimizer.bases(weight)["basis"]))
    assert changes in ([True, False] * 2, [False, True] * 2)


@every_row
def test_older_counts_are_converted(row: Row) -> None:
    """float32, as release 0.1.0 saved them; or plain numbers, as old versions of torch did."""
    model = net()
    optimizer = row.build(model)
    backward(model)
    optimizer.step()
    saved = optimizer.state_dict()
    for convert in (Tensor.float, float, int):
        older = copy.deepcopy(saved)
        for state in older["state"].values():
            if "step" in state:
                state["step"] = convert(state["step"])
        twin = net()
        other = row.build(twin)
        other.load_state_dict(older)
        assert equal(other.state_dict(), saved)


@pytest.mark.parametrize("value", [1.5, -1.0, float("nan"), torch.tensor(0.5), torch.ones(2)])
def test_what_is_no_count_is_refused(value: Any) -> None:
    model = net()
    optimizer = zoopt.AdamW(model.parameters())
    backward(model)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = value
    with pytest.raises(ValueError, match=r"state 'step' of parameter 0 must be a torch\.int64"):
        optimizer.load_state_dict(saved)
