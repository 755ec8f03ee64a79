"""The registry: a row for every optimizer, and for every row a contract, an oracle and a page."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import zoopt
from tests import first_order_table, optimizer_table
from zoopt import registry
from zoopt.bench import methods as benchmarks
from zoopt.memory.methods import methods

ROOT = Path(__file__).parents[1]
CONTRACTS = [*optimizer_table.ROWS, *first_order_table.ROWS]
#: Rows without a contract row, with the test that holds them to what a contract asks, and why.
ELSEWHERE = {
    "hybrid": ("tests/test_hybrid.py", "made of two optimizers"),
    "owlore": ("tests/test_owlore.py", "made of a model; of all layers it is GaLore, to the bit"),
}
every_row = pytest.mark.parametrize("row", registry.rows(), ids=lambda row: row.name)


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))]


def test_every_exported_optimizer_has_a_row() -> None:
    exported = {
        value
        for name in zoopt.__all__
        if inspect.isclass(value := getattr(zoopt, name))
        and issubclass(value, torch.optim.Optimizer)
    }
    assert len(exported) > 20
    assert {row.cls for row in registry.rows()} == exported


@every_row
def test_has_a_contract_and_an_oracle(row: registry.Row) -> None:
    own = [contract for contract in CONTRACTS if contract.cls is row.cls]
    if row.name in ELSEWHERE:
        assert not own, "take the row out of ELSEWHERE"
        assert f"{row.cls.__name__}(" in (ROOT / ELSEWHERE[row.name][0]).read_text()
        return
    assert any(contract.oracle is not None for contract in own)


@every_row
def test_has_a_page(row: registry.Row) -> None:
    assert f"`zoopt.{row.cls.__name__}`" in (ROOT / row.page).read_text()


@every_row
def test_has_a_summary_of_a_line(row: registry.Row) -> None:
    assert 20 < len(row.summary) < 140
    assert row.summary.endswith(".")


@every_row
def test_is_found_in_any_spelling(row: registry.Row) -> None:
    name = row.cls.__name__
    for spelling in (row.name, name, name.lower(), row.name.upper(), row.name.replace("-", "_")):
        assert registry.find(spelling) is row


@every_row
def test_is_listed_by_the_planner_and_the_benchmarks(row: registry.Row) -> None:
    planned = {method.name for method in methods()}
    measured = {entry.name for entry in benchmarks.table().values()}
    shown = row.cls.__name__
    shown = f"zoopt.{shown}" if hasattr(torch.optim, shown) else shown
    for variant in row.variants:
        label = row.recipe.label if row.recipe else ""
        name = ", ".join(filter(None, (shown, label, variant.label)))
        assert name in measured
        assert (name in planned) is variant.planned
        assert (f"{name}, fused backward" in planned) is (variant.fused and variant.planned)


def test_names_by_family() -> None:
    assert zoopt.optimizers("compact") == ["adamw", "sm3", "sparse-delta-adamw"]
    families = ("zeroth-order", "low-rank", "compact")
    assert zoopt.optimizers() == [name for f in families for name in zoopt.optimizers(f)]
    with pytest.raises(ValueError, match="family must be one of 'zeroth-order', 'low-rank', "):
        zoopt.optimizers("lowrank")  # type: ignore[arg-type]


def test_makes_an_optimizer_by_its_name() -> None:
    made = zoopt.optimizer("galore-adamw", params(), lr=0.5, rank=2)
    assert type(made) is zoopt.GaLoreAdamW
    assert made.param_groups[0]["lr"] == 0.5
    assert made.param_groups[0]["rank"] == 2
    assert type(zoopt.optimizer("MeZO", params())) is zoopt.MeZO


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("galore-adam", "did you mean 'galore-adamw'"),
        ("MeZo2", "got 'MeZo2'; did you mean 'mezo'"),
        ("sgd", "name must be one of conmezo, "),
        (3, "name must be one of conmezo, .*, got 3"),
    ],
)
def test_unknown_names_are_told_the_nearest(name: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoopt.optimizer(name, params())


def test_registering_is_all_that_a_new_method_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rows", dict(registry._rows))

    @registry.register("my-method", "low-rank", registry.Variant("int8 state"))
    class MyMethod(zoopt.GaLoreAdamW):
        """A method of somebody's."""

    assert "my-method" in zoopt.optimizers("low-rank")
    assert type(zoopt.optimizer("my_method", params())) is MyMethod
    assert "MyMethod, int8 state" in {method.name for method in methods()}
    assert "mymethod-int8-state" in benchmarks.table()
    with pytest.raises(ValueError, match="name must be new, got 'My-Method', which is MyMethod"):
        registry.register("My-Method", "compact")(zoopt.SM3)
