"""What every optimizer in the table promises."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import zoopt
from tests.compare import same, state_bytes
from tests.optimizer_table import CASES, ROWS, Row, closure_of, mlp, regression
from zoopt.zeroth_order.engine.sites import Sites


def run(row: Row, steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = mlp(dtype)
    optimizer = row.build(model, **options)
    closure = closure_of(model, dtype)
    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_equals_the_float64_oracle(row: Row, perturbation: str) -> None:
    """10 steps in float64 (1e-10: the losses agree to rounding), 50 in float32 (1e-5)."""
    x, y = (t.numpy() for t in regression(torch.float64))

    def loss(theta: dict[str, np.ndarray]) -> float:
        h = np.tanh(x @ theta["0.weight"].T + theta["0.bias"])
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
        h = h * theta["2.weight"] + theta["2.bias"]
        return float(((h @ theta["3.weight"].T + theta["3.bias"] - y) ** 2).mean())

    theta = {name: p.detach().double().numpy().copy() for name, p in mlp().named_parameters()}
    reference = mlp(torch.float64)

    def jvp(theta: dict[str, np.ndarray], tangent: dict[str, np.ndarray]) -> float:
        weights, along = ({k: torch.tensor(v) for k, v in d.items()} for d in (theta, tangent))
        inputs, targets = regression(torch.float64)

        def loss_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            output = torch.func.functional_call(reference, weights, (inputs,))
            return (output - targets).pow(2).mean()

        return float(torch.func.jvp(loss_of, (weights,), (along,))[1])

    oracle = row.build_oracle({name: w.shape for name, w in theta.items()}, jvp)
    steps = 0
    # float32: (L+ - L-) / (2 zo_eps) carries the forward's rounding, about 1e-7 / 1e-3 a step,
    # times lr 1e-3, times sqrt(50) steps.
    for until, dtype, tolerance in ((10, torch.float64, 1e-10), (50, torch.float32, 1e-5)):
        while steps < until:
            theta = oracle.step(loss, theta)
            steps += 1
        model, _ = run(row, steps, dtype, perturbation=perturbation)
        for name, param in model.named_parameters():
            scale = 1.0 + np.abs(theta[name]).max()
            difference = np.abs(param.detach().double().numpy() - theta[name]).max()
            assert difference <= tolerance * scale, (dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_resume_is_exact(row: Row, dtype: torch.dtype, perturbation: str) -> None:
    """Saved at step 4, loaded into a new model and optimizer, run on to 9: the same bits."""
    whole, _ = run(row, 9, dtype, perturbation=perturbation)
    model, optimizer = run(row, 4, dtype, perturbation=perturbation)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = mlp(dtype)
    resumed.load_state_dict(weights)
    # Other hyperparameters: the checkpoint's take their place.
    optimizer = row.build(resumed, seed=999, lr=0.5, perturbation=perturbation)
    optimizer.load_state_dict(state)
    for _ in range(5):
        optimizer.step(closure_of(resumed, dtype))
    assert same(resumed, whole)
    assert optimizer.last_step.step == 9


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_is_deterministic_and_leaves_the_rng_alone(row: Row) -> None:
    first = mlp()
    optimizer = row.build(first)
    before = torch.get_rng_state()
    for _ in range(5):
        optimizer.step(closure_of(first))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second, _ = run(row, 5)
    assert same(first, second)
    other, _ = run(row, 5, seed=8)
    assert not same(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_state_bytes(row: Row, dtype: torch.dtype) -> None:
    model, optimizer = run(row, 2, dtype)
    expected = sum(row.state_bytes(tuple(p.shape), p.element_size()) for p in model.parameters())
    assert state_bytes(optimizer) == optimizer.declared_state_bytes() == expected


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_order_of_named_parameters_does_not_matter(row: Row) -> None:
    model, _ = run(row, 3)
    shuffled = mlp()
    named = list(shuffled.named_parameters())[::-1]
    optimizer = row.build_from(named)
    for _ in range(3):
        optimizer.step(closure_of(shuffled))
    assert same(model, shuffled)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_step_without_anything_pending_changes_nothing(row: Row) -> None:
    model, optimizer = run(row, 2)
    weights = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    record = optimizer.last_step
    assert optimizer.step() is None
    assert same(model, weights)
    assert str(optimizer.state_dict()) == str(state)
    assert optimizer.last_step is record


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refuses_foreign_checkpoints(row: Row) -> None:
    model, optimizer = run(row, 2)
    before = str(optimizer.state_dict())
    foreign = torch.optim.AdamW(model.parameters())
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
    other = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
    small = row.build(other)
    small.step(lambda: other(torch.ones(1, 3)).sum())
    with pytest.raises(ValueError, match=r"parameters of the same shapes, \[\[10, 6\]"):
        optimizer.load_state_dict(small.state_dict())
    assert str(optimizer.state_dict()) == before
    if optimizer.declared_state_bytes():
        cast = copy.deepcopy(optimizer.state_dict())
        name, value = next(iter(cast["state"][0].items()))
        cast["state"][0][name] = value.half()
        with pytest.raises(ValueError, match=r"must be a torch.float32 tensor of shape \("):
            optimizer.load_state_dict(cast)
        assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_loss_falls(row: Row) -> None:
    """Or rises, where it is maximised."""
    model = mlp()
    start = closure_of(model)().item()
    trained, _ = run(row, 100)
    end = closure_of(trained)().item()
    assert end > start if row.options.get("maximize") else end < row.falls * start


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENCES: list[Callable[[], contextlib.AbstractContextManager[Any]]] = [
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    lambda: torch.device("meta"),
    lambda: default_dtype(torch.float64),
    lambda: default_dtype(torch.bfloat16),
    torch.inference_mode,
]


@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_a_step_does_not_see_what_is_set_around_it(row: Row, perturbation: str) -> None:
    """The closure's own arithmetic is the same; then so are all bits. The first step, which makes
    state, is once under each."""
    plain, _ = run(row, len(AMBIENCES) + 1, perturbation=perturbation)
    for first in range(len(AMBIENCES)):
        model = mlp()
        optimizer, loss = row.build(model, perturbation=perturbation), closure_of(model)

        def closure(loss: Any = loss) -> Any:
            with torch.autocast("cpu", enabled=False):
                return loss()

        for around in (*AMBIENCES[first:], *AMBIENCES[:first], contextlib.nullcontext):
            with around():
                optimizer.step(closure)
                optimizer.zero_grad()
        assert same(model, plain)


@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_autocast_keeps_no_perturbed_copy(row: Row, perturbation: str) -> None:
    """Within one autocast, whoever reads the weights after a step or a probe reads theta."""
    model = mlp()
    x, _ = regression()
    optimizer = row.build(model, perturbation=perturbation, lr=0.1)
    calls = [lambda: optimizer.step(closure_of(model))]
    if row.cls is not zoopt.ZOConservativeSGD:
        calls.append(lambda: optimizer.probe(closure_of(model)))
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call()
            within = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(within, model(x))


@pytest.mark.parametrize("row", {row.cls: row for row in ROWS}.values(), ids=str)
def test_a_compiled_caller_gets_the_bits_of_an_eager_one(row: Row) -> None:
    models = mlp(), mlp()
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer, closure = row.build(model), closure_of(model)

        def one(optimizer: Any = optimizer, closure: Any = closure) -> Any:
            loss = optimizer.step(closure)
            if not isinstance(optimizer, zoopt.ZOConservativeSGD):
                optimizer.probe(closure)
                optimizer.step()
            return loss

        # In a process where nothing has been compiled so far, and then where something has.
        call = torch.compile(one, backend="eager") if compiled else one
        for _ in range(2):
            call()
    assert same(*models)
    torch._dynamo.reset()


CLASSES = list({row.cls: row for row in reversed(ROWS)}.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_a_loss_of_16_bits_is_warned_of_once(row: Row, dtype: torch.dtype) -> None:
    """Around 3 its spacing is 2e-3 at least, and a perturbation changes it by some 1e-6. A slope
    is no difference of two losses."""
    scale = "sigma" if row.cls is zoopt.EvolutionStrategy else "zo_eps"
    options = {} if row.cls is zoopt.ForwardGrad else {scale: 1e-5}
    ways: list[Any] = [lambda optimizer, closure: optimizer.step(closure)]
    if row.cls is not zoopt.ZOConservativeSGD:
        ways.append(lambda optimizer, closure: optimizer.probe(closure))
    for way in ways:
        model = mlp()
        optimizer, loss = row.build(model, **options), closure_of(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                way(optimizer, lambda loss=loss: (3.0 + 0.01 * loss()).to(dtype))
        if row.cls is zoopt.ForwardGrad:
            assert not any("16 bits" in str(warning.message) for warning in caught)
            continue
        [warning] = caught
        assert "has only 16 bits" in str(warning.message)
        assert f"or raise {scale}" in str(warning.message)
        assert warning.filename == __file__


class WithNothing(nn.Module):
    """The model of the other tests, and matrices without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(0, 4))
        self.columns = nn.Parameter(torch.empty(4, 0))
        self.nothing = nn.Parameter(torch.empty(0))
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.rows.sum() + self.columns.sum() + self.nothing.sum()


@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_matrices_without_elements_change_nothing(row: Row, perturbation: str) -> None:
    if row.options.get("blocks") == "groups" or isinstance(row.options.get("mask"), dict):
        row = dataclasses.replace(row, options={**row.options, "mask": None, "momentum": 0.0})
    model, plain = WithNothing(), mlp()
    named = [(name.removeprefix("inner."), p) for name, p in model.named_parameters()]
    optimizer = row.build_from(named, perturbation=perturbation)
    other = row.build(plain, perturbation=perturbation)
    for _ in range(2):
        optimizer.step(closure_of(model))
        other.step(closure_of(plain))
    assert same(model.inner, plain)
    optimizer.load_state_dict(optimizer.state_dict())
    assert state_bytes(optimizer) == optimizer.declared_state_bytes()


@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_a_backward_pass_does_not_feed_it(row: Row) -> None:
    """Whoever leaves gradients and calls step is told what to call; torch's checkpoints are not."""
    model = mlp()
    optimizer = row.build(model)
    before = copy.deepcopy(model), str(optimizer.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert same(model, before[0])
    assert str(optimizer.state_dict()) == before[1]
    closure_of(model)().backward()
    name = row.cls.__name__
    for call in (optimizer.step, lambda: optimizer.step(None)):
        with pytest.raises(RuntimeError, match=rf"{name}.step\(\) needs a closure.*ZOTrainer"):
            call()
    assert same(model, before[0])
    assert str(optimizer.state_dict()) == before[1]
    # Gradients of another optimizer's, over the same parameters, are no matter.
    optimizer.step(closure_of(model))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "enable_grad"])
@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_a_closure_that_calls_backward_is_told_not_to(
    row: Row, perturbation: str, grad: bool
) -> None:
    model = mlp()
    optimizer = row.build(model, perturbation=perturbation)
    before = copy.deepcopy(model)

    def closure() -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            loss = closure_of(model)()
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="got one that calls backward: leave the backward pass"):
        optimizer.step(closure)
    assert all(param.grad is None for param in model.parameters())
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_loss_beyond_float32_is_no_loss(row: Row) -> None:
    """1e300 is finite in float64, and its square, or its quotient by zo_eps, in no float32."""
    model, optimizer = run(row, 1)
    weights = copy.deepcopy(model)
    count = itertools.count(1)

    def closure() -> torch.Tensor:
        return closure_of(model)() * 0 + 1e300 * next(count)

    if row.cls is zoopt.EvolutionStrategy:  # whose fitnesses are shaped
        optimizer.step(closure)
    elif row.cls is zoopt.ForwardGrad:
        with pytest.warns(UserWarning, match="not finite"):
            optimizer.step(lambda: closure_of(model)() * 1e300)
    elif "max_projected_grad" in row.options:
        optimizer.step(closure)
    else:
        with pytest.warns(UserWarning, match="not finite"):
            optimizer.step(closure)
        assert all((p - q).abs().max() <= 1e-6 for p, q in zip(*map(params, (model, weights))))  # noqa: B905
    optimizer.step(closure_of(model))
    assert all(param.isfinite().all() for param in model.parameters())
    for state in optimizer.state.values():
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_what_a_closure_returns_is_one_real_number(row: Row) -> None:
    """An int beyond float64 is no loss, as a float beyond float32 is none."""
    model, optimizer = run(row, 1)
    weights, closure = copy.deepcopy(model), closure_of(model)
    for wrong in (
        lambda: closure().to(torch.complex64),
        lambda: torch.stack((closure(), closure())),
        lambda: torch.empty((), device="meta"),
        lambda: np.array(1.0),
        lambda: None,
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match="the closure must return"):
            optimizer.step(wrong)
    if row.cls is not zoopt.ForwardGrad:  # which takes tensors only
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(lambda: (closure(), 10**400)[1])
    assert all((p - q).abs().max() <= 1e-6 for p, q in zip(*map(params, (model, weights))))  # noqa: B905


def params(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_copies_and_pickles_go_on_with_the_record(row: Row) -> None:
    model, optimizer = run(row, 2)
    optimizer.skipped_probes = 3
    for again, twin in (
        copy.deepcopy((optimizer, model)),
        pickle.loads(pickle.dumps((optimizer, model))),
    ):
        assert again.last_step == optimizer.last_step
        assert again.skipped_probes == 3
        again.step(closure_of(twin))
        assert again.last_step.step == 3
    optimizer.step(closure_of(model))
    assert same(model, twin)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_lasting_sites_are_looked_up_once(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each block; what a step changes in its group is nothing that they depend on."""
    model = mlp()
    optimizer = row.build(model)
    look_up, found = optimizer._sites, list[Sites]()

    def counted(block: int | None) -> Sites:
        found.append(Sites(look_up(block)))
        return found[-1]

    monkeypatch.setattr(optimizer, "_sites", counted)
    for _ in range(6):
        optimizer.step(closure_of(model))
    blocks = optimizer.param_groups[0].get("blocks")
    # The first step makes state, and one more look follows it.
    looks = 2 * (len(blocks) if isinstance(blocks, list) else 1)
    assert len(found) <= looks or not found[-1].lasting


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_counts_are_checked_before_memory_is_taken(row: Row) -> None:
    key = "population_size" if row.cls is zoopt.EvolutionStrategy else "num_probes"
    with pytest.raises(ValueError, match=rf"{key} must be at most 2\^20, got 3000000000"):
        row.build(mlp(), **{key: 3 * 10**9})
    model, optimizer = run(row, 1)
    optimizer.param_groups[0]["draw"] = 2**32
    with pytest.raises(RuntimeError, match=r"used all of its 2\^32 draws"):
        optimizer.step(closure_of(model))
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_parameters_without_values_are_refused_where_they_are(row: Row, perturbation: str) -> None:
    model = mlp().to("meta")
    optimizer = row.build(model, perturbation=perturbation)
    with pytest.raises(RuntimeError, match=r"'0.weight' must hold values, got one on the meta dev"):
        optimizer.step(lambda: pytest.fail("evaluated"))
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_autograd_sees_that_weights_were_written(row: Row, perturbation: str) -> None:
    """A graph from before the step has gradients of weights that are no more: torch refuses it."""
    model = mlp()
    optimizer = row.build(model, perturbation=perturbation)
    output = model(regression()[0].requires_grad_())
    optimizer.step(closure_of(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
