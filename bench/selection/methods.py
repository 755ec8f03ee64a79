"""How each method of bench.selection trains a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import zoopt

LAYERS = ["*.layers.*"]
#: Steps between a method's choices of what trains.
ROUND = 10


@dataclasses.dataclass
class Training:
    """How a method trains a classifier: its optimizer, and objects that must be kept alive.

    Attributes:
        forward_only: whether the optimizer's step takes the closure, without a backward pass.
    """

    optimizer: Any
    kept: Any = None
    forward_only: bool = False


#: classifier, learning rate, seed, losses of a few batches -> how it is trained.
Build = Callable[[Any, float, int, list[Callable[[], torch.Tensor]]], Training]


@dataclasses.dataclass(frozen=True)
class Method:
    """A line of the table.

    Attributes:
        label: its name in the table.
        build: how it trains.
        lr: the middle one of its first learning rates.
        longer: how many times as many steps it takes as the others.
    """

    label: str
    build: Build
    lr: float
    longer: int = 1


def adamw(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    return Training(zoopt.AdamW(classifier.trainable(), lr=lr, seed=seed))


def lora(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    peft.get_peft_model(classifier.model, config)
    return adamw(classifier, lr, seed, losses)


def ggpo(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    training = lora(classifier, lr, seed, losses)
    training.kept = zoopt.LoRAGGPO(classifier.model, training.optimizer, seed=seed)
    return training


def spiel(growth: Any) -> Build:
    def build(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
        for _, param in classifier.trainable():
            param.requires_grad_(param.dim() > 1)
        params = classifier.trainable()
        options = {"growth": growth, "update_gap": ROUND, "seed": seed}
        return Training(zoopt.SparseDeltaAdamW(params, lr=lr, **options))

    return build


def half(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    training = adamw(classifier, lr, seed, losses)
    training.kept = zoopt.HalfFineTuning(
        classifier.model, training.optimizer, round_steps=ROUND, seed=seed
    )
    return training


def green(budget: float) -> Build:
    def build(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
        training = adamw(classifier, lr, seed, losses)
        training.kept = zoopt.GreenTrainer(
            *(classifier.model, training.optimizer, losses[0]), budget=budget, select_every=ROUND
        )
        return training

    return build


def cofitune(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    training = adamw(classifier, lr, seed, losses)
    training.kept = zoopt.CoFiTune(
        *(classifier.model, training.optimizer, losses), target=["*.mlp.*"], seed=seed
    )
    return training


def lora_sb(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    zoopt.nn.convert_to_lora_sb(classifier.model, losses, LAYERS, rank=32, lr=1e-4)
    for name, param in classifier.model.named_parameters():
        param.requires_grad_(name.endswith(".core"))
    return adamw(classifier, lr, seed, losses)


def peqa(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    zoopt.nn.convert_to_quantised(classifier.model, LAYERS, bits=4)
    return Training(zoopt.AdamW(zoopt.nn.train_scales(classifier.model), lr=lr, seed=seed))


def qzo(classifier: Any, lr: float, seed: int, losses: Any) -> Training:
    zoopt.nn.convert_to_quantised(classifier.model, LAYERS, bits=4, form="log")
    scales = zoopt.nn.train_scales(classifier.model)
    # A slope along log s is some 10 times smaller than along the weights.
    options = {"max_projected_grad": 1.0, "zo_eps": 1e-2, "seed": seed}
    return Training(zoopt.MeZO(scales, lr=lr, **options), forward_only=True)


METHODS = {
    "adamw": Method("AdamW", adamw, 1e-4),
    "lora": Method("LoRA", lora, 1e-3),
    "lora-ggpo": Method("LoRA-GGPO", ggpo, 1e-3),
    "lora-sb": Method("LoRA-SB", lora_sb, 1e-3),
    "spiel-ag": Method("SpIEL, AG", spiel("accumulated"), 4e-4),
    "spiel-ma": Method("SpIEL, MA", spiel("momentum"), 4e-4),
    "hft": Method("half fine-tuning", half, 1e-4),
    "green-30": Method("GreenTrainer, 30 %", green(0.3), 1e-4),
    "green-50": Method("GreenTrainer, 50 %", green(0.5), 1e-4),
    "cofitune": Method("CoFiTune", cofitune, 2e-4),
    "peqa-int4": Method("PEQA, int4", peqa, 4e-5),
    "qzo-int4": Method("QZO, int4", qzo, 2e-2, longer=10),
}
