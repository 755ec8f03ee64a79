"""Runs that are cut in two: one of each family, as tests/data holds them of a release.

`python tests/checkpoint_cases.py FILE` writes the first half of each run, and what the second half
made of it, with the zoopt that is on the path. Closures and gradients here are elementwise, and
losses exactly rounded sums: they have the same bits on every machine.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import lzma
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zoopt

#: The steps before the checkpoint, and in all.
SAVED, END = 4, 9


@dataclasses.dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        build: makes the optimizer of the model.
        zeroth_order: whether `step` takes a closure.
        exact: whether a step is elementwise throughout, so that every machine has its bits; that of
            others holds matrix products, which libraries sum in an order of their own.
        dtype: of the weights.
        shapes: of the weights.
    """

    build: Callable[[nn.Module], Any]
    zeroth_order: bool = False
    exact: bool = True
    dtype: torch.dtype = torch.float32
    shapes: tuple[tuple[int, ...], ...] = ((12, 7), (5, 11), (9,))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(6, 6) for name in "qkvo"})
        self.mlp = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + sum(linear(x) for linear in self.attn.values()))


class Layers(nn.Module):
    """What is sampled layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def wave(shape: tuple[int, ...], phase: int) -> Tensor:
    """Numbers in (-1, 1) without a pattern that a subspace could miss: multiples of 1 / 1009."""
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    residues = (index * index * 31 + index * (17 + phase) + 7 * phase) % 1009
    return ((residues - 504).double() / 1009.0).view(shape)


def model_of(case: Case) -> nn.Module:
    """The model, with weights that are the same on every machine."""
    model: nn.Module = nn.ParameterDict(
        {f"p{i}": nn.Parameter(torch.empty(shape)) for i, shape in enumerate(case.shapes)}
    )
    if not case.shapes:
        model = Layers()
    model = model.to(case.dtype)
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(wave(tuple(param.shape), i))
    return model


def run(case: Case, model: nn.Module, optimizer: Any, start: int, end: int) -> None:
    """Take the steps start ... end - 1."""
    params = list(model.parameters())
    targets = [wave(tuple(param.shape), 50 + i) for i, param in enumerate(params)]

    def loss(step: int) -> Tensor:
        total, surrogate = [], torch.zeros(())
        for param, target in zip(params, targets, strict=True):
            # Operators, which a virtual perturbation sees; the sum is exactly rounded.
            away = param * 1.0 - target * (1.0 + step % 3)
            total += (away.detach().double() * away.detach().double()).flatten().tolist()
            if away.requires_grad:
                # Zero, with the gradient 2 away.
                surrogate = surrogate + ((away - away.detach()) * (2.0 * away.detach())).sum()
        return surrogate.double() + math.fsum(total) / len(total)

    for step in range(start, end):
        if case.zeroth_order:
            optimizer.step(lambda step=step: loss(step))
            continue
        for i, param in enumerate(params):
            if param.requires_grad:
                away = param.detach().double() - targets[i] * (1.0 + step % 3)
                param.grad = (away * wave(tuple(param.shape), 100 + step)).to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


def first(cls: Any, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: cls(model.named_parameters(), **{"lr": 1e-2, "seed": 7, **options})


def zeroth(cls: Any, **options: Any) -> Callable[[nn.Module], Any]:
    return first(cls, **{"lr": 1e-3, **options})


def _owlore(model: nn.Module) -> Any:
    options = {"rank": 2, "update_proj_gap": 3, "sampling_gap": 3, "num_layers": 1}
    batch = [wave((5, 6), 3).float()]
    return zoopt.OwLore(model, lr=1e-2, seed=7, calibration=batch, **options)  # type: ignore[arg-type]


def _half(model: nn.Module) -> Any:
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-2, seed=7)
    zoopt.HalfFineTuning(model, optimizer, round_steps=3, seed=7)
    return optimizer


def _hybrid(model: nn.Module) -> Any:
    *early, late = model.named_parameters()
    return zoopt.Hybrid(
        zoopt.MeZO(early, lr=1e-3, momentum=0.9, seed=7), zoopt.AdamW([late], lr=1e-2, seed=7)
    )


_BIG: Any = {"shapes": ((64, 64), (9,)), "dtype": torch.bfloat16}
_SUB: Any = {"rank": 3, "update_proj_gap": 3}
_MASK = {"p0": torch.tensor([3, 0, 50]), "p2": torch.tensor([1])}

CASES = {
    "mezo": Case(zeroth(zoopt.MeZO, num_probes=2, weight_decay=0.1), True),
    "mezo-bfloat16": Case(zeroth(zoopt.MeZO, lr=1e-2), True, dtype=torch.bfloat16),
    "mezo-momentum": Case(zeroth(zoopt.MeZO, momentum=0.9), True),
    "mezo-window": Case(zeroth(zoopt.MeZO, momentum=0.9, momentum_window=3), True),
    "mezo-blocks": Case(zeroth(zoopt.MeZO, blocks=["p0", "*"], block_order="random"), True),
    "mezo-mask": Case(zeroth(zoopt.MeZO, mask=_MASK, momentum=0.5), True),
    "mezo-magnitude": Case(zeroth(zoopt.MeZO, mask="magnitude", density=0.5), True),
    "mezo-unnamed": Case(
        lambda model: zoopt.MeZO(model.parameters(), lr=1e-3, momentum=0.9, seed=7), True
    ),
    "zoadam": Case(zeroth(zoopt.ZOAdam, num_probes=2), True),
    "zoadam-window": Case(zeroth(zoopt.ZOAdam, state="window", window=3), True),
    "zoadam-scalar": Case(zeroth(zoopt.ZOAdam, state="scalar"), True),
    "hizoo": Case(zeroth(zoopt.HiZOO, hessian_smooth=1e-3), True),
    "zosignsgd": Case(zeroth(zoopt.ZOSignSGD), True),
    "fzoo": Case(zeroth(zoopt.FZOO), True),
    # A sum of squares, in the library's order.
    "conmezo": Case(zeroth(zoopt.ConMeZO, warmup_steps=6), True, exact=False),
    "lozo-momentum": Case(
        zeroth(zoopt.LOZO, rank=2, momentum=0.7, basis_update_gap=3), True, exact=False
    ),
    "subzero": Case(zeroth(zoopt.SubZero, rank=3, basis_update_gap=3), True, exact=False),
    "zomuon": Case(zeroth(zoopt.ZOMuon, rank=3, basis_update_gap=3), True, exact=False),
    "evolution": Case(zeroth(zoopt.EvolutionStrategy, population_size=4, maximize=False), True),
    "evolution-rank": Case(
        zeroth(zoopt.EvolutionStrategy, population_size=4, maximize=False, rank=1),
        True,
        exact=False,
    ),
    "hybrid": Case(_hybrid, True),
    "adamw": Case(first(zoopt.AdamW)),
    "adamw-unnamed": Case(lambda model: zoopt.AdamW(model.parameters(), lr=1e-2, seed=7)),
    "adamw-bfloat16": Case(first(zoopt.AdamW, state_dtype="bfloat16"), dtype=torch.bfloat16),
    "adamw-int8": Case(first(zoopt.AdamW, state_dtype="int8"), **_BIG),
    "adamw-int4": Case(first(zoopt.AdamW, state_dtype="int4"), **_BIG),
    "sm3": Case(first(zoopt.SM3, momentum=0.9), dtype=torch.bfloat16),
    "galore": Case(first(zoopt.GaLoreAdamW, **_SUB), exact=False),
    "galore-full": Case(first(zoopt.GaLoreAdamW, proj_type="full", **_SUB), exact=False),
    "qgalore": Case(
        first(zoopt.QGaLoreAdamW, cos_threshold=0.1, queue_size=1, **_SUB), exact=False
    ),
    "galore-adafactor": Case(first(zoopt.GaLoreAdafactor, beta1=0.9, **_SUB), exact=False),
    "apollo": Case(first(zoopt.Apollo, **_SUB), exact=False),
    "apollo-mini": Case(first(zoopt.ApolloMini, update_proj_gap=3), exact=False),
    "fira": Case(first(zoopt.Fira, **_SUB), exact=False),
    "ldadam": Case(first(zoopt.LDAdamW, rank=3), exact=False),
    "frugal": Case(first(zoopt.Frugal, update_proj_gap=3)),
    "frugal-lion": Case(first(zoopt.Frugal, rule="lion", update_proj_gap=3)),
    "gradnormlorp": Case(first(zoopt.GradNormLoRP, **_SUB), exact=False),
    "owlore": Case(_owlore, shapes=(), exact=False),
    "half-fine-tuning": Case(_half, shapes=()),
}


def digest(model: nn.Module) -> str:
    """A hash of the weights' bits."""
    found = hashlib.blake2b(digest_size=16)
    for param in model.parameters():
        found.update(param.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def record(case: Case) -> dict[str, Any]:
    """The checkpoint, and where the run ended: by its hash where all machines have the bits."""
    model = model_of(case)
    optimizer = case.build(model)
    run(case, model, optimizer, 0, SAVED)
    weights = [param.detach().clone() for param in model.parameters()]
    saved = {"weights": weights, "optimizer": copy.deepcopy(optimizer.state_dict())}
    run(case, model, optimizer, SAVED, END)
    end: Any = [param.detach() for param in model.parameters()]
    return {**saved, "end": digest(model) if case.exact else end}


if __name__ == "__main__":
    with lzma.open(sys.argv[1], "wb") as file:
        torch.save({name: record(case) for name, case in CASES.items()}, file)
