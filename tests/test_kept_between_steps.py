"""What is kept between steps follows what changes between them.

Passes are gathered as on a GPU, and made by the CPU's kernels.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

import zoopt
from tests.optimizer_table import ROWS, Row, closure_of, mlp
from zoopt.kernels import dispatch
from zoopt.lasting import Facts
from zoopt.zeroth_order.engine import passes

CHANGING = ["MeZO momentum", "MeZO indices momentum", "MeZO magnitude mask", "ZOAdam dense"]
CHANGING += ["HiZOO", "ConMeZO", "ZOSignSGD elementwise"]
#: Sums of products are made in another order where matrices are gathered.
PRODUCTS = [row for row in ROWS if row.cls in (zoopt.LOZO, zoopt.SubZero, zoopt.ZOMuon)]
PRODUCTS += [row for row in ROWS if str(row) == "EvolutionStrategy single rank"]


def changed_between(
    row: Row, mode: str
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Weights, state and losses of steps between which parameters, groups and state change."""
    model = mlp(torch.bfloat16)
    optimizer, params = row.build(model, perturbation=mode), list(model.parameters())
    closure, losses = closure_of(model, torch.bfloat16), list[float]()

    def moving() -> Any:
        if mode == "inplace":
            params[2].data = params[2].data.clone()
        return closure()

    def steps(count: int, closure: Any = closure) -> None:
        losses.extend(optimizer.step(closure) for _ in range(count))

    steps(2)
    params[0].data = params[0].data.clone()
    steps(1)
    params[1].requires_grad_(False)
    steps(1)
    params[1].requires_grad_(True)
    optimizer.param_groups[0]["lr"] *= 2.0
    steps(1)
    for param, own in list(optimizer.state.items())[:1]:
        optimizer.state[param] = {name: value.clone() for name, value in own.items()}
    steps(1)
    for own in list(optimizer.state.values())[2:3]:
        if "step" in own:
            own["step"] += 3
    steps(1, moving)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(2)
    state = [value for own in optimizer.state.values() for value in own.values()]
    return params, state, losses


@pytest.mark.parametrize("mode", ["inplace", "virtual"])
@pytest.mark.parametrize("row", [row for row in ROWS if str(row) in CHANGING], ids=str)
def test_what_is_kept_between_steps_follows_changes(
    row: Row, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved parameters (while a closure runs, too), frozen ones, other rates, new state and other
    counts of steps, a checkpoint."""
    expected = changed_between(row, mode)
    monkeypatch.setattr(dispatch, "launches", lambda theta: True)
    assert equal(changed_between(row, mode), expected)


@pytest.mark.parametrize("mode", ["inplace", "virtual"])
@pytest.mark.parametrize("row", PRODUCTS, ids=str)
def test_kept_factors_are_those_made_anew(
    row: Row, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "launches", lambda theta: True)
    got = changed_between(row, mode)
    monkeypatch.setattr(Facts, "holds", lambda self, before: False)
    assert equal(changed_between(row, mode), got)


def equal(got: Any, expected: Any) -> bool:
    """Weights and state, and losses."""
    pairs = [pair for i in range(2) for pair in zip(got[i], expected[i], strict=True)]
    return got[2] == expected[2] and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["ZOAdam dense", "HiZOO", "MeZO momentum"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_pass_that_fails_once_is_made_once(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is finished before the error is raised, with the numbers of its first attempt."""
    [row] = [row for row in ROWS if str(row) == name]
    monkeypatch.setattr(dispatch, "launches", lambda theta: True)
    results = []
    for fails in (False, True):
        model = mlp()
        optimizer, closure = row.build(model, perturbation="virtual"), closure_of(model)
        for _ in range(steps):
            optimizer.step(closure)
        errors = [MemoryError("none left")] if fails else []

        def once(operation: Any, errors: list[Exception] = errors) -> Any:
            def run(*args: Any, **options: Any) -> Any:
                if errors:
                    raise errors.pop()
                return operation(*args, **options)

            return run

        with monkeypatch.context() as patch:
            for operation in ("descend", "momentum"):
                patch.setitem(passes._OPERATIONS, operation, once(passes._OPERATIONS[operation]))
            with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
                optimizer.step(closure)
        assert not errors
        state = [value for own in optimizer.state.values() for value in own.values()]
        results.append([*model.parameters(), *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def changed_gradients(cls: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    """Weights and state of first-order steps between which gradients and the rest change."""
    torch.manual_seed(3)
    shapes = [(64, 65), (70,), (64, 65), (3, 30)]
    params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
    optimizer = cls(params, lr=1e-2, seed=1, **options)

    def step(missing: int | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        for i, param in enumerate(params):
            gradient = torch.randn(param.shape).to(dtype)
            param.grad = None
            if dtype == param.dtype and i != missing:
                # The last one's memory is not in row-major order.
                param.grad = gradient.t().contiguous().t() if i == 3 else gradient
        optimizer.step()

    step()
    step()
    step(missing=1)
    step()
    params[0].data = params[0].data.clone()
    step()
    optimizer.param_groups[0]["lr"] *= 2.0
    optimizer.state[params[0]] = {n: v.clone() for n, v in optimizer.state[params[0]].items()}
    step()
    if "step" in optimizer.state[params[2]]:
        optimizer.state[params[2]]["step"] += 3
    step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(5).bfloat16())]})
    params += optimizer.param_groups[1]["params"]
    step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step()
    step()
    return params + [value for own in optimizer.state.values() for value in own.values()]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (zoopt.AdamW, {}),
        (zoopt.AdamW, {"state_dtype": "bfloat16"}),
        (zoopt.AdamW, {"state_dtype": "int8"}),
        (zoopt.SM3, {"momentum": 0.9}),
    ],
)
def test_what_a_step_knows_from_the_last_one_follows_changes(
    cls: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a step that knows nothing takes the parameters one by one, with the same bits."""
    got = changed_gradients(cls, options)
    monkeypatch.setattr(cls, "kinds_last", False)
    expected = changed_gradients(cls, options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
