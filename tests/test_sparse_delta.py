"""SpIEL: the active entries, what is dropped, the file of what has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from tests.first_order_table import backward, net
from zoopt.nn.largest import largest
from zoopt.selection.growth import products


def run(model: nn.Module, steps: int, **options: Any) -> zoopt.SparseDeltaAdamW:
    options = {"lr": 1e-2, "density": 0.1, "update_gap": 4, "window": 3, "seed": 0, **options}
    optimizer = zoopt.SparseDeltaAdamW(model.named_parameters(), **options)
    for _ in range(steps):
        backward(model)
        optimizer.step()
    return optimizer


def test_largest_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0, 0.0])
    assert largest(scores, 2).tolist() == [1, 3]
    assert largest(scores, 4).tolist() == [1, 2, 3, 4]
    rows, columns = torch.rand(37), torch.rand(53)
    active = torch.arange(0, 37 * 53, 3, dtype=torch.int32)
    dense = torch.outer(rows, columns).flatten()
    dense[active.long()] = -1.0
    for chunk in (53, 200, 1 << 22):
        monkeypatch.setattr("zoopt.nn.largest.CHUNK", chunk)
        monkeypatch.setattr("zoopt.selection.growth.CHUNK", chunk)
        assert torch.equal(products(rows, columns, active, 40), largest(dense, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("growth", ["accumulated", "momentum"])
def test_what_is_not_active_has_the_bits_of_the_base(growth: Any, dtype: torch.dtype) -> None:
    """After any step as many entries are active; all others, dropped ones too, are the base's."""
    model, base = net(dtype), net(dtype)
    optimizer = run(model, 0, growth=growth, drop_fraction=0.3)
    seen: set[int] = set()
    for _ in range(13):
        backward(model)
        optimizer.step()
        for param, start in zip(model.parameters(), base.parameters(), strict=True):
            state = optimizer.state[param]
            index = state["index"].long()
            assert index.unique().numel() == max(1, int(0.1 * param.numel()))
            still = torch.ones(param.numel(), dtype=torch.bool)
            still[index] = False
            flat, origin = param.detach().view(-1), start.detach().view(-1)
            assert torch.equal(flat[still], origin[still])
            assert torch.equal(state["base"], origin[index])
        seen |= set(optimizer.state[model[2].weight]["index"].tolist())
    assert len(seen) > 1.3 * 0.1 * model[2].weight.numel()


def test_ages_and_seeds() -> None:
    """An entry that has grown by accumulation begins with the age of its window."""
    model = net()
    optimizer = run(model, 4)
    ages = optimizer.state[model[2].weight]["age"]
    assert sorted(set(ages.tolist())) == [2, 4]
    assert int((ages == 2).sum()) == round(0.2 * ages.numel())
    backward(model)
    optimizer.step()
    assert sorted(set(ages.tolist())) == [3, 5]
    ages.fill_(2**15 - 1)
    optimizer.step()
    assert set(ages.tolist()) == {2**15 - 1}


def test_density_one_is_adamw() -> None:
    first, second = net(torch.float64), net(torch.float64)
    run(first, 6, density=1.0)
    adamw = zoopt.AdamW(second.named_parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(6):
        backward(second)
        adamw.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("growth", ["accumulated", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_a_parameter_at_one_percent(dtype: torch.dtype, growth: Any) -> None:
    """At most 0.2 at any step of a window; also with a delta beside a frozen base."""
    weight = nn.Linear(1000, 1000, bias=False).to(dtype)
    beside = nn.Sequential(weight)
    options = {"growth": growth, "update_gap": 4, "window": 3, "seed": 0}
    inside = nn.Sequential(nn.Linear(1000, 1000, bias=False).to(dtype))
    deltas = zoopt.nn.convert_to_sparse_delta(beside, lambda name, module: True)
    for model, params in ((inside, list(inside.named_parameters())), (beside, deltas)):
        optimizer = zoopt.SparseDeltaAdamW(params, **options)
        x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).float().square().sum().backward()
            optimizer.step()
            held = [v for own in optimizer.state.values() for v in own.values()]
            if model is beside:
                held += [model[0].delta, model[0].index]
            assert sum(tensor.nbytes for tensor in held) <= 0.2 * 1000 * 1000


def test_the_file_of_what_has_changed(tmp_path: Any) -> None:
    """Onto the base and away again, to the bit; only onto the base."""
    model, base = net(torch.bfloat16), net(torch.bfloat16)
    optimizer = run(model, 9, density=0.02)
    path = tmp_path / "delta.pt"
    torch.save(zoopt.sparse_delta(optimizer), path)
    assert path.stat().st_size < 12_000
    delta = torch.load(path, weights_only=True)
    zoopt.apply_delta(base, delta)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="must hold what the delta was trained on, got other"):
        zoopt.apply_delta(base, delta)
    zoopt.remove_delta(base, delta)
    start = net(torch.bfloat16)
    assert all(
        torch.equal(p, q) for p, q in zip(start.parameters(), base.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="must hold what the delta made"):
        zoopt.remove_delta(base, delta)
    with pytest.raises(ValueError, match=r"got none named '0.weight'; load"):
        zoopt.apply_delta(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), delta)
    unnamed = zoopt.SparseDeltaAdamW(list(model.parameters()))
    backward(model)
    unnamed.step()
    with pytest.raises(ValueError, match="parameters must have names"):
        zoopt.sparse_delta(unnamed)


def test_gradients_that_are_not_finite_change_no_places() -> None:
    model = net()
    optimizer = run(model, 4)
    weight = model[2].weight
    for step in range(5, 9):  # The window is steps 6 to 8: candidates, and two that are added.
        backward(model)
        if step == 6:
            weight.grad[0, 0] = torch.nan
        before = optimizer.state[weight]["index"].clone()
        optimizer.step()
    assert torch.equal(optimizer.state[weight]["index"], before)
    fresh = net()
    optimizer = run(fresh, 0)
    backward(fresh)
    fresh[2].weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert torch.equal(fresh[2].weight, net()[2].weight)
    assert int(optimizer.state[fresh[2].weight]["step"]) == 0


def test_refuses() -> None:
    for bad, message in (
        ({"density": 0.0}, "density must be a finite number > 0 and <= 1, got 0.0"),
        ({"update_gap": 0}, "update_gap must be a positive int, got 0"),
        ({"window": 1}, "window must be from 2 to update_gap=4, got 1"),
        ({"window": 9}, "window must be from 2 to update_gap=4, got 9"),
        ({"drop_fraction": 1.5}, "drop_fraction must be a finite number >= 0 and <= 1, got 1.5"),
        ({"total_steps": 0}, "total_steps must be a positive int, got 0"),
        ({"growth": "up"}, "growth must be one of 'accumulated', 'momentum', got 'up'"),
        ({"betas": (0.9, 0.9999)}, r"betas\[1\] must be a finite number <= 0.9994, got 0.9999"),
    ):
        with pytest.raises(ValueError, match=message):
            run(net(), 0, **bad)
