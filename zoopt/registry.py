"""The optimizers of the package, one row each; their classes are registered where they are defined.

The planner, the benchmarks, the command line and the documentation read these rows. To find an
optimizer by its name, and to make it:

    zoopt.optimizers("low-rank")
    zoopt.optimizer("galore-adamw", model.named_parameters(), lr=1e-3, rank=128)
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from torch import nn
from torch.optim import Optimizer

from zoopt.checks import check_choice, nearest

Family = Literal["zeroth-order", "low-rank", "compact"]
_Class = TypeVar("_Class", bound=type[Optimizer])


class Variant(NamedTuple):
    """A method with options that change its memory or time.

    Attributes:
        label: what tables add to the method's name; "" for the default options.
        options: the class's options.
        planned: whether `zoopt plan` lists it; benchmarks measure all.
        fused: whether it is listed with a fused backward pass too.
    """

    label: str = ""
    options: Mapping[str, Any] = {}  # never written to
    planned: bool = True
    fused: bool = False


class Recipe(NamedTuple):
    """How to make a method that needs more than a model's parameters.

    Attributes:
        build: (the prepared model, the rank of low-rank methods) -> the optimizer.
        adapt: prepares the model first, and returns what is trained.
        label: what tables add to the method's name.
        graph: whether the closure of a zeroth-order step returns the loss with its graph.
        layers: how many of a model's repeated layers it treats differently from the others.
    """

    build: Callable[[nn.Module, int], Optimizer]
    adapt: Callable[[nn.Module, int], nn.Module] | None = None
    label: str = ""
    graph: bool = False
    layers: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        name: for `zoopt.optimizer(name)`, and of its page, docs/optimizers/<name>.md.
        cls: the class, `zoopt.<class name>`.
        family: the way in which it saves memory.
        variants: those that the planner and the benchmarks list.
        recipe: how they make it. None: from the trained parameters; those of linear layers get the
            requested rank if the family is "low-rank" and the class has a rank.
    """

    name: str
    cls: type[Optimizer]
    family: Family
    variants: tuple[Variant, ...]
    recipe: Recipe | None

    @property
    def summary(self) -> str:
        """The first paragraph of the class's documentation, on one line."""
        return " ".join((inspect.getdoc(self.cls) or "").partition("\n\n")[0].split())

    @property
    def page(self) -> str:
        """The page of the documentation, from the checkout's root."""
        return f"docs/optimizers/{self.name}.md"


_rows: dict[str, Row] = {}


def register(
    name: str,
    family: Family,
    *variants: Variant,
    recipe: Recipe | None = None,
) -> Callable[[_Class], _Class]:
    """A class decorator that gives an optimizer its row.

    Args:
        name, family, recipe: as in `Row`.
        variants: default, the method with its default options.
    """
    check_choice("family", family, get_args(Family))

    def add(cls: _Class) -> _Class:
        if _key(name) in map(_key, _rows):
            taken = find(name).cls.__name__
            raise ValueError(f"name must be new, got {name!r}, which is {taken}")
        _rows[name] = Row(name, cls, family, variants or (Variant(),), recipe)
        return cls

    return add


def rows(family: Family | None = None) -> list[Row]:
    """The optimizers' rows, of one family or of all, by family and name.

    Raises:
        ValueError: an unknown family.
    """
    families = get_args(Family)
    if family is not None:
        check_choice("family", family, families)
    chosen = [row for row in _rows.values() if family in (None, row.family)]
    return sorted(chosen, key=lambda row: (families.index(row.family), row.name))


def optimizers(family: Family | None = None) -> list[str]:
    """The names by which `zoopt.optimizer` makes optimizers.

    Args:
        family: "zeroth-order", "low-rank" or "compact"; default all three.

    Raises:
        ValueError: an unknown family.
    """
    return [row.name for row in rows(family)]


def optimizer(name: str, params: Any, **options: Any) -> Optimizer:
    """Make an optimizer by its name.

    Args:
        name: one of `zoopt.optimizers()`, or the name of a class, in any spelling: "galore-adamw",
            "GaLoreAdamW".
        params: the class's first argument: parameters, named parameters or param groups (`OwLore`:
            the model; `Hybrid`: its zeroth-order optimizer).
        options: the class's options.

    Raises:
        ValueError: an unknown name.
        TypeError, ValueError: as for the class.

    Example:
        >>> opt = zoopt.optimizer("galore-adamw", model.named_parameters(), lr=1e-3, rank=128)
    """
    cls: Callable[..., Optimizer] = find(name).cls
    return cls(params, **options)


def find(name: str) -> Row:
    """The row of an optimizer, by its name or its class's in any spelling.

    Raises:
        ValueError: an unknown name.
    """
    for row in _rows.values():
        if isinstance(name, str) and _key(name) in (_key(row.name), _key(row.cls.__name__)):
            return row
    raise ValueError(
        f"name must be one of {', '.join(optimizers())}, got {name!r}{nearest(name, optimizers())}"
    )


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
