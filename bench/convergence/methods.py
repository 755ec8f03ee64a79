"""The methods that bench.convergence compares: class, options, cost, learning rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import zoopt
from bench.comparison import lr_grid

Options = Mapping[str, Any]
#: What a step costs in forward passes, from the method's options.
Cost = Callable[[Options], int]

#: The recipe of examples/finetune_sentiment.py: projected gradients are clipped. The perturbation
#: scale is the recipe's for every method, FZOO and the evolution strategy included: bfloat16's
#: spacing of the weights swallows perturbations of FZOO's own 1e-4.
RECIPE: dict[str, Any] = {"zo_eps": 1e-3, "max_projected_grad": 10.0}

#: A block a trained layer; the last takes the fifth layer and the final norm.
LAYER_BLOCKS = (*(f"model.layers.{i}.*" for i in range(4)), "*")


def two_sided(options: Options) -> int:
    return 2 * int(options.get("num_probes", 1))


def one_sided(options: Options) -> int:
    return 1 + int(options.get("num_probes", 1))


def three_point(options: Options) -> int:
    return 1 + 2 * int(options.get("num_probes", 1))


def candidates(options: Options) -> int:
    """Two probes and three candidates, or one probe at theta + zo_eps z, theta, and theta - u."""
    return 3 if options.get("candidates") == "reused" else 5


def dual(options: Options) -> int:
    """Three a dual pass: every product has two more, W x' and W' x, for the tangents."""
    return 3 * int(options.get("num_probes", 1))


def members(options: Options) -> int:
    return int(options["population_size"])


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: what it is called on the command line and in the files.
        label: what it is called in tables and charts.
        optimizer: the class in zoopt.
        cost: forward passes a step costs, from the options.
        lrs: the learning rates to choose from, ascending and evenly spaced in their logarithm.
        options: the class's options, beside lr and seed.
        by_steps: options that are a share of the run's steps, at least 1.
        passes_per_call: forward passes that one call of the closure counts for.
        maximizes: the closure returns a fitness, the negative loss, not a loss.
    """

    name: str
    label: str
    optimizer: str
    cost: Cost
    lrs: tuple[float, ...]
    options: Options = dataclasses.field(default_factory=dict)
    by_steps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    passes_per_call: int = 1
    maximizes: bool = False

    @property
    def available(self) -> bool:
        return hasattr(zoopt, self.optimizer)

    @property
    def forwards_per_step(self) -> int:
        return self.cost(self.options)

    def steps(self, forwards: int) -> int:
        """The steps that a budget of forward passes pays for."""
        return max(1, forwards // self.forwards_per_step)

    def options_for(self, steps: int) -> dict[str, Any]:
        """The options of a run of so many steps."""
        scaled = {name: max(1, round(share * steps)) for name, share in self.by_steps.items()}
        return {**self.options, **scaled}

    def build(self, params: Any, lr: float, seed: int, steps: int) -> Any:
        """A new optimizer for a run of so many steps."""
        return getattr(zoopt, self.optimizer)(params, lr=lr, seed=seed, **self.options_for(steps))


def _method(name: str, label: str, centre: float, cost: Cost = two_sided, **options: Any) -> Method:
    """A method of the class that the label begins with, with the recipe's options."""
    optimizer = label.partition(",")[0]
    return Method(name, label, optimizer, cost, lr_grid(centre), {**RECIPE, **options})


TABLE = (
    _method("mezo", "MeZO", 2e-3),
    _method("mezo-momentum", "MeZO, momentum window 4", 5e-4, momentum=0.9, momentum_window=4),
    _method("mezo-random", "MeZO, random tenth", 5e-3, mask="random", density=0.1),
    _method("mezo-magnitude", "MeZO, smallest tenth", 5e-3, mask="magnitude", density=0.1),
    _method("mezo-blocks", "MeZO, layers in turn", 5e-3, blocks=LAYER_BLOCKS),
    _method("mezo-n4", "MeZO, 4 probes", 4e-3, num_probes=4),
    _method("adam-dense", "ZOAdam, stored moments", 5e-3),
    _method("adam-window", "ZOAdam, window 4", 5e-3, state="window", window=4),
    _method("adam-scalar", "ZOAdam, scalar", 5e-3, state="scalar"),
    _method("sign", "ZOSignSGD, elementwise", 5e-3),
    _method("sign-projected", "ZOSignSGD, projected", 5e-3, form="projected"),
    _method("conservative", "ZOConservativeSGD, three", 2e-3, candidates),
    _method(
        *("conservative-reused", "ZOConservativeSGD, reused", 2e-3, candidates),
        candidates="reused",
    ),
    Method(
        *("forward-grad", "ForwardGrad", "ForwardGrad", dual, lr_grid(2e-3)),
        {"max_projected_grad": RECIPE["max_projected_grad"]},
        passes_per_call=3,
    ),
    Method(
        *("fzoo", "FZOO", "FZOO", one_sided, lr_grid(1e-2)),
        {"zo_eps": RECIPE["zo_eps"], "num_probes": 8},
    ),
    _method("lozo", "LOZO", 2e-3),
    Method(
        *("lozo-m", "LOZO-M", "LOZO", two_sided, lr_grid(2e-3)),
        {**RECIPE, "momentum": 0.7},
    ),
    Method(
        *("subzero", "SubZero", "SubZero", two_sided, lr_grid(2e-3), RECIPE),
        by_steps={"basis_update_gap": 0.25},
    ),
    Method(
        *("muon", "ZOMuon", "ZOMuon", one_sided, lr_grid(1e-1)),
        {**RECIPE, "num_probes": 4},
        by_steps={"basis_update_gap": 0.25},
    ),
    _method("hizoo", "HiZOO", 2e-3, three_point, hessian_smooth=1e-6),
    Method(
        *("conmezo", "ConMeZO", "ConMeZO", two_sided, lr_grid(2e-3), RECIPE),
        by_steps={"warmup_steps": 0.1},
    ),
    Method(
        *("evolution", "EvolutionStrategy, rank 1", "EvolutionStrategy", members, lr_grid(1e-2)),
        {"sigma": RECIPE["zo_eps"], "population_size": 8, "rank": 1, "antithetic": True},
        maximizes=True,
    ),
)

METHODS = {method.name: method for method in TABLE}
