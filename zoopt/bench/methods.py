"""The methods that benchmarks measure: every optimizer of the package, and common alternatives."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from zoopt.bench.published_mezo import PublishedMeZO
from zoopt.memory.methods import Method, methods
from zoopt.nn.modules import linear_layers

INFERENCE, PUBLISHED = "inference", "MeZO, published"
#: So small that nothing diverges, however many optimizers step on one model, in any dtype.
LR, ZO_EPS = 1e-6, 1e-3
RANK = 128
#: In every table: the common alternatives, if they are installed.
BASELINES = (
    *(INFERENCE, "SGD", "AdamW", "AdamW, checkpointed", "zoopt.AdamW, int8 state"),
    *("AdamW, int8 state (torchao)", "AdamW, int8 state (bitsandbytes)"),
    *("LoRA + AdamW", "LoRA + AdamW, checkpointed", PUBLISHED),
    *("GaLoreAdamW (galore-torch)", "APOLLOAdamW (apollo-torch)"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method, and whether backward computes its activations again (activation checkpointing)."""

    method: Method
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.method.name + (", checkpointed" if self.checkpointing else "")


def key(name: str) -> str:
    """Its name on the command line: lower case, words joined by hyphens."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def table(rank: int = RANK) -> dict[str, Entry]:
    """Everything that can be measured here, by key."""
    own = [m for m in methods(rank=rank, all_variants=True) if m.wrapping is None]
    known = [*own, published(), *peers(rank)]
    entries = [Entry(method) for method in known]
    entries += [Entry(method, True) for method in known if method.kind == "backprop"]
    return {key(entry.name): entry for entry in entries}


def groups(entries: dict[str, Entry]) -> dict[str, list[str]]:
    """Names for several methods at once: their keys."""
    plain = {name: entry.method for name, entry in entries.items() if not entry.checkpointing}
    return {
        "baselines": [key(name) for name in BASELINES if key(name) in entries],
        "zeroth-order": [name for name, m in plain.items() if m.kind == "zeroth-order"],
        "first-order": [name for name, m in plain.items() if m.kind == "backprop"],
    }


def add_argument(arguments: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """`--optimizers`: keys or groups; inference is always measured."""
    entries = table()
    every = groups(entries)

    def known(text: str) -> str:
        if key(text) not in entries and text not in every:
            raise argparse.ArgumentTypeError(
                f"expected one of {', '.join([*every, *entries])}, got {text!r}"
            )
        return text if text in every else key(text)

    arguments.add_argument(
        "--optimizers",
        nargs="+",
        type=known,
        metavar="NAME",
        default=list(default),
        help=f"which to measure: {', '.join(every)}, or any of {', '.join(entries)}",
    )


def chosen(names: Sequence[str]) -> dict[str, Entry]:
    """The methods of `--optimizers`, inference first, by name."""
    entries = table()
    every = groups(entries)
    keys = [INFERENCE, *(key for name in names for key in every.get(name, [name]))]
    return {entries[key].name: entries[key] for key in dict.fromkeys(keys)}


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def published() -> Method:
    """The algorithm as its authors published it."""
    build: Any = PublishedMeZO  # has an optimizer's step without being a torch Optimizer
    return Method(
        PUBLISHED, "zeroth-order", lambda model: build(_trained(model), lr=LR, zo_eps=ZO_EPS)
    )


def peers(rank: int) -> list[Method]:
    """Optimizers of other packages that are installed."""
    found: list[Method] = []

    def add(name: str, build: Callable[[nn.Module], Any]) -> None:
        package = name.rpartition("(")[2].rstrip(")").replace("-", "_")
        if importlib.util.find_spec(package) is not None:
            found.append(Method(name, "backprop", build))

    add("AdamW, int8 state (torchao)", _torchao)
    add("AdamW, int8 state (bitsandbytes)", _bitsandbytes)
    add("GaLoreAdamW (galore-torch)", functools.partial(_galore, rank))
    add("APOLLOAdamW (apollo-torch)", functools.partial(_apollo, rank))
    return found


def _torchao(model: nn.Module) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(_trained(model))


def _bitsandbytes(model: nn.Module) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(_trained(model))


def _galore(rank: int, model: nn.Module) -> Any:
    from galore_torch import GaLoreAdamW

    options = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW(_matrices_and_others(model, options))


def _apollo(rank: int, model: nn.Module) -> Any:
    from apollo_torch import APOLLOAdamW

    options = {
        "rank": rank,
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
        "proj": "random",
        "scale_type": "channel",
    }
    return APOLLOAdamW(_matrices_and_others(model, options))


def _matrices_and_others(model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Two param groups: the same matrices as zoopt's projected optimizers get, and the rest."""
    weights = {id(layer.weight) for layer in linear_layers(model, "linear").values()}
    matrices = [param for param in _trained(model) if id(param) in weights]
    others = [param for param in _trained(model) if id(param) not in weights]
    return [{"params": others}, {"params": matrices, **options}]
