"""How a model is trained: every optimizer of the package, and what people would use instead."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

import zoopt
from zoopt.first_order import gradnormlorp
from zoopt.first_order.projected.selection import param_groups
from zoopt.nn.modules import is_conv1d, repeated_layers

Kind = Literal["inference", "zeroth-order", "backprop"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: what the tables call it.
        kind: whether it runs forward passes only, and whether it updates.
        build: makes the optimizer of a prepared model.
        adapter: adapts the model first (LoRA), and returns what is trained; default, nothing.
        fused: each gradient is applied and freed as backward reaches it.
        graph: the closure of a zeroth-order step returns the loss with what derivatives it carries.
    """

    name: str
    kind: Kind
    build: Callable[[nn.Module], torch.optim.Optimizer]
    adapter: Callable[[nn.Module], nn.Module] | None = None
    fused: bool = False
    graph: bool = False

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model that is trained."""
        return model if self.adapter is None else self.adapter(model)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _none(model: nn.Module) -> Any:
    raise TypeError("inference has no optimizer")


def _plain(cls: Any, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: cls(_trained(model), **options)


def _projected(cls: Any, rank: int, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: cls(param_groups(model, target="linear", rank=rank), **options)


def lora(rank: int) -> Callable[[nn.Module], nn.Module]:
    """Adapters of that rank on every linear layer, the rest frozen (needs peft)."""

    def adapt(model: nn.Module) -> nn.Module:
        import peft

        transposed = any(map(is_conv1d, model.modules()))
        config = peft.LoraConfig(r=rank, target_modules="all-linear", fan_in_fan_out=transposed)
        with warnings.catch_warnings():
            # peft asks transformers by a name that transformers deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted: nn.Module = peft.get_peft_model(model, config)
        return adapted

    return adapt


def methods(rank: int = 128, lora_rank: int = 8) -> list[Method]:
    """Every method, the alternatives first.

    `ForwardGrad` is missing: torch's forward derivatives make real tensors among fake ones.

    Args:
        rank: of the low-rank projections.
        lora_rank: of LoRA's adapters.
    """
    zeroth_order = {
        "MeZO": _plain(zoopt.MeZO),
        "MeZO, in place": _plain(zoopt.MeZO, perturbation="inplace"),
        "MeZO, momentum window": _plain(zoopt.MeZO, momentum=0.9, momentum_window=10),
        "ZOAdam": _plain(zoopt.ZOAdam),
        "ZOAdam, window": _plain(zoopt.ZOAdam, state="window"),
        "ZOAdam, scalar": _plain(zoopt.ZOAdam, state="scalar"),
        "ZOSignSGD": _plain(zoopt.ZOSignSGD),
        "ZOConservativeSGD": _plain(zoopt.ZOConservativeSGD),
        "FZOO": _plain(zoopt.FZOO),
        "LOZO": _plain(zoopt.LOZO),
        "SubZero": _plain(zoopt.SubZero),
        "ZOMuon": _plain(zoopt.ZOMuon),
        "HiZOO": _plain(zoopt.HiZOO),
        "ConMeZO": _plain(zoopt.ConMeZO),
        "EvolutionStrategy": _plain(zoopt.EvolutionStrategy),
    }
    first_order = {
        "SGD": _plain(torch.optim.SGD, lr=1e-3),
        "AdamW": _plain(torch.optim.AdamW),
        "zoopt.AdamW": _plain(zoopt.AdamW),
        "zoopt.AdamW, bfloat16 state": _plain(zoopt.AdamW, state_dtype="bfloat16"),
        "zoopt.AdamW, int8 state": _plain(zoopt.AdamW, state_dtype="int8"),
        "zoopt.AdamW, int4 state": _plain(zoopt.AdamW, state_dtype="int4"),
        "SM3": _plain(zoopt.SM3),
        "Frugal": _plain(zoopt.Frugal),
        "GaLoreAdamW": _projected(zoopt.GaLoreAdamW, rank),
        "GaLoreAdamW, int8 state": _projected(zoopt.GaLoreAdamW, rank, state_dtype="int8"),
        "GaLoreAdafactor": _projected(zoopt.GaLoreAdafactor, rank),
        "QGaLoreAdamW": _projected(zoopt.QGaLoreAdamW, rank),
        "Apollo": _projected(zoopt.Apollo, rank),
        "ApolloMini": _projected(zoopt.ApolloMini, 1),
        "Fira": _projected(zoopt.Fira, rank),
        "LDAdamW": _projected(zoopt.LDAdamW, rank),
    }
    fused = ("SM3", "zoopt.AdamW, int8 state", "GaLoreAdamW, int8 state", "ApolloMini")
    return [
        Method("inference", "inference", _none),
        *(Method(name, "zeroth-order", build) for name, build in zeroth_order.items()),
        Method("Hybrid, last two layers", "zeroth-order", _hybrid, graph=True),
        *(Method(name, "backprop", build) for name, build in first_order.items()),
        *(
            Method(f"{name}, fused backward", "backprop", first_order[name], fused=True)
            for name in fused
        ),
        Method("LoRA + AdamW", "backprop", _plain(torch.optim.AdamW), adapter=lora(lora_rank)),
        Method(
            "OwLore, five layers",
            "backprop",
            _projected(zoopt.GaLoreAdamW, rank),
            adapter=_five_layers,
        ),
        Method("GradNormLoRP", "backprop", _gradnormlorp(rank), adapter=_gradnorm(rank)),
        Method("SLTrain + AdamW", "backprop", _plain(torch.optim.AdamW), adapter=_sltrain(rank)),
    ]


def _hybrid(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on the last two layers, MeZO on what is before and around them."""
    layers = list(repeated_layers(model).values())[-2:]
    late = {id(param) for layer in layers for param in layer.parameters()}
    split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for _, param in _trained(model):
        split[id(param) in late].append(param)
    return zoopt.Hybrid(zoopt.MeZO(split[0]), zoopt.AdamW(split[1]))


def _five_layers(model: nn.Module) -> nn.Module:
    """What OwLore trains between two draws: five layers, and all that is in none."""
    for layer in list(repeated_layers(model).values())[5:]:
        layer.requires_grad_(False)
    return model


def _gradnorm(rank: int) -> Callable[[nn.Module], nn.Module]:
    return lambda model: gradnormlorp.convert(model, rank=rank)


def _gradnormlorp(rank: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """The factors projected to half of their rank."""
    return lambda model: zoopt.GradNormLoRP(
        gradnormlorp.param_groups(model, rank=max(1, rank // 2)), state_dtype="int8"
    )


def _sltrain(rank: int) -> Callable[[nn.Module], nn.Module]:
    return lambda model: zoopt.nn.convert(model, rank=rank)
