"""Ways to train a model: every optimizer of the package, and common alternatives."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

import zoopt.nn
from zoopt.first_order.projected.selection import param_groups
from zoopt.memory.wrapped import COFI, GGPO_NOISE, GREEN, HALF, Wrapping
from zoopt.nn.modules import is_conv1d, linear_layers
from zoopt.registry import Row, Variant, rows
from zoopt.selection import SparseDeltaAdamW
from zoopt.zeroth_order import MeZO

Kind = Literal["inference", "zeroth-order", "backprop"]
#: Layers of a model of which no two are treated alike.
EVERY = 1 << 20
Build = Callable[[nn.Module], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: its name in tables.
        kind: whether it runs forward passes only, and whether it updates.
        build: makes the optimizer of a prepared model.
        adapter: adapts the model first (LoRA), and returns what is trained; default, nothing.
        fused: each gradient is applied and freed as backward reaches it.
        layers: how many of the repeated layers it treats differently from the others.
        graph: whether the closure of a zeroth-order step returns the loss with its graph.
        wrapping: what wraps the optimizer.
    """

    name: str
    kind: Kind
    build: Build
    adapter: Callable[[nn.Module], nn.Module] | None = None
    fused: bool = False
    graph: bool = False
    layers: int = 0
    wrapping: Wrapping | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model that is trained."""
        return model if self.adapter is None else self.adapter(model)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _none(model: nn.Module) -> Any:
    raise TypeError("inference has no optimizer")


def lora(rank: int) -> Callable[[nn.Module], nn.Module]:
    """Adapters of that rank on every linear layer, the rest frozen (needs peft)."""

    def adapt(model: nn.Module) -> nn.Module:
        import peft

        transposed = any(map(is_conv1d, model.modules()))
        config = peft.LoraConfig(r=rank, target_modules="all-linear", fan_in_fan_out=transposed)
        with warnings.catch_warnings():
            # peft uses a name that transformers has deprecated.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted: nn.Module = peft.get_peft_model(model, config)
        return adapted

    return adapt


def methods(rank: int = 128, lora_rank: int = 8, *, all_variants: bool = False) -> list[Method]:
    """Every method, those without a backward pass first.

    Args:
        rank: of the low-rank projections.
        lora_rank: of LoRA's adapters.
        all_variants: also those that only benchmarks list, and `ForwardGrad`, which cannot be
            planned because torch's forward derivatives make real tensors among fake ones.
    """
    # MeZO, on which the others are based, comes first.
    ordered = sorted(rows("zeroth-order"), key=lambda row: row.name != "mezo")
    zeroth_order = [m for row in ordered for m in _of_row(row, rank, all_variants)]
    zeroth_order.append(
        Method("MeZO, QZO int4", "zeroth-order", _of_class(MeZO), adapter=_quantised)
    )
    zeroth_order.append(Method("QES int4", "zeroth-order", _qes, adapter=_quantised))
    backprop = [
        Method("SGD", "backprop", _of_class(torch.optim.SGD, lr=1e-3)),
        Method("AdamW", "backprop", _of_class(torch.optim.AdamW)),
        *(m for row in rows("compact") for m in _of_row(row, rank, all_variants)),
        *(m for row in rows("low-rank") for m in _of_row(row, rank, all_variants)),
        Method("LoRA + AdamW", "backprop", _of_class(torch.optim.AdamW), adapter=lora(lora_rank)),
        Method("LoRA-SB + AdamW", "backprop", _of_class(torch.optim.AdamW), adapter=_lora_sb(rank)),
        Method("SLTrain + AdamW", "backprop", _of_class(torch.optim.AdamW), adapter=_sltrain(rank)),
        Method("PEQA int4 + AdamW", "backprop", _of_class(torch.optim.AdamW), adapter=_quantised),
        Method(
            "SparseDeltaAdamW over int4",
            "backprop",
            _of_class(SparseDeltaAdamW),
            adapter=_quantised_and_sparse,
        ),
        Method(
            "HalfFineTuning + zoopt.AdamW",
            "backprop",
            _of_class(zoopt.AdamW),
            layers=EVERY,
            wrapping=HALF,
        ),
        Method("GreenTrainer + zoopt.AdamW", "backprop", _of_class(zoopt.AdamW), wrapping=GREEN),
        Method("CoFiTune + zoopt.AdamW", "backprop", _of_class(zoopt.AdamW), wrapping=COFI),
        Method(
            "LoRA-GGPO + zoopt.AdamW",
            "backprop",
            _of_class(zoopt.AdamW),
            adapter=lora(lora_rank),
            wrapping=GGPO_NOISE,
        ),
    ]
    return [Method("inference", "inference", _none), *zeroth_order, *backprop]


def _of_row(row: Row, rank: int, all_variants: bool) -> Iterator[Method]:
    """The methods of a registered optimizer: one for each planned variant."""
    kind: Kind = "zeroth-order" if row.family == "zeroth-order" else "backprop"
    recipe, adapter = row.recipe, None
    if recipe is not None and recipe.adapt is not None:
        adapter = functools.partial(_called, recipe.adapt, rank)
    for variant in row.variants:
        if not (variant.planned or all_variants):
            continue
        method = Method(
            ", ".join(filter(None, (_shown(row), recipe and recipe.label, variant.label))),
            kind,
            functools.partial(_built, row, variant, rank),
            adapter=adapter,
            graph=recipe is not None and recipe.graph,
            layers=recipe.layers if recipe is not None else 0,
        )
        yield method
        if variant.fused:
            name = f"{method.name}, fused backward"
            yield dataclasses.replace(method, name=name, fused=True)


def _shown(row: Row) -> str:
    """The class's name, with the package's if torch has a class of that name."""
    name = row.cls.__name__
    return f"zoopt.{name}" if hasattr(torch.optim, name) else name


def _called(adapt: Callable[[nn.Module, int], nn.Module], rank: int, model: nn.Module) -> nn.Module:
    return adapt(model, rank)


def _built(row: Row, variant: Variant, rank: int, model: nn.Module) -> torch.optim.Optimizer:
    if row.recipe is not None:
        return row.recipe.build(model, rank)
    cls: Callable[..., torch.optim.Optimizer] = row.cls
    projected = row.family == "low-rank" and "rank" in inspect.signature(cls).parameters
    params = param_groups(model, target="linear", rank=rank) if projected else _trained(model)
    return cls(params, **variant.options)


def _of_class(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> Build:
    return lambda model: cls(_trained(model), **options)


def _lora_sb(rank: int) -> Callable[[nn.Module], nn.Module]:
    """Layers of the sizes that LoRA-SB's have; their values would come from gradients."""

    def adapt(model: nn.Module) -> nn.Module:
        layers = linear_layers(model)
        model.requires_grad_(False)
        for name, layer in layers.items():
            stored: torch.Tensor = layer.weight  # type: ignore[assignment]
            weight = stored.t() if is_conv1d(layer) else stored
            (m, n), r = weight.shape, min(rank, *weight.shape)
            factors = (weight.new_zeros(m, r), weight.new_zeros(r, r), weight.new_zeros(r, n))
            made = zoopt.nn.LoRASBLinear(weight, layer.bias, *factors)  # type: ignore[arg-type]
            model.set_submodule(name, made)
        return model

    return adapt


def _quantised(model: nn.Module) -> nn.Module:
    zoopt.nn.convert_to_quantised(model, bits=4)
    zoopt.nn.train_scales(model)
    return model


def _quantised_and_sparse(model: nn.Module) -> nn.Module:
    zoopt.nn.convert_to_quantised(model, bits=4)
    zoopt.nn.convert_to_sparse_delta(model)
    return model


def _qes(model: nn.Module) -> Any:  # It has an optimizer's step without being a torch Optimizer.
    return zoopt.QES(model, lr=1e-3)


def _sltrain(rank: int) -> Callable[[nn.Module], nn.Module]:
    return lambda model: zoopt.nn.convert_to_sltrain(model, rank=rank)
