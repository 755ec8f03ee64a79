"""Each method's file has the paper's algorithm as short functions, which are what a step runs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from tests.walks import called
from zoopt import registry
from zoopt.first_order import (
    adafactor,
    frugal,
    galore,
    gradnormlorp,
    ldadam,
    owlore,
    qgalore,
)
from zoopt.first_order.projected.moving_basis import lost_factors, next_basis, rotated
from zoopt.kernels.adam import reference as adam_reference
from zoopt.kernels.entries import reference as entries_reference
from zoopt.kernels.sm3 import reference as sm3_reference
from zoopt.zeroth_order import (
    hizoo,
    lozo,
    muon,
)
from zoopt.zeroth_order.engine.backward import LateGradients

#: The functions that read as the paper, where these are not the public functions of the method's
#: own file. If an operation of the kernels is the whole update, it is the reference that defines
#: the operation.
ELSEWHERE: dict[str, Sequence[Callable[..., Any]]] = {
    "hizoo": (hizoo.smoothed,),
    "hybrid": (LateGradients.loss, LateGradients.close),
    "lozo": (lozo.averaged, lozo.carried_over),
    "zo-muon": (muon.msign,),
    "frugal": (frugal.frugal,),
    "galore-adafactor": (adafactor.factored_, adafactor.unfactored_),
    "gradnormlorp": (galore.galore,),
    "ldadamw": (ldadam.ldadam, next_basis, rotated, lost_factors),
    "owlore": (owlore.outlier_fraction, owlore.sample_layers, galore.galore),
    "qgalore-adamw": (galore.galore, qgalore.agreement, qgalore.settle),
    "adamw": (adam_reference.adamw, adam_reference._quotient),
    "sm3": (sm3_reference.sm3,),
    "sparse-delta-adamw": (entries_reference.adam_entries, entries_reference.adam_direction),
}


def algorithm(name: str) -> Sequence[Callable[..., Any]]:
    """The functions that read as a method's paper."""
    module: Any = inspect.getmodule(registry.find(name).cls)
    own = [value for key, value in vars(module).items() if not key.startswith("_")]
    return ELSEWHERE.get(name) or [
        value for value in own if inspect.isfunction(value) and value.__module__ == module.__name__
    ]


#: Options under which all of a method's functions run; several, if each runs some.
OPTIONS: dict[str, Sequence[dict[str, Any]]] = {
    "lozo": ({"momentum": 0.5, "basis_update_gap": 1},),
    "zo-adam": ({"state": "dense"}, {"state": "scalar"}),
    "zo-sign-sgd": ({"form": "elementwise"}, {"form": "projected"}),
    "frugal": ({"projector": "svd"},),
    "owlore": ({"sampling_gap": 1},),
    "qgalore-adamw": ({"update_proj_gap": 1},),
}


def _model() -> nn.Sequential:
    layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    return nn.Sequential(nn.Linear(4, 6), _Layers(layers), nn.Linear(6, 3)).double()


class _Layers(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return inputs


def _made(name: str, model: nn.Module, options: dict[str, Any]) -> Any:
    named = list(model.named_parameters())
    if name == "hybrid":
        early = zoopt.MeZO([(n, p) for n, p in named if not n.startswith("2.")], seed=0)
        late = torch.optim.SGD([p for n, p in named if n.startswith("2.")], lr=1e-3)
        return zoopt.Hybrid(early, late)
    if name == "owlore":
        calibration = [(torch.ones(2, 4, dtype=torch.float64),)]
        return zoopt.OwLore(model, calibration=calibration, rank=2, seed=0, **options)
    if name == "gradnormlorp":
        zoopt.nn.convert_to_gradnorm(model, rank=4, seed=0)
        return zoopt.GradNormLoRP(gradnormlorp.param_groups(model, rank=2), seed=0, **options)
    cls = registry.find(name).cls
    if "rank" in inspect.signature(cls).parameters:
        options = {"rank": 2, **options} if name != "apollo-mini" else options
    return registry.optimizer(name, named, seed=0, **options)


def _steps(name: str, options: dict[str, Any]) -> Callable[[], Any]:
    """A new optimizer, and its first three steps."""
    model, data = _model(), torch.ones(2, 4, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return model(data).square().mean()

    def run() -> None:
        optimizer = _made(name, model, options)
        for _ in range(3):
            if registry.find(name).family == "zeroth-order":
                optimizer.step(loss)
            else:
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()

    return run


@pytest.mark.parametrize("name", registry.optimizers())
def test_a_step_runs_the_functions_that_read_as_the_paper(name: str) -> None:
    ran = {code for options in OPTIONS.get(name, ({},)) for code in called(_steps(name, options))}
    assert algorithm(name)
    for function in algorithm(name):
        assert inspect.unwrap(function).__code__ in ran, function


@pytest.mark.parametrize("name", registry.optimizers())
def test_the_functions_are_short(name: str) -> None:
    for function in algorithm(name):
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        [tree] = ast.parse(source).body
        assert isinstance(tree, ast.FunctionDef)
        body = tree.body[1:] if ast.get_docstring(tree) else tree.body
        assert sum(1 + (node.end_lineno or 0) - node.lineno for node in body) <= 30, function
        assert ast.get_docstring(tree), function
