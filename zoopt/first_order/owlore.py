"""OwLore: GaLore on a few layers at a time, drawn by their share of outlying weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoopt.checks import (
    check_bool,
    check_nonnegative_int,
    check_number,
    check_positive_int,
    shown,
)
from zoopt.distributed.checkpoint import called_by_load
from zoopt.distributed.sharding import is_sharded
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.first_order.adamw import AdamFamily, StateRounding
from zoopt.first_order.galore import INSIDE, GaLoreAdamW
from zoopt.first_order.projected.geometry import ProjType
from zoopt.first_order.projected.residuals import Residual
from zoopt.first_order.projected.selection import param_groups
from zoopt.first_order.projected.subspace import Projector
from zoopt.first_order.site import draw_of
from zoopt.kernels.adam.moments import Format
from zoopt.kernels.noise.philox import words
from zoopt.nn.modules import Target, is_conv1d, linear_layers, repeated_layers
from zoopt.noise import stream
from zoopt.optimizer import Group, hyperparameters
from zoopt.registry import Recipe, register

_SAMPLING_STREAM = stream("zoopt layer sampling")


def outlier_fraction(weights: Sequence[tuple[Tensor, Tensor]], threshold: float = 13.0) -> float:
    """D: the share of the A_ij = ||X_j|| |W_ij| that exceed `threshold` times their mean.

    Args:
        weights: of each linear map of a layer, W (out, in) and the norms ||X_j|| (in,).
    """
    total = sum(float((w.abs().to(x.dtype) @ x).sum()) for w, x in weights)
    count = sum(w.numel() for w, _ in weights)
    limit = threshold * total / count
    return sum(int((w.abs() * x > limit).sum()) for w, x in weights) / count


@torch.no_grad()
def outlier_scores(
    model: nn.Module, calibration: Iterable[Any], threshold: float = 13.0
) -> list[float]:
    """D_l of each of the model's repeated layers, in their order, over its linear layers.

    ||X_j|| is the norm of input j over all tokens of the calibration batches.

    Args:
        calibration: batches: mappings (`model(**batch)`), tuples or lists (`model(*batch)`), or
            anything else (`model(batch)`).
        threshold: M; default 13 (paper).

    Raises:
        ValueError: no batch, no repeated layers, or none with a linear layer that a batch reaches.
    """
    check_number("threshold", threshold, low=0.0)
    layers = repeated_layers(model)
    linears = linear_layers(model, lambda name, module: True)
    squares: dict[nn.Module, Tensor] = {}

    def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        wide = accumulator_dtype(x.dtype)
        found = x.reshape(-1, x.shape[-1]).to(wide).square().sum(0)
        squares[module] = found + squares[module] if module in squares else found

    hooks = [module.register_forward_pre_hook(observe) for module in linears.values()]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in calibration:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not squares:
        raise ValueError(
            "calibration must hold at least one batch that reaches a linear layer, got none"
        )
    scores = []
    for layer in layers.values():
        inside = [module for module in layer.modules() if module in squares]
        weights = [(_weight(module), squares[module].sqrt()) for module in inside]
        scores.append(outlier_fraction(weights, threshold) if weights else 0.0)
    return scores


def sample_layers(scores: Sequence[float], count: int, *, seed: int, draw: int) -> list[int]:
    """`count` of the layers, drawn without replacement with p_l = D_l / sum D, in ascending order.

    The `count` smallest E_l / D_l, with E_l = -log u_l exponential, which is the same as drawing
    one after the other in proportion to D. Layers with D = 0 come last, in random order.
    """
    number = torch.arange(len(scores))
    word = words(number, seed=seed, stream=_SAMPLING_STREAM, draw=draw)[:, 0].tolist()
    waits = [-math.log((w + 0.5) / 2**32) for w in word]
    order = sorted(
        range(len(scores)), key=lambda i: (scores[i] == 0, waits[i] / (scores[i] or 1.0))
    )
    return sorted(order[:count])


def _five_layers(model: nn.Module, rank: int) -> nn.Module:
    """The parameters that train between two draws: five layers, and everything outside the
    layers."""
    for layer in list(repeated_layers(model).values())[5:]:
        layer.requires_grad_(False)
    return model


def _between_draws(model: nn.Module, rank: int) -> GaLoreAdamW:
    """The optimizer without its sampling, which would run the model on calibration batches."""
    return GaLoreAdamW(param_groups(model, rank=rank))


@register(
    "owlore", "low-rank", recipe=Recipe(_between_draws, _five_layers, "five layers", layers=5)
)
class OwLore(AdamFamily):
    r"""OwLore (Li et al., 2024, arXiv:2405.18380): GaLore on a few sampled layers at a time.

    With A_ij = ||X_j|| |W_ij| over a layer's linear maps, X their inputs on calibration batches:

        D_l = mean(A > M mean(A)),    p_l = D_l / sum D

    Every `sampling_gap` steps `num_layers` of the model's repeated layers are drawn with p_l,
    without replacement. Only these train: their linear weights as in `GaLoreAdamW`, their other
    parameters as in AdamW. Parameters outside the layers (embeddings, head, last norm) always
    train, as in AdamW. The other layers have requires_grad=False, so they get no gradients and no
    state: a layer's state is freed when it is dropped, and starts from zero when it returns.
    `step` does the sampling.

    State, in bytes: as for `GaLoreAdamW` and AdamW, for sampled layers and parameters outside
    layers.

    Args:
        model: with its repeated layers in an nn.ModuleList. Frozen parameters stay frozen.
        lr: learning rate; default 1e-3.
        calibration: batches from which D is computed, as for `outlier_scores`.
        target: which linear layers are projected; as for `zoopt.lowrank.param_groups`.
        outlier_threshold: M; default 13 (paper).
        sampling_gap: steps from one sampling to the next; default 50.
        num_layers: how many are drawn; default 5 (paper). A model with fewer trains them all.
        rank, update_proj_gap, scale: GaLore's; default 256, 100 and 1.0 (the authors' code).
        betas, eps, weight_decay, proj_type, projector, stagger, state_dtype, state_rounding,
            rounding, maximize, seed: as for `GaLoreAdamW`. The seed draws the layers too.

    Raises:
        TypeError, ValueError: a hyperparameter out of range, no calibration, no layers to sample.
        RuntimeError: in `step`, a gradient is sparse.

    Seed, scores and the number of steps determine which layers train. They are in the state dict,
    so a resumed run samples the same layers. A step at lr 0 is not counted.
    DistributedDataParallel needs find_unused_parameters=True.

    Differs from the authors' code, which draws from numpy's generator, reads scores that were
    computed elsewhere, and keeps the state of dropped layers.

    Example:
        >>> opt = zoopt.OwLore(model, lr=1e-5, calibration=[next(iter(loader))])
        >>> trainer = Trainer(model, args, train_dataset=data, optimizers=(opt, None))
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        calibration: Iterable[Any],
        target: Target = "linear",
        outlier_threshold: float = 13.0,
        sampling_gap: int = 50,
        num_layers: int = 5,
        rank: int = 256,
        update_proj_gap: int = 100,
        scale: float = 1.0,
        proj_type: ProjType = "std",
        projector: Projector = "warm",
        stagger: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        defaults = hyperparameters(locals())
        for name in ("model", "calibration", "target", "outlier_threshold"):
            del defaults[name]
        check_positive_int("sampling_gap", sampling_gap)
        check_positive_int("num_layers", num_layers)
        for name, param in model.named_parameters():
            if is_sharded(param):
                raise ValueError(
                    f"OwLore must have whole parameters, got {name!r}, which is sharded; use "
                    f"GaLoreAdamW, or another class that projects shards"
                )
        groups = param_groups(model, target, rank=rank)
        numbers = _layer_numbers(model)
        for group in groups:
            group["layers"] = [numbers.get(param) for _, param in group["params"]]
        # A group that is added later is outside the layers.
        defaults |= {"layers": None, "updates": 0}
        defaults["outlier_scores"] = outlier_scores(model, calibration, outlier_threshold)
        super().__init__(groups, defaults, seed=seed)
        self._train_sampled()

    #: Whether all layers require gradients, because a checkpoint is being loaded.
    _loading = False

    @property
    def sampled_layers(self) -> list[int]:
        """The numbers of the layers that train in the next step."""
        run = self.param_groups[0]
        return sample_layers(
            run["outlier_scores"],
            run["num_layers"],
            seed=run["seed"],
            draw=draw_of(run["updates"] // run["sampling_gap"]),
        )

    def _make_state(self) -> None:
        """State for torch.distributed.checkpoint: all layers train until it has loaded theirs."""
        if called_by_load():
            self._loading = True
            for group in self.param_groups:
                for param, number in zip(group["params"], group["layers"] or (), strict=False):
                    if number is not None:
                        param.requires_grad_(True).grad = torch.zeros_like(param)
        super()._make_state()

    def _may_train(self, param: Tensor, group: Group) -> bool:
        layers = dict(zip(group["params"], group["layers"] or (), strict=False))
        return param.requires_grad or layers.get(param) is not None

    def _step(self) -> None:
        if self._loading:  # it has failed
            self._train_sampled()
        super()._step()

    def _stepped(self) -> None:
        """Count the step and, if it is due, sample other layers."""
        if any(float(group["lr"]) for group in self.param_groups):
            updates = self.param_groups[0]["updates"] + 1
            for group in self.param_groups:
                group["updates"] = updates
            if updates % self.param_groups[0]["sampling_gap"] == 0:
                self._train_sampled()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every zoopt optimizer; the layers that were sampled in the saved run train."""
        super().load_state_dict(state_dict)
        self._train_sampled()

    def _train_sampled(self) -> None:
        """Let only the sampled layers require gradients; free gradients and state of the others."""
        self._loading = False
        sampled = set(self.sampled_layers)
        for group in self.param_groups:
            numbers = group["layers"] or itertools.repeat(None)
            for param, number in zip(group["params"], numbers, strict=False):
                trains = number is None or number in sampled
                param.requires_grad_(trains)
                if not trains:
                    param.grad = None
                    self.state.pop(param, None)

    def _residual(self, group: Group) -> Residual:
        return INSIDE

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_bool("stagger", group["stagger"])
        check_positive_int("sampling_gap", group["sampling_gap"])
        check_positive_int("num_layers", group["num_layers"])
        check_nonnegative_int("updates", group["updates"])
        scores, layers = group["outlier_scores"], group["layers"]
        if not isinstance(scores, list | tuple) or not scores:
            raise TypeError(f"outlier_scores must be a list of numbers, got {shown(scores)}")
        for i, score in enumerate(scores):
            check_number(f"outlier_scores[{i}]", score, low=0.0)
        if layers is None:
            return
        numbers = (None, *range(len(scores)))
        if not isinstance(layers, list) or [type(n) for n in layers if n not in numbers]:
            raise TypeError(
                f"layers must be a list of layers' numbers or None, got {shown(layers)}"
            )
        if len(layers) != len(group["params"]):
            raise ValueError(
                f"layers must have an entry for each of the group's {len(group['params'])} "
                f"parameters, got {len(layers)}"
            )


def _layer_numbers(model: nn.Module) -> dict[Tensor, int]:
    """The number of each parameter's repeated layer; none for shared ones and those outside."""
    numbers: dict[Tensor, int] = {}
    outside = _outside(model)
    for number, layer in enumerate(repeated_layers(model).values()):
        for param in layer.parameters():
            if param in numbers:
                outside.add(param)
            numbers[param] = number
    return {param: number for param, number in numbers.items() if param not in outside}


def _outside(model: nn.Module) -> set[Tensor]:
    """The parameters that have a name outside the repeated layers."""
    prefixes = tuple(f"{name}." for name in repeated_layers(model))
    named = model.named_parameters(remove_duplicate=False)
    return {param for name, param in named if not name.startswith(prefixes)}


def _weight(module: nn.Module) -> Tensor:
    """A linear layer's weight, (out, in)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_conv1d(module) else weight
