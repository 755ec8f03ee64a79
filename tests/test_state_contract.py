"""What every optimizer promises of its groups and checkpoints, over both contract tables."""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import zoopt
from tests import first_order_table, optimizer_table
from tests.compare import same

ROWS: list[Any] = [*optimizer_table.ROWS, *first_order_table.ROWS]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def is_zeroth_order(row: Any) -> bool:
    return isinstance(row, optimizer_table.Row)


def fresh(row: Any) -> nn.Module:
    return optimizer_table.mlp() if is_zeroth_order(row) else first_order_table.net()


def build(row: Any, params: Any, **options: Any) -> Any:
    return row.cls(params, **{**row.options, **options})


def advance(row: Any, model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        if is_zeroth_order(row):
            optimizer.step(optimizer_table.closure_of(model))
        else:
            first_order_table.backward(model)
            optimizer.step()


def begun(row: Any, steps: int = 2, **options: Any) -> tuple[nn.Module, Any]:
    model = fresh(row)
    optimizer = build(row, model.named_parameters(), **options)
    advance(row, model, optimizer, steps)
    return model, optimizer


def bits(value: Any) -> Any:
    """Something that is equal where the values are, to the bit."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8) if value.numel() else value
        return value.dtype, tuple(value.shape), data.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [bits(each) for each in value]
    return repr(value)


def refuses(optimizer: Any, state_dict: Any, match: str | None = None) -> None:
    """The state_dict is refused, and nothing has changed."""
    before = bits(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=match):
        optimizer.load_state_dict(state_dict)
    assert bits(optimizer.state_dict()) == before


def named_by(row: Any) -> bool:
    """Whether its options name parameters."""
    return isinstance(row.options.get("mask"), dict) or isinstance(row.options.get("blocks"), list)


every_free_row = pytest.mark.parametrize("row", [r for r in ROWS if not named_by(r)], ids=str)


@every_free_row
@pytest.mark.parametrize("saved_with_names", [False, True])
def test_a_run_keeps_the_names_that_it_was_saved_with(row: Any, saved_with_names: bool) -> None:
    def params(model: nn.Module, names: bool) -> Any:
        return model.named_parameters() if names else model.parameters()

    whole = fresh(row)
    advance(row, whole, build(row, params(whole, saved_with_names)), 7)
    model = fresh(row)
    optimizer = build(row, params(model, saved_with_names))
    advance(row, model, optimizer, 3)
    state_dict = copy.deepcopy(optimizer.state_dict())
    resumed = build(row, params(model, not saved_with_names), seed=99)
    resumed.load_state_dict(state_dict)
    advance(row, model, resumed, 4)
    assert same(model, whole)
    assert resumed.state_dict()["param_groups"][0].keys() == state_dict["param_groups"][0].keys()


@every_row
def test_a_checkpoint_in_another_order_is_refused(row: Any) -> None:
    _model, optimizer = begun(row)
    state_dict = optimizer.state_dict()
    names = state_dict["param_groups"][0]["param_names"]
    state_dict["param_groups"][0] |= {"param_names": names[::-1]}
    refuses(optimizer, state_dict, "parameters in the same order")


@every_row
def test_state_that_belongs_to_no_parameter(row: Any) -> None:
    model, optimizer = begun(row)
    optimizer.state["mine"] = {"count": torch.tensor(3)}  # type: ignore[index]
    state_dict = optimizer.state_dict()
    other = build(row, model.named_parameters())
    other.load_state_dict(state_dict)
    assert other.state["mine"] == {"count": torch.tensor(3)}
    assert bits(other.state_dict()) == bits(state_dict)
    state_dict["state"][99] = {}
    refuses(other, state_dict, "of the optimizer's .* parameters, got some of number 99")


@every_row
def test_state_dict_hooks_may_return_their_own_structure(row: Any) -> None:
    model, optimizer = begun(row)
    seen = []
    optimizer.register_state_dict_post_hook(
        lambda _, state_dict: seen.append(state_dict) or {"inside": state_dict}  # type: ignore[func-returns-value]
    )
    saved = optimizer.state_dict()
    assert saved == {"inside": seen[0]}
    assert "shapes" in seen[0]["param_groups"][0]
    twin = copy.deepcopy(model)
    other = build(row, twin.named_parameters(), seed=99)
    other.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict["inside"])
    other.load_state_dict(saved)
    advance(row, model, optimizer, 2)
    advance(row, twin, other, 2)
    assert same(model, twin)


@every_row
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_all_that_the_original_has(row: Any, way: str) -> None:
    model, optimizer = begun(row)
    if is_zeroth_order(row):
        optimizer.skipped_probes = 3
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for name in ("last_step", "skipped_probes"):
        assert getattr(other, name, None) == getattr(optimizer, name, None)
    advance(row, model, optimizer, 2)
    advance(row, twin, other, 2)
    assert same(model, twin)


@every_free_row
def test_a_parameter_twice_is_refused(row: Any) -> None:
    model = fresh(row)
    first, second, *_ = model.parameters()
    for params in (
        [first, second, first],
        [("a", first), ("b", second), ("c", first)],
        [{"params": [first, second, first]}],
        [{"params": [first, second]}, {"params": first}],
        (param for param in (first, first)),
    ):
        with pytest.raises(ValueError, match=r"once|more than one parameter group"):
            build(row, params)


UNORDERED: list[Callable[[list[Any]], Any]] = [set, frozenset, weakref.WeakSet]


@every_row
def test_parameters_without_an_order_are_refused(row: Any) -> None:
    _model, optimizer = begun(row)
    extra = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    groups = len(optimizer.param_groups)
    for unordered in UNORDERED:
        for params in (unordered(extra), [{"params": unordered(extra)}]):
            with pytest.raises(TypeError, match="params must be in an order"):
                build(row, params)
        with pytest.raises(TypeError, match="params must be in an order"):
            optimizer.add_param_group({"params": unordered(extra)})
        assert len(optimizer.param_groups) == groups


@every_free_row
def test_groups_of_the_wrong_form_are_refused(row: Any) -> None:
    _model, optimizer = begun(row)
    before = bits(optimizer.state_dict())
    extra = nn.Parameter(torch.ones(2, 2))
    for group, kind, message in (
        ({"lr": 1e-3}, ValueError, "a dict with the key 'params', got the keys \\['lr'\\]"),
        ([("x", extra)], TypeError, "a param group must be a dict"),
        ({"params": [("x", extra), extra]}, ValueError, "all tensors, or all"),
        ({"params": ["x"]}, TypeError, "params must be tensors or .* pairs, got a str"),
        ({"params": [(1, extra)]}, TypeError, "names of parameters must be strings"),
        ({"params": [extra], "param_names": ["x", "y"]}, ValueError, "param_names must name the 1"),
        ({"params": [("x", extra)], "noise_version": 99}, ValueError, "noise_version must be 1"),
        ({"params": [("x", extra)], "seed": 1}, ValueError, "seed must be the same in every"),
        ({"params": [("x", extra)], "weight_deacy": 0.1}, ValueError, "mean 'weight_decay'"),
        ({"params": [("x", extra)], "lr": math.nan}, ValueError, "lr must be a finite number"),
    ):
        with pytest.raises(kind, match=message):
            optimizer.add_param_group(group)
        if "seed" not in group:  # which the first group may choose
            with pytest.raises((TypeError, ValueError)):
                build(row, [group])
        assert bits(optimizer.state_dict()) == before


#: Values that no constructor takes, by group key.
BAD: dict[str, list[Any]] = {
    "lr": [math.nan, math.inf, -1.0, None, "1", True, [1.0], 10**400, 1j, torch.ones(2)],
    "weight_decay": [math.nan, -0.1, None, 10**400],
    "maximize": [1, None, "yes"],
    "rounding": ["up", None, 3],
    "seed": [-1, 1 << 64, 0.5, None, True],
    "noise_version": [0, 99, None],
    "zo_eps": [0.0, -1.0, math.nan, None],
    "sigma": [0.0, math.nan, "x"],
    "num_probes": [0, -1, 1.5, None, 3 * 10**9, 10**400],
    "population_size": [0, 1, 2.5, 3 * 10**9],
    "estimator": ["three", None, ["one-sided"]],
    "distribution": ["uniform", None],
    "perturbation": ["none", None],
    "max_projected_grad": [0.0, -1.0, math.nan],
    "momentum": [-0.1, 1.0, math.nan, None],
    "momentum_window": [0, 1.5, "x"],
    "window": [0, -1, "x", [3], ((None, ((1, math.nan),)),)],
    "past": [None, [3], ((None, ((-1, 1.0),)),)],
    "mask": [3, "small", [1, 2], np.ones(3), {"0.weight": [1]}],
    "density": [0.0, -0.5, 1.5, math.nan, "x", [0.5]],
    "betas": [None, 0.9, (0.9,), (0.9, 1.0), (math.nan, 0.9), ("a", "b")],
    "eps": [-1.0, math.nan, "x"],
    "rank": [0, -1, 1.5, "x", True],
    "basis_update_gap": [0, 1.5, None],
    "basis_draw": [-1, 1.5],
    "update_proj_gap": [0, 1.5, None],
    "scale": [-1.0, math.nan, "x"],
    "proj_type": ["up", None, 3],
    "projector": ["pca", None],
    "stagger": [1, None],
    "state_dtype": ["int2", None],
    "state_rounding": ["up", None],
    "step": [-1, 1.5, "x"],
    "draw": [-1, 1.5, (1 << 32) + 1],
    "updates": [-1, 0.5],
    "cone_angle": [0.0, 2.0],
    "hessian_smooth": [-0.1, 1.0],
    "warmup_steps": [-1, 0.5],
    "rho": [-0.1, 1.0],
    "error_feedback": [1],
    "norm_growth_limit": ["x"],
    "sign_lr_scale": [-1.0, "x"],
    "rule": ["adagrad", None],
    "queue_size": [0, 1.5],
    "cos_threshold": [-0.1, 1.5],
    "d": [0.5, "x"],
    "beta1": [1.0, -0.1],
    "shaping": ["log", None],
    "antithetic": [1, None],
    "blocks": [3, [], ["nothing"]],
    "block_order": ["up", None],
}


@every_row
def test_what_a_constructor_refuses_a_checkpoint_is_refused_for(row: Any) -> None:
    _model, optimizer = begun(row)
    saved = optimizer.state_dict()
    tried = 0
    for key, values in BAD.items():
        if key not in saved["param_groups"][0]:
            continue
        for value in values:
            if row.cls is zoopt.Frugal and key == "betas" and value is None:
                continue  # its rule's own
            tried += 1
            with pytest.raises((TypeError, ValueError), match=key.removesuffix("s")):
                build(row, [{"params": fresh(row).named_parameters(), key: value}])
            damaged = {**saved, "param_groups": [{**saved["param_groups"][0], key: value}]}
            refuses(optimizer, damaged)
    assert tried > 20


@every_row
def test_missing_and_unknown_keys_of_a_checkpoint_are_named(row: Any) -> None:
    _model, optimizer = begun(row)
    saved = optimizer.state_dict()
    [group] = saved["param_groups"]
    for key in group.keys() - {"params", "param_names", "shapes"}:
        without = {name: value for name, value in group.items() if name != key}
        refuses(optimizer, {**saved, "param_groups": [without]}, f"have no '{key}'")
    for extra, match in (("weight_deacy", "mean 'weight_decay'"), ("amsgrad", "got 'amsgrad'")):
        refuses(optimizer, {**saved, "param_groups": [{**group, extra: 0.1}]}, match)


@every_row
def test_states_of_the_wrong_form_are_refused(row: Any) -> None:
    _model, optimizer = begun(row)
    saved = optimizer.state_dict()
    stateful = next((index for index, entries in saved["state"].items() if entries), None)
    for damaged in (
        [],
        {"state": saved["state"]},
        {**saved, "state": None},
        {**saved, "state": []},
        {**saved, "param_groups": None},
        {**saved, "param_groups": {}},
        {**saved, "param_groups": [None]},
        {**saved, "param_groups": [{**saved["param_groups"][0], "params": [0] * 6}]},
        {**saved, "state": {0: None}},
        {**saved, "state": {0: [1.0]}},
        {**saved, "state": {0: {"no such": torch.zeros(3)}}},
    ):
        refuses(optimizer, damaged)
    if stateful is None:
        return
    for name, value in saved["state"][stateful].items():

        def entry(changed: Any, name: str = name) -> Any:
            entries = {**saved["state"][stateful], name: changed}
            return {**saved, "state": {**saved["state"], stateful: entries}}

        without = {k: v for k, v in saved["state"][stateful].items() if k != name}
        lacking = {**saved, "state": {**saved["state"], stateful: without}}
        if without:
            refuses(optimizer, lacking, f"got none for '{name}'")
        for damaged in (None, [1.0], value.tolist() if value.dim() else "x", value.to("meta")):
            refuses(optimizer, entry(damaged), f"state '{name}' of parameter {stateful} must be")
        refuses(optimizer, entry(torch.stack((value, value))), "must be a torch")
        refuses(optimizer, entry(value.to(torch.complex64)), "must be a torch")
        if value.dim() > 0:
            refuses(
                optimizer, entry(value.to_sparse()), "must be a torch.* layout torch.sparse_coo"
            )
        if name == "step":
            for number in (-3, math.nan, math.inf, 1.5, 2.0**60):
                for form in (torch.tensor(number, dtype=torch.float64), number):
                    refuses(optimizer, entry(form), "number from 0 to")


@every_row
def test_state_in_any_memory_layout_loads(row: Any) -> None:
    model, optimizer = begun(row)
    saved = copy.deepcopy(optimizer.state_dict())
    for entries in saved["state"].values():
        for name, value in entries.items():
            if value.dim():
                entries[name] = torch.stack((value, value), -1)[..., 0].requires_grad_(
                    value.dtype.is_floating_point
                )
                assert not entries[name].is_contiguous() or value.numel() < 2
    twin = copy.deepcopy(model)
    other = build(row, twin.named_parameters(), seed=99)
    other.load_state_dict(saved)
    for state in other.state.values():
        assert all(value.is_contiguous() and value.is_leaf for value in state.values())
        assert not any(value.requires_grad for value in state.values())
    advance(row, model, optimizer, 2)
    advance(row, twin, other, 2)
    assert same(model, twin)


@every_row
def test_numbers_of_numpys_become_pythons(row: Any) -> None:
    """In the arguments, in a group and from a scheduler: checkpoints load with weights_only."""
    model = fresh(row)
    options = {"lr": np.float64(row.options["lr"]), "weight_decay": np.float32(0.5)}
    if "rank" in row.options and row.options["rank"] is not None:
        options["rank"] = np.int64(row.options["rank"])
    optimizer = build(row, model.named_parameters(), **options)
    optimizer.add_param_group(
        {"params": [("more", nn.Parameter(torch.ones(4, 3)))], "lr": np.array(0.25)}
        | ({"mask": None} if named_by(row) and "mask" in row.options else {})
        | ({"blocks": row.options["blocks"]} if "blocks" in row.options else {})
    )
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert optimizer.param_groups[1]["lr"] == 0.25
    optimizer.param_groups[0]["lr"] = np.float64(0.125)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"][0]["lr"] == 0.125
    assert loaded["param_groups"][0]["weight_decay"] == 0.5
    optimizer.load_state_dict(loaded)


@every_row
def test_keys_of_schedulers_and_labels_stay(row: Any) -> None:
    model = fresh(row)
    optimizer = build(row, [{"params": model.named_parameters(), "name": "all"}])
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5, cycle_momentum=False)
    torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    other = build(row, fresh(row).named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    assert other.param_groups[0]["name"] == "all"
    assert {"initial_lr", "max_lr", "min_lr", "swa_lr"} <= other.param_groups[0].keys()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a state_dict, inner ones first."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from leaves(each, (*path, index))
    if path:
        yield path


def damaged(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy with one place changed; the place is dropped where `change` returns KeyError."""
    if not path:
        return change(value)
    key, *rest = path
    new = damaged(value[key], tuple(rest), change)
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != key}
        return kept if new is KeyError else {**kept, key: new}
    before, after = list(value[:key]), list(value[key + 1 :])
    return type(value)(before + ([] if new is KeyError else [new]) + after)


def transposed(value: Any) -> Any:
    return (
        value.mT.contiguous().mT if isinstance(value, torch.Tensor) and value.dim() > 1 else value
    )


def negative(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.Tensor):
        return -3
    return -value if not isinstance(value, torch.Tensor) or value.is_floating_point() else -3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "dropped": lambda _: KeyError,
    "None": lambda _: None,
    "NaN": lambda _: math.nan,
    "infinite": lambda _: math.inf,
    "huge": lambda _: 10**400,
    "negative": negative,
    "zero": lambda _: 0,
    "half": lambda _: 0.5,
    "text": lambda _: "x",
    "empty list": lambda _: [],
    "in a list": lambda value: [value],
    "dict": lambda value: {"x": value},
    "tensor": lambda _: torch.zeros(3),
    "number as tensor": lambda value: torch.tensor(-1.5),
    "sparse": lambda v: torch.zeros(getattr(v, "shape", (2, 2))).to_sparse(),
    "meta": lambda v: v.to("meta") if isinstance(v, torch.Tensor) else torch.ones(1, device="meta"),
    "transposed": transposed,
    "bfloat16": lambda v: v.bfloat16() if isinstance(v, torch.Tensor) else v,
    "object": lambda _: object(),
}
#: One of each form of state.
FUZZED = [
    *(
        "MeZO momentum",
        "MeZO window",
        "MeZO magnitude mask",
        "MeZO indices momentum",
        "MeZO blocks",
    ),
    *("ZOAdam dense", "ZOAdam window", "ZOAdam scalar", "HiZOO", "ConMeZO", "LOZO momentum"),
    *("SubZero", "ZOMuon", "FZOO", "ForwardGrad", "ZOConservativeSGD reused"),
    *("EvolutionStrategy single rank", "AdamW", "AdamW int4", "GaLoreAdamW warm"),
    *("GaLoreAdamW two-sided", "QGaLoreAdamW lazy", "Apollo", "Fira", "LDAdamW", "Frugal lion"),
    *("SM3 momentum", "GaLoreAdafactor average", "GradNormLoRP"),
]


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in FUZZED], ids=str)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_damage_is_refused_whole_or_loads_exactly(row: Any, data: st.DataObject) -> None:
    """Nothing changes, or all is as the damaged dict says and a step can be taken from it."""
    model, optimizer = begun(row)
    saved = optimizer.state_dict()
    count = data.draw(st.integers(1, 3))
    for _ in range(count):
        paths = list(leaves(saved))
        if not paths:
            break
        path = data.draw(st.sampled_from(paths))
        change = data.draw(st.sampled_from(sorted(CHANGES)))
        saved = damaged(saved, path, CHANGES[change])
    before = bits(optimizer.state_dict())
    try:
        optimizer.load_state_dict(saved)
    except (TypeError, ValueError):
        assert bits(optimizer.state_dict()) == before
        return
    advance(row, model, optimizer, 1)


def test_every_fuzzed_row_is_in_a_table() -> None:
    assert set(FUZZED) <= {row.name for row in ROWS}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "row", [row for row in optimizer_table.ROWS if row.state_bytes((10, 6), 4)], ids=str
)
def test_torchs_distributed_checkpoints_hold_all_state(row: Any, steps: int, flatten: bool) -> None:
    """Nested and flat, of a run that has visited all blocks or none, without a trace."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = begun(row, steps)
    before = bits(optimizer.state_dict())
    record = get_optimizer_state_dict(model, optimizer, options=options)
    assert bits(optimizer.state_dict()) == before
    twin = copy.deepcopy(model)
    other = build(row, twin.named_parameters(), seed=99)
    wanted = get_optimizer_state_dict(twin, other, options=options)
    if flatten:
        assert {key for key in wanted if key.startswith("state.")} == {
            key for key in record if key.startswith("state.")
        }
    set_optimizer_state_dict(twin, other, copy.deepcopy(record), options=options)
    advance(row, model, optimizer, 3)
    advance(row, twin, other, 3)
    assert same(model, twin)
    assert bits(other.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
