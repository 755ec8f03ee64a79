"""Imports go one way, without cycles; and functions take few parameters."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "zoopt"
#: From the bottom up; a module imports its own layer and those below. A folder stands for all in
#: it that no longer name covers.
LAYERS = (
    ("checks", "dtypes", "interrupts", "removable", "version", "warn", "wrapper"),
    ("kernels",),
    ("ambient", "distributed", "linalg", "noise", "registry"),
    ("checkpoint", "groups", "lasting", "nn", "optimizer", "parameters"),
    (
        "first_order.base",
        "first_order.checks",
        "first_order.known",
        "first_order.progress",
        "first_order.projected",
        "first_order.site",
        "zeroth_order.engine",
    ),
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


#: Files of operations, whose callers name each argument, and of their implementations, which take
#: the operation's operands; and how many such functions there are at most. To add one, first group
#: operands that belong together, as SM3's do.
OPERATIONS = {("op",): 8, ("cpu", "gpu", "reference"): 13}
#: Other functions that may take ten parameters or more, with the reason.
LONG = {
    "memory.measure.measure": "public, and its arguments are those of the command line",
    "memory.plan.plan": "public, and its arguments are those of the command line",
    "first_order.projected.subspace.subspace": "options of the projectors, by keyword",
    "trajectory.script._adam_window": "the operands of `adam_window_`, by name",
}


def long_functions() -> list[str]:
    """Functions of ten parameters or more, other than compiled kernels, overloads and
    constructors."""
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name == "__init__":
                continue
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if any(word in decorators for word in ("jit", "intrinsic", "overload")):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len([own for own in arguments if own.arg not in ("self", "cls")]) >= 10:
                found.append(f"{module}.{node.name}")
    return found


def test_functions_take_few_parameters() -> None:
    left = set(long_functions())
    for files, most in OPERATIONS.items():
        own = {
            name
            for name in left
            if name.startswith("kernels.") and name.split(".")[-2].startswith(files)
        }
        assert 0 < len(own) <= most
        left -= own
    assert left <= set(LONG)
