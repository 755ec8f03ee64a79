"""torch.optim.AdamW's arguments and checkpoints, taken over and given back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from tests.first_order_table import backward, net

FORMATS = ("float32", "bfloat16", "int8", "int4")


def go_on(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()


def saved_by_torch(steps: int = 5, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})
    go_on(model, optimizer, steps)
    return model, optimizer


def test_takes_torchs_arguments() -> None:
    """In their order and by name; what is advice or off changes nothing."""
    params = list(net().parameters())
    plain = zoopt.AdamW(params, 1e-3, (0.9, 0.99), 1e-7, 0.1)
    for options in (
        {"fused": True},
        {"foreach": True, "fused": None, "capturable": False, "differentiable": False},
        {"amsgrad": False, "maximize": False},
    ):
        other = zoopt.AdamW(params, 1e-3, (0.9, 0.99), 1e-7, 0.1, seed=7, **options)  # type: ignore[arg-type]
        assert other.param_groups[0].keys() == plain.param_groups[0].keys()
    zoopt.AdamW(params, 1e-3, (0.9, 0.99), 1e-7, 0.1, False)
    for name in ("amsgrad", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{name} must be False, got True"):
            zoopt.AdamW(params, **{name: True})
        with pytest.raises(ValueError, match=f"{name} must be False, got True"):
            zoopt.AdamW([{"params": params, name: True}])
    with pytest.raises(TypeError, match="fused must be a bool, got 'yes'"):
        zoopt.AdamW(params, fused="yes")  # type: ignore[arg-type]


def test_takes_torchs_groups() -> None:
    """Those of an optimizer of torch's, decay and no decay, with all that they carry."""
    model = net()
    named = list(model.named_parameters())
    torchs = torch.optim.AdamW(
        [{"params": named[:4]}, {"params": named[4:], "weight_decay": 0.0}], lr=0.5, fused=True
    )
    ours = zoopt.AdamW([{**group} for group in torchs.param_groups])
    assert [group["weight_decay"] for group in ours.param_groups] == [1e-2, 0.0]
    assert [group["lr"] for group in ours.param_groups] == [0.5, 0.5]


def test_goes_on_from_torch_and_back() -> None:
    """In float64, to some roundings of Adam's quotients a step: 1e-13 of weights of order 1."""
    model, optimizer = saved_by_torch(dtype=torch.float64, weight_decay=0.1, maximize=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    twin = copy.deepcopy(model)
    ours = zoopt.AdamW(twin.parameters(), lr=0.5)
    ours.load_state_dict(optimizer.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-3
    assert ours.param_groups[0]["initial_lr"] == 1e-3
    assert all(int(state["step"]) == 5 for state in ours.state.values())
    go_on(model, optimizer, 4)
    go_on(twin, ours, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-13)
    schedule.step()

    third = copy.deepcopy(twin)
    back = torch.optim.AdamW(third.parameters(), lr=0.5)
    back.load_state_dict(ours.torch_state_dict())
    assert back.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert back.param_groups[0]["weight_decay"] == 0.1
    assert back.param_groups[0]["maximize"] is True
    go_on(twin, ours, 3)
    go_on(third, back, 3)
    for p, q in zip(twin.parameters(), third.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("state_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_go_into_every_format_and_out_again(state_dtype: Any, dtype: torch.dtype) -> None:
    """As near as the format has values: of a block's largest root, half a level of its root.

    Levels are l^2 / top^2 of the largest; next to the largest, two are 2 / top apart: half of that
    for 127 (255) levels in int8 is 0.008, and for 7 (15) in int4 0.15. bfloat16 is 2^-7 apart.
    """
    model, optimizer = saved_by_torch(dtype=dtype)
    twin = copy.deepcopy(model)
    ours = zoopt.AdamW(twin.parameters(), state_dtype=state_dtype)
    ours.load_state_dict(optimizer.state_dict())
    if state_dtype == "int8":
        assert ours.state[twin[2].weight]["exp_avg"].dtype == torch.int8
    back = ours.torch_state_dict()["state"]
    error = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.008, "int4": 0.15}[state_dtype]
    for index, state in optimizer.state_dict()["state"].items():
        assert float(back[index]["step"]) == 5.0
        assert back[index]["step"].dtype == torch.float32
        for name in ("exp_avg", "exp_avg_sq"):
            values, found = state[name].double(), back[index][name].double()
            assert found.shape == values.shape
            assert float((found - values).abs().max()) <= error * float(values.abs().max())
    go_on(twin, ours, 2)
    assert all(param.isfinite().all() for param in twin.parameters())


def test_plain_groups_go_on_and_projected_ones_begin_anew() -> None:
    model, optimizer = saved_by_torch()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    first = torch.optim.AdamW([{"params": plain}, {"params": matrices}], lr=1e-3)
    go_on(model, first, 3)
    for cls in (zoopt.GaLoreAdamW, zoopt.Apollo, zoopt.Fira, zoopt.QGaLoreAdamW, zoopt.LDAdamW):
        groups = [{"params": plain, "rank": None}, {"params": matrices, "rank": 4}]
        ours: Any = cls(groups)
        with pytest.warns(UserWarning, match="3 parameters are projected here"):
            ours.load_state_dict(first.state_dict())
        for p in plain:
            assert int(ours.state[p]["step"]) == 3
            assert torch.equal(ours.state[p]["exp_avg"], first.state[p]["exp_avg"])
        assert not any(ours.state.get(p) for p in matrices)
        go_on(model, ours, 1)
        assert [int(ours.state[p]["step"]) for p in (plain[0], matrices[0])] == [4, 1]
    del optimizer


def test_other_methods_are_refused() -> None:
    ours = zoopt.AdamW(net().parameters())
    before = str(ours.state_dict())
    _, amsgrad = saved_by_torch(amsgrad=True)
    adam = torch.optim.Adam(net().parameters(), weight_decay=0.1)
    _, other = saved_by_torch()
    smaller = copy.deepcopy(other.state_dict())
    smaller["state"][0]["exp_avg"] = torch.zeros(3)
    for state, message in (
        (amsgrad.state_dict(), "amsgrad must be False, got True"),
        (adam.state_dict(), "must be of AdamW, got Adam's with weight_decay 0.1"),
        (torch.optim.AdamW([net()[2].weight]).state_dict(), "as many parameters a group"),
        (smaller, "state 'exp_avg' of parameter 0 must be a"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(state)
        assert str(ours.state_dict()) == before


def test_projected_moments_do_not_go_to_torch() -> None:
    model = net()
    ours = zoopt.AdamW(model.parameters())
    go_on(model, ours, 1)
    ours.state[model[2].weight]["basis"] = torch.ones(1)
    with pytest.raises(ValueError, match="must not be projected, got parameter 2"):
        ours.torch_state_dict()
