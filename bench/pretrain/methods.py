"""The methods that bench.pretrain compares: class, options, learning rates."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bench.comparison import lr_grid
from bench.pretrain.task import MODELS, Settings, matrices

REFERENCE = "adamw"
#: Pretraining's, as in the GaLore paper.
RECIPE: dict[str, Any] = {"weight_decay": 0.0}


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: what it is called on the command line and in the files.
        label: what it is called in tables and charts.
        optimizer: module and class, looked up when the method is run.
        lrs: the learning rates to choose from, ascending and evenly spaced in the logarithm.
        best_lr: the best learning rate for the 1m model.
        matrix_rate: the learning rate of the decoder's matrices, as a share of the others'.
        options: the class's options, beside lr and seed.
        groups: makes the param groups of a projected method from the model and a rank.
        rank: settings' rank -> the rank of the projection.
        refreshes: whether the projection is refreshed every `update_proj_gap` steps.
        convert: replaces the model's layers, given the model, the settings' rank and a seed.
        scale: alpha over the rank in the replaced layers; None for the default.
    """

    name: str
    label: str
    optimizer: str
    lrs: tuple[float, ...]
    best_lr: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: str | None = None
    rank: Callable[[int], int] = int
    refreshes: bool = False
    convert: str | None = None
    scale: float | None = None
    matrix_rate: float = 1.0

    def grid(self, settings: Settings) -> tuple[tuple[float, ...], int]:
        """The learning rates to choose from, and how many may be added beyond them."""
        if MODELS[settings.model].transferred:
            return lr_grid(self.best_lr, points=2), 0
        return self.lrs, settings.extensions

    def options_for(self, settings: Settings) -> dict[str, Any]:
        """All options of a run, beside lr and seed."""
        options = {**RECIPE, **self.options}
        if self.groups is not None:
            options["rank"] = self.rank(settings.rank)
        if self.refreshes:
            options["update_proj_gap"] = settings.update_proj_gap
        return options

    def build(
        self, model: nn.Module, lr: float, seed: int, settings: Settings
    ) -> tuple[nn.Module, Any]:
        """The model as the method trains it, and a new optimizer of it.

        Raises:
            LookupError: this version has no such class.
        """
        optimizer, options = find(self.optimizer), self.options_for(settings)
        if self.convert is not None:
            scale = {} if self.scale is None else {"alpha": self.scale * settings.rank}
            model = find(self.convert)(model, rank=settings.rank, seed=seed, **scale)
        if self.optimizer.startswith("zoopt."):
            options["seed"] = seed
        params: Any = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if self.groups is not None:
            params = find(self.groups)(model, rank=options.pop("rank"))
        if self.matrix_rate != 1.0:
            slow = matrices(model)
            fast = {name: param for name, param in params if name not in slow}
            params = [
                {"params": list(fast.items())},
                {"params": list(slow.items()), "lr": lr * self.matrix_rate},
            ]
        return model, optimizer(params, lr=lr, **options)


def find(path: str) -> Any:
    """A public class or function, such as "zoopt.AdamW"."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LookupError(f"there is no {path} in this version ({error})") from error


def _adam(name: str, label: str, optimizer: str, **options: Any) -> Method:
    # Wider and lower than the projected methods', whose directions are scaled down.
    return Method(name, label, optimizer, lr_grid(2e-3, points=5), 2e-3, options)


def _projected(
    name: str, optimizer: str, note: str = "", best_lr: float = 1e-2, **options: Any
) -> Method:
    """A projected method of the decoder's matrices; embeddings and norms get its rule itself."""
    label = optimizer + (note and f", {note}")
    return Method(
        *(name, label, f"zoopt.{optimizer}", lr_grid(1e-2), best_lr, options),
        groups="zoopt.lowrank.param_groups",
        rank=(lambda _: 1) if optimizer == "ApolloMini" else int,
        refreshes=optimizer != "LDAdamW",
    )


TABLE = (
    _adam("adamw", "torch.optim.AdamW", "torch.optim.AdamW"),
    # The effect of the projected methods' default scale of 1/4, without a projection.
    Method(
        *("adamw-quarter", "torch.optim.AdamW, matrices at lr / 4", "torch.optim.AdamW"),
        *(lr_grid(1e-2), 1e-2),
        matrix_rate=0.25,
    ),
    _adam("zoopt-adamw", "AdamW", "zoopt.AdamW"),
    _adam("zoopt-adamw-8bit", "AdamW, int8", "zoopt.AdamW", state_dtype="int8"),
    _projected("galore-svd", "GaLoreAdamW", "svd", projector="svd"),
    # An exact basis by another algorithm; only signs and rounding differ from the SVD.
    _projected("galore-gram", "GaLoreAdamW", "gram", projector="gram"),
    _projected("galore", "GaLoreAdamW", "warm"),
    _projected("galore-8bit", "GaLoreAdamW", "warm, int8", state_dtype="int8"),
    _projected("apollo", "Apollo"),
    _projected("apollo-mini", "ApolloMini", best_lr=5e-3),
    _projected("fira", "Fira"),
    _projected("ldadamw", "LDAdamW"),
    Method("sm3", "SM3", "zoopt.SM3", lr_grid(2e-2, points=5), 2e-2),
    # The paper's scale for its smallest model: alpha = 32 at rank 128.
    Method(
        *("sltrain", "SLTrain, AdamW", "zoopt.AdamW", lr_grid(5e-3, points=5), 2.5e-3),
        convert="zoopt.nn.convert",
        scale=0.25,
    ),
    # Factors of the settings' rank, projected to half of it.
    Method(
        *("gradnormlorp", "GradNormLoRP", "zoopt.GradNormLoRP", lr_grid(1e-2), 1e-2),
        # These are the names from the time of the stored runs, whose configuration includes them.
        convert="zoopt.lowrank.gradnormlorp.convert",
        groups="zoopt.lowrank.gradnormlorp.param_groups",
        rank=lambda rank: max(1, rank // 2),
        refreshes=True,
    ),
)

METHODS = {method.name: method for method in TABLE}


def state_bytes(optimizer: torch.optim.Optimizer, params: Any = None) -> int:
    """Bytes of the optimizer's state; if parameters are given, only of theirs."""
    chosen = None if params is None else set(params)
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for param, state in optimizer.state.items()
        if chosen is None or param in chosen
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel()
    }
    return sum(storages.values())
