"""The optimizers under contract: one row a class and variant. Contract tests run over all rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import zoopt
from tests.reference.adam_float64 import ZOAdam64
from tests.reference.blocks_float64 import Blocks64
from tests.reference.conmezo_float64 import ConMeZO64
from tests.reference.conservative_float64 import ZOConservativeSGD64
from tests.reference.evolution_float64 import EvolutionStrategy64
from tests.reference.forward_grad_float64 import ForwardGrad64
from tests.reference.fzoo_float64 import FZOO64
from tests.reference.hizoo_float64 import HiZOO64
from tests.reference.lozo_float64 import LOZO64
from tests.reference.mezo_float64 import MeZO64
from tests.reference.muon_float64 import ZOMuon64
from tests.reference.sign_float64 import ZOSignSGD64
from tests.reference.sparse_float64 import SparseMeZO64
from tests.reference.spsa_float64 import Iid64
from tests.reference.subzero_float64 import SubZero64
from zoopt import noise

#: shape, bytes of an element -> bytes of state of one parameter.
StateBytes = Callable[[tuple[int, ...], int], int]
Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of an optimizer.

    Attributes:
        cls, options: how it is built.
        oracle: its float64 transcription, with `step(loss, theta)`.
        state_bytes: what it keeps.
        perturbations: which it can be asked for; empty if there is no choice.
        falls: to what fraction 300 steps take the loss.
        oracle_options: as the oracle calls them, where names or values differ.
    """

    name: str
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    oracle: type[Any]
    state_bytes: StateBytes
    perturbations: tuple[str, ...] = ("inplace", "virtual")
    falls: float = 0.9
    oracle_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, model: nn.Module, **options: Any) -> Any:
        return self.build_from(model.named_parameters(), **options)

    def build_from(self, params: Any, **options: Any) -> Any:
        if not self.perturbations:
            options.pop("perturbation", None)
        return self.cls(params, **{**self.options, **options})  # type: ignore[call-arg]

    def build_oracle(self, shapes: dict[str, tuple[int, ...]], jvp: Callable[..., float]) -> Any:
        """The oracle under the row's options, on the row's noise."""
        options = {**self.options, **self.oracle_options}
        if "estimator" in options:
            options["one_sided"] = options["estimator"] == "one-sided"
        options |= {"jvp": jvp, "z": self._z(shapes), "normals": self._normals()}
        if options.get("mask") == "random":
            options["mask"] = self._random_mask(shapes)
        elif "mask" in options:
            del options["mask"]
        fields = {field.name for field in dataclasses.fields(self.oracle) if field.init}
        build = lambda: self.oracle(**{k: v for k, v in options.items() if k in fields})  # noqa: E731
        if "blocks" in self.options:
            return Blocks64(
                [lambda name: name.startswith("0."), lambda _: True], [build(), build()]
            )
        return build()

    def _key(self, name: str, draw: int) -> dict[str, int]:
        return {"seed": self.options["seed"], "stream": noise.stream(name), "draw": draw}

    def _normals(self) -> Callable[[str, int, int, int], Array]:
        def normals(name: str, draw: int, start: int, count: int) -> Array:
            return noise.normal(count, offset=start, **self._key(name, draw)).double().numpy()

        return normals

    def _z(self, shapes: dict[str, tuple[int, ...]]) -> Callable[[str, int], Array]:
        signs = self.options.get("distribution", self.oracle_options.get("distribution"))
        generate = noise.rademacher if signs == "rademacher" else noise.normal
        indices = self.options.get("mask")

        def z(name: str, draw: int) -> Array:
            numel = math.prod(shapes[name])
            if not isinstance(indices, dict):
                return (
                    generate(numel, **self._key(name, draw)).double().numpy().reshape(shapes[name])
                )
            scattered = torch.zeros(numel, dtype=torch.float64)
            if name in indices:
                few = generate(len(indices[name]), **self._key(name, draw))
                scattered[indices[name]] = few.double()
            return scattered.numpy().reshape(shapes[name])

        return z

    def _random_mask(self, shapes: dict[str, tuple[int, ...]]) -> Callable[[str, int], Array]:
        def mask(name: str, draw: int) -> Array:
            density = self.options["density"]
            kept = noise.mask(math.prod(shapes[name]), density=density, **self._key(name, draw))
            return kept.numpy().reshape(shapes[name])

        return mask

    def __str__(self) -> str:
        return self.name


def nothing(shape: tuple[int, ...], itemsize: int) -> int:
    return 0


def wide(itemsize: int) -> int:
    """Bytes of an accumulator."""
    return 8 if itemsize == 8 else 4


def per_element(count: int, extra: int = 0) -> StateBytes:
    return lambda shape, itemsize: count * wide(itemsize) * math.prod(shape) + extra


def factors(rank: int, *sides: str, vectors: int = 0) -> StateBytes:
    """r columns for each side ("m" or "n") of a matrix; `vectors` numbers an element of others."""

    def state_bytes(shape: tuple[int, ...], itemsize: int) -> int:
        if len(shape) < 2:
            return vectors * wide(itemsize) * math.prod(shape)
        size = {"m": shape[0], "n": math.prod(shape[1:])}
        return wide(itemsize) * sum(size[side] for side in sides) * min(rank, *size.values())

    return state_bytes


def row(
    name: str, cls: type[Any], oracle: type[Any], kept: StateBytes = nothing, **options: Any
) -> Row:
    fields = {field.name for field in dataclasses.fields(Row)} - {"name", "cls", "options"}
    extra = {key: options.pop(key) for key in list(options) if key in fields}
    base = {"lr": 1e-3, "zo_eps": 1e-3, "seed": 7}
    if not extra.get("perturbations", True):
        del base["zo_eps"]
    return Row(f"{cls.__name__} {name}".strip(), cls, {**base, **options}, oracle, kept, **extra)


def mezo(name: str, **options: Any) -> Row:
    stored = options.get("momentum") and options.get("momentum_window") is None
    return row(name, zoopt.MeZO, MeZO64, per_element(1) if stored else nothing, **options)


def evolution(name: str, **options: Any) -> Row:
    """With a loss, unless it maximises: what the contract's closures return is one."""
    base = {"lr": 5e-3, "sigma": 1e-2, "population_size": 6, "seed": 7, "maximize": False}
    return Row(
        f"EvolutionStrategy {name}",
        zoopt.EvolutionStrategy,
        {**base, **options},
        EvolutionStrategy64,
        nothing,
    )


INDICES = {"0.weight": torch.tensor([3, 0, 1]), "0.bias": torch.tensor([1])}

SHAPINGS = ("zscore", "rank", "pair-sign")
ROWS = [
    mezo("plain"),
    mezo("probes", num_probes=3),
    mezo("one-sided", estimator="one-sided", num_probes=2),
    mezo("rademacher", distribution="rademacher"),
    mezo("decay", weight_decay=0.1),
    mezo("momentum", momentum=0.9, lr=2e-4),
    mezo("momentum probes decay", momentum=0.9, lr=2e-4, num_probes=2, weight_decay=0.1),
    mezo("window", momentum=0.9, momentum_window=5, lr=2e-4),
    mezo("window one-sided", momentum=0.5, momentum_window=3, estimator="one-sided"),
    mezo("clipped", max_projected_grad=0.5, lr=1e-2),
    mezo("ascent", maximize=True),
    mezo("blocks", blocks=["0.*", "*"], weight_decay=0.1),
    mezo("blocks window", blocks=["0.*", "*"], momentum=0.9, momentum_window=3, lr=2e-4),
    row("random mask", zoopt.MeZO, Iid64, mask="random", density=0.25, num_probes=2, lr=3e-3),
    row(
        "magnitude mask",
        zoopt.MeZO,
        SparseMeZO64,
        lambda shape, itemsize: 4,
        mask="magnitude",
        density=0.5,
        weight_decay=0.1,
    ),
    mezo("indices", mask=INDICES, lr=1e-2, falls=1.0),
    row(
        "indices momentum",
        zoopt.MeZO,
        MeZO64,
        lambda shape, itemsize: wide(itemsize) * {(10, 6): 3}.get(shape, 0),
        mask={"0.weight": INDICES["0.weight"]},
        momentum=0.9,
        falls=1.0,
    ),
    row("dense", zoopt.ZOAdam, ZOAdam64, per_element(2, 8), num_probes=2, weight_decay=0.1),
    row(
        "dense random mask",
        zoopt.ZOAdam,
        ZOAdam64,
        per_element(2, 8),
        mask="random",
        density=0.5,
        # Where no direction has moved yet both moments are 0, and eps decides.
        eps=1e-3,
    ),
    row(
        "window",
        zoopt.ZOAdam,
        ZOAdam64,
        state="window",
        window=4,
        num_probes=2,
        weight_decay=0.1,
        betas=(0.7, 0.9),
    ),
    row("scalar", zoopt.ZOAdam, ZOAdam64, state="scalar", num_probes=2, lr=5e-3),
    row("elementwise", zoopt.ZOSignSGD, ZOSignSGD64, num_probes=2, weight_decay=0.1),
    row(
        "projected",
        zoopt.ZOSignSGD,
        ZOSignSGD64,
        form="projected",
        num_probes=2,
        lr=3e-3,
        oracle_options={"sign": "projected"},
    ),
    row("three", zoopt.ZOConservativeSGD, ZOConservativeSGD64, lr=1e-2, weight_decay=1e-3),
    row(
        "reused",
        zoopt.ZOConservativeSGD,
        ZOConservativeSGD64,
        candidates="reused",
        num_probes=2,
        lr=1e-2,
        zo_eps=1e-2,
    ),
    row("", zoopt.ForwardGrad, ForwardGrad64, perturbations=(), num_probes=2, weight_decay=0.1),
    row(
        "random mask",
        zoopt.FZOO,
        FZOO64,
        lr=3e-3,
        mask="random",
        density=0.5,
        oracle_options={"distribution": "rademacher"},
    ),
    row("", zoopt.FZOO, FZOO64, lr=3e-3, oracle_options={"distribution": "rademacher"}),
    row("", zoopt.LOZO, LOZO64, rank=2, basis_update_gap=7, num_probes=2, weight_decay=0.1),
    row(
        "momentum",
        zoopt.LOZO,
        LOZO64,
        factors(2, "m", vectors=1),
        rank=2,
        basis_update_gap=7,
        momentum=0.7,
        num_probes=2,
    ),
    row("", zoopt.SubZero, SubZero64, factors(3, "m", "n"), rank=3, basis_update_gap=7),
    row("", zoopt.ZOMuon, ZOMuon64, factors(3, "m"), rank=3, basis_update_gap=7, weight_decay=0.1),
    row("", zoopt.HiZOO, HiZOO64, per_element(1), hessian_smooth=1e-4, num_probes=2),
    row("", zoopt.ConMeZO, ConMeZO64, per_element(1), warmup_steps=20, weight_decay=0.1),
    *(evolution(f"{s} {r}", shaping=s, rank=r) for s in SHAPINGS for r in (None, 2)),
    evolution("single", antithetic=False, population_size=7, weight_decay=0.1),
    evolution("single rank", antithetic=False, population_size=7, rank=1, shaping="rank"),
    evolution("ascent", maximize=True, weight_decay=0.1),
    evolution("blocks", blocks=["0.*", "*"], rank=1),
]
PERTURBATIONS = ["inplace", "virtual"]
#: Each row with each perturbation.
CASES = [(row, mode) for row in ROWS for mode in row.perturbations or ("none",)]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 2))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return model.to(dtype)


def regression(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 6, generator=generator)
    return x.to(dtype), torch.stack((x.sum(1).tanh(), x[:, 0] * x[:, 1]), 1).to(dtype)


def closure_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    x, y = regression(dtype)
    return lambda: (model(x) - y).double().pow(2).mean()
