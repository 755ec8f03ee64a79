"""How many files a reader opens to follow a step, from `step` to the write of the weights.

The step is traced in float64, which runs the reference: the code that defines each operation. A
walk is every file with a function that ran, without the side rooms below: code that does not change
what a step computes, or that a reader may take at its word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from tests.walks import called, file_of
from zoopt.first_order import gradnormlorp

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
#: Files, or single functions of files on a walk, that a reader need not open.
SIDE_ROOMS = {
    "Checks, and the state of the surrounding program": (
        "ambient.py",
        "checks.py",
        "first_order/checks.py",
        "kernels/adam/checks.py",
        "kernels/operands.py",
        "kernels/sm3/checks.py",
        "parameters.py",
    ),
    "Numbers and formats: dtypes, rounding, how moments and bases are stored": (
        "dtypes.py",
        "first_order/projected/basis.py",
        "first_order/projected/codecs.py",
        "first_order/projected/geometry.py",
        "kernels/adam/moments.py",
        "kernels/noise/reference.py:round_nearest",
    ),
    "The noise, a pure function, and its names": (
        "kernels/noise/key.py",
        "kernels/noise/philox.py",
        "noise.py",
    ),
    "Bookkeeping: which parameters and elements take part, state, seeds, interruptions": (
        "distributed/checkpoint.py",
        "distributed/seed.py",
        "distributed/sharding.py",
        "first_order/known.py",
        "first_order/progress.py",
        "first_order/site.py",
        "first_order/projected/groups.py",
        "first_order/projected/residuals.py:no_specs",
        "first_order/projected/stacks.py",
        "first_order/projected/state.py",
        "interrupts.py",
        "kernels/journal.py",
        "lasting.py",
        "optimizer.py",
        "zeroth_order/engine/blocks.py",
        "zeroth_order/engine/groups.py",
        "zeroth_order/engine/mask.py",
        "zeroth_order/engine/narrow.py",
        "zeroth_order/engine/progress.py",
        "zeroth_order/engine/sites.py",
        "zeroth_order/engine/sparse.py",
        "zeroth_order/engine/window.py",
    ),
    "Steps that several processes take together": (
        "zeroth_order/engine/job.py",
        "zeroth_order/engine/shared.py",
    ),
    "The call of the closure, under a random state": ("zeroth_order/engine/closure.py",),
    "The choice of an implementation, and batches for it": (
        "kernels/batch.py",
        "kernels/dispatch.py",
        "kernels/noise/op.py",
        "kernels/packed.py",
        "kernels/places.py",
        "zeroth_order/engine/parts.py",
        "zeroth_order/engine/passes.py",
    ),
}
#: Method -> the most files of its walk.
MOST = {"MeZO": 8, "GaLore": 9, "SM3": 5, "GradNormLoRP": 10}


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()


def _forward(model: nn.Module) -> Callable[[], torch.Tensor]:
    data = torch.ones(3, 6, dtype=torch.float64)
    return lambda: model(data).square().mean()


def _mezo() -> Callable[[], Any]:
    model = _model()
    optimizer, closure = zoopt.MeZO(model.named_parameters(), seed=0), _forward(model)
    optimizer.step(closure)
    return lambda: optimizer.step(closure)


def _first_order(make: Callable[[nn.Module], Any]) -> Callable[[], Any]:
    """The third step, which neither makes state nor refreshes a basis."""
    model = _model()
    optimizer = make(model)
    backward = _forward(model)
    for _ in range(2):
        backward().backward()
        optimizer.step()
        optimizer.zero_grad()
    backward().backward()
    return optimizer.step  # type: ignore[no-any-return]


def _gradnormlorp(model: nn.Module) -> Any:
    zoopt.nn.convert_to_gradnorm(model, lambda name, module: True, rank=4, seed=0)
    return zoopt.GradNormLoRP(gradnormlorp.param_groups(model, rank=2), seed=0)


STEPS: dict[str, Callable[[], Callable[[], Any]]] = {
    "MeZO": _mezo,
    "GaLore": lambda: _first_order(
        lambda m: zoopt.GaLoreAdamW(m.named_parameters(), rank=2, seed=0)
    ),
    "SM3": lambda: _first_order(lambda m: zoopt.SM3(m.named_parameters(), seed=0)),
    "GradNormLoRP": lambda: _first_order(_gradnormlorp),
}


def walk(step: Callable[[], Any]) -> list[str]:
    """The files that a step leads through, in the order in which it enters them."""
    rooms = {room for several in SIDE_ROOMS.values() for room in several}
    files: dict[str, None] = {}
    for code in called(step):
        file = file_of(code)
        if not {file, f"{file}:{code.co_name}"} & rooms and "<" not in code.co_name:
            files.setdefault(file)
    return list(files)


def documented(method: str) -> set[str]:
    """The files of the table under the heading of the method's step."""
    section = re.search(rf"^## An? {method} step\b.*?(?=^## )", DOCUMENT.read_text(), re.M | re.S)
    assert section is not None
    return set(re.findall(r"^\| `([\w/]+\.py)` ", section[0], re.MULTILINE))


@pytest.mark.parametrize("method", STEPS)
def test_a_step_is_followed_through_few_files(method: str) -> None:
    files = walk(STEPS[method]())
    assert len(files) <= MOST[method], files
    assert files
    assert set(files) == documented(method)


def test_every_side_room_is_there() -> None:
    package = Path(zoopt.__file__).parent
    for room in (room for several in SIDE_ROOMS.values() for room in several):
        file, _, function = room.partition(":")
        assert f"def {function}" in (package / file).read_text()
