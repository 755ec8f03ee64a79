"""Imports go one way: what a module may know of the others, and that none lead back to it."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "zoopt"
#: From the bottom up; a module imports its own layer and those below. A folder stands for all in
#: it that no longer name covers.
LAYERS = (
    ("checks", "dtypes", "version", "warn"),
    ("kernels",),
    ("ambient", "distributed", "linalg", "noise", "registry"),
    ("checkpoint", "groups", "nn", "optimizer", "parameters"),
    ("first_order.base", "first_order.projected", "zeroth_order.engine"),
    ("first_order", "zeroth_order"),
    ("compact", "lowrank", "selection", "trajectory"),
    ("",),
    ("memory",),
    ("bench", "cli", "doctor", "integrations"),
)
MODULES: dict[str, Path] = {}
for _path in sorted(PACKAGE.rglob("*.py")):
    _parts = _path.relative_to(PACKAGE).with_suffix("").parts
    MODULES[".".join(_parts[:-1] if _parts[-1] == "__init__" else _parts)] = _path


def imports(module: str) -> set[str]:
    """The modules of the package that are imported when this one is."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                visit(node.body)
                visit(node.orelse)
            elif isinstance(node, ast.Try):
                visit(node.body)
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                found.update(name[6:] for name in names if (name + ".").startswith("zoopt."))
            elif isinstance(node, ast.ImportFrom) and (f"{node.module}.").startswith("zoopt."):
                origin = str(node.module)[6:]
                for alias in node.names:
                    inner = f"{origin}.{alias.name}".lstrip(".")
                    found.add(inner if inner in MODULES else origin)

    visit(ast.parse(MODULES[module].read_text()).body)
    return found & MODULES.keys()


def layer(module: str) -> int:
    """The layer of the longest name that covers the module."""
    covering = {
        name: number
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or (name and module.startswith(f"{name}."))
    }
    return covering[max(covering, key=len)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    above = {name for name in imports(module) if layer(name) > layer(module)}
    assert not above, f"zoopt.{module} must not know {sorted(above)}"


def test_no_imports_lead_in_a_circle() -> None:
    graph = {module: imports(module) for module in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)


def test_the_check_sees_imports() -> None:
    assert {"first_order", "kernels", "zeroth_order"} <= imports("")
    assert "kernels.noise.key" in imports("optimizer") | imports("zeroth_order.engine.base")
    assert layer("first_order.projected.core") < layer("first_order.galore") < layer("memory.plan")
