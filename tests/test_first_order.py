"""What every first-order optimizer in the table promises."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import _init_optim_state

from tests.compare import same, state_bytes
from tests.first_order_table import ROWS, Row, backward, net


def run(row: Row, steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = net(dtype)
    optimizer = row.build(model, **options)
    for _ in range(steps):
        backward(model)
        optimizer.step()
    return model, optimizer


def bases_of(optimizer: Any, param: torch.Tensor) -> dict[str, Any]:
    """The bases of the last step as numpy's, with the side that they are of."""
    own = optimizer.bases(param) if hasattr(optimizer, "bases") else {}
    bases = {k: v.double().numpy().copy() for k, v in own.items()}
    if bases and "basis_left" not in bases:
        m, n = param.shape[0], param[0].numel()
        side = optimizer.param_groups[0]["proj_type"]
        left = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False}[side]
        bases["side"] = "left" if left else "right"
    return bases


@pytest.mark.parametrize("row", [row for row in ROWS if row.oracle], ids=str)
def test_equals_the_float64_oracle(row: Row) -> None:
    """12 steps in float64, over two refreshes. The oracle is given the optimizer's bases, which
    tests of their own hold to their definitions, and gradients at its own weights, each entry an
    ulp off: no expectation may hang on a rounding, which is another one on another machine.

    float64 rounds to 1e-16; Adam divides by sqrt(v), whose smallest entries magnify that.
    """
    ulps = np.random.default_rng(0)
    model = net(torch.float64)
    optimizer, oracle = row.build(model), row.build_oracle()
    names = [name for name, _ in model.named_parameters()]
    shadow = copy.deepcopy(model)
    theta = {name: p.detach().numpy() for name, p in shadow.named_parameters()}
    flat = {
        name: w.reshape(w.shape[0], -1) if w.ndim > 1 and row.matrices else w
        for name, w in theta.items()
    }
    for _ in range(12):
        backward(model)
        optimizer.step()
        backward(shadow)
        grads = {}
        for name, p in shadow.named_parameters():
            gradient = p.grad.numpy().reshape(flat[name].shape)
            up, down = np.nextafter(gradient, np.inf), np.nextafter(gradient, -np.inf)
            # A zero is exact: no machine makes anything else of it.
            nudged = np.where(ulps.random(gradient.shape) < 0.5, up, down)
            grads[name] = np.where(gradient == 0, 0.0, nudged)
        bases = {
            name: bases_of(optimizer, param)
            for name, param in zip(names, model.parameters(), strict=True)
        }
        with torch.no_grad():
            oracle.step(flat, grads, {name: own for name, own in bases.items() if own})
    for name, param in model.named_parameters():
        difference = np.abs(param.detach().numpy() - theta[name]).max()
        assert difference <= row.tolerance * (1.0 + np.abs(theta[name]).max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_resume_is_exact(row: Row, dtype: torch.dtype) -> None:
    """Saved at step 4, loaded into a new model and optimizer, run on to 9: the same bits."""
    complete, _ = run(row, 9, dtype)
    model, optimizer = run(row, 4, dtype)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = net(dtype)
    resumed.load_state_dict(weights)
    # Other hyperparameters: the checkpoint's take their place.
    optimizer = row.build(resumed, seed=999, lr=0.5)
    optimizer.load_state_dict(state)
    for _ in range(5):
        backward(resumed)
        optimizer.step()
    assert same(resumed, complete)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_is_deterministic_and_leaves_the_rng_alone(row: Row) -> None:
    first = net()
    optimizer = row.build(first)
    before = torch.get_rng_state()
    for _ in range(4):
        backward(first)
        optimizer.step()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second, _ = run(row, 4)
    assert same(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_state_bytes(row: Row, dtype: torch.dtype) -> None:
    model, optimizer = run(row, 2, dtype)
    expected = sum(row.state_bytes(tuple(p.shape), p.element_size()) for p in model.parameters())
    assert state_bytes(optimizer) == optimizer.declared_state_bytes() == expected


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_loss_falls(row: Row) -> None:
    """Or rises, where it is maximised."""
    start = backward(net()).item()
    model, _ = run(row, 30)
    end = backward(model).item()
    assert end > start if row.options.get("maximize") else end < row.falls * start


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_parameters_without_a_gradient_keep_every_bit(row: Row) -> None:
    """Missing gradients, frozen parameters, and a step with none at all."""
    model = net()
    optimizer = row.build(model)
    optimizer.step()
    assert same(model, net())
    assert not optimizer.state
    backward(model)
    model[2].weight.grad = None
    model[5].requires_grad_(False)
    optimizer.step()
    assert same(model[2:3], net()[2:3]) is False  # its bias has moved
    assert torch.equal(model[2].weight, net()[2].weight)
    assert model[2].weight not in optimizer.state


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_asks_for_state_counts_no_step(row: Row) -> None:
    """What torch.distributed.checkpoint does before it loads."""
    model = net()
    optimizer = row.build(model)
    _init_optim_state(optimizer)
    assert same(model, net())
    assert state_bytes(optimizer) == optimizer.declared_state_bytes()
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("row", [row for row in ROWS if not row.sparse], ids=str)
def test_sparse_gradients_are_refused_before_anything_changes(row: Row) -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    linear = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(linear, embedding)
    optimizer = row.build(model)
    before = copy.deepcopy(model)
    linear(embedding(torch.arange(3))).sum().backward()
    with pytest.raises(RuntimeError, match="needs dense gradients, got layout"):
        optimizer.step()
    assert same(model, before)
    assert not optimizer.state


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refuses_bad_hyperparameters(row: Row) -> None:
    for bad, message in (
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": torch.ones(2)}, "lr must be a finite number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        ({"rounding": "up"}, "rounding must be one of 'auto', 'nearest', 'stochastic', got 'up'"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\^64\), got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            row.build(net(), **bad)
    for name, value, message in (
        ("rank", 0, "rank must be a positive int, got 0"),
        ("update_proj_gap", 0, "update_proj_gap must be a positive int, got 0"),
        ("proj_type", "up", "proj_type must be one of"),
        ("state_dtype", "int2", "state_dtype must be one of"),
        ("betas", (0.9, 1.0), r"betas\[1\] must be a finite number >= 0 and < 1, got 1.0"),
    ):
        if name in row.options:
            with pytest.raises(ValueError, match=message):
                row.build(net(), **{name: value})


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refuses_foreign_checkpoints(row: Row) -> None:
    model, optimizer = run(row, 2)
    before = str(optimizer.state_dict())
    foreign = torch.optim.SGD(model.parameters())
    smaller = torch.nn.Sequential(torch.nn.Linear(2, 2))
    wrong_version = copy.deepcopy(optimizer.state_dict())
    wrong_version["param_groups"][0]["noise_version"] = 99
    for state, message in (
        (foreign.state_dict(), f"state_dict must be one of {row.cls.__name__}, but its groups"),
        (row.build(smaller).state_dict(), "as many parameters a group as the optimizer"),
        ({"state": {}}, "must have the keys 'state' and 'param_groups'"),
        (wrong_version, "noise_version must be 1, got 99"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize("row", [row for row in ROWS if "rank" in row.options], ids=str)
def test_a_gradient_that_is_not_finite_makes_no_basis(row: Row) -> None:
    """Without a basis the parameter waits; with one the old basis stays."""
    model = net()
    optimizer = row.build(model)
    weight = model[2].weight
    backward(model)
    weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert torch.equal(weight, net()[2].weight)
    backward(model)
    optimizer.step()
    assert bool(torch.isfinite(weight).all())
