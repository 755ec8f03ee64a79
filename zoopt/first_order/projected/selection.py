"""Which weights of a model are projected: param groups by the kind of layer, and by names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zoopt.checks import check_positive_int
from zoopt.nn.modules import Target, linear_layers
from zoopt.optimizer import Group

#: Parameters that are an embedding's or an output layer's by their names: a module on the way to
#: them has "embed" in its name, or the last one is called as in GPT-2, T5, LLaMA, timm or
#: transformers' classifiers.
PLAIN_NAMES = re.compile(
    r"(.*\.)?([^.]*embed[^.]*\..*|(wte|wpe|shared|lm_head|head|output|classifier|score)\.[^.]*)",
    re.IGNORECASE,
)


def is_plain_by_name(name: str) -> bool:
    """Whether the parameter of that name is an embedding's or an output layer's."""
    return PLAIN_NAMES.fullmatch(name) is not None


def param_groups(
    model: nn.Module,
    target: Target = "linear",
    *,
    rank: int,
    groups: Iterable[Group] | None = None,
    no_decay: bool | Sequence[str] = False,
    **group_options: Any,
) -> list[Group]:
    """Param groups: weights of the linear layers to project, and all the others, plain.

    Embeddings, norms, biases, output heads and tied weights are in plain groups, whose `rank=None`
    gives them the rule itself, AdamW say. Parameters carry their names, so that their noise does
    not depend on their order. Frozen parameters are in no group.

    Args:
        model: any module.
        target: which linear layers (nn.Linear and transformers' Conv1D); default `"linear"`, those
            of attention and MLPs. Or a regular expression, shell patterns of module names
            (`["*.q_proj", "*.v_proj"]`), or a predicate of name and module.
        rank: of the projected weights.
        groups: param groups that exist already, over parameters of the model, as `torch.optim`
            takes them. Each becomes up to two, its projected and its plain part, which keep its
            options. Default: one group of all that trains.
        no_decay: which parameters have `weight_decay=0.0`: True for all of fewer than two
            dimensions (biases and norms), or shell patterns of parameters' names
            (`["*.bias", "*norm*"]`). Default False, none.
        group_options: any further hyperparameters of the projected groups, `scale=0.25` say.

    Returns:
        The groups, for any optimizer of `zoopt.lowrank`; a group without parameters is left out.

    Raises:
        TypeError, ValueError: a rank or target of another kind; nothing that matches it, or nothing
            that does and requires a gradient; a group with parameters that are not the model's.

    Example:
        >>> groups = zoopt.lowrank.param_groups(model, rank=128, no_decay=True)
        >>> opt = zoopt.GaLoreAdamW(groups, lr=1e-5, weight_decay=0.1)
    """
    check_positive_int("rank", rank)
    weights = {id(module.weight) for module in linear_layers(model, target).values()}
    names = {id(param): name for name, param in model.named_parameters()}
    made: list[Group] = []
    for group in groups if groups is not None else [{"params": list(model.parameters())}]:
        options = {key: group[key] for key in group.keys() - {"params", "param_names"}}
        trained = [param for param in _params(group, names) if param.requires_grad]
        for projected in (True, False):
            for decays in (True, False):
                part = [
                    (names[id(param)], param)
                    for param in trained
                    if (id(param) in weights) == projected
                    and _decays(names[id(param)], param, no_decay) == decays
                ]
                own = {"rank": rank, **group_options} if projected else {"rank": None}
                kept = {} if decays else {"weight_decay": 0.0}
                if part:
                    made.append({**options, "params": part, **own, **kept})
    if not any(group["rank"] for group in made):
        raise ValueError(
            f"target must match a layer whose weight requires a gradient, got {target!r}, which "
            f"matches frozen ones only; unfreeze them with .requires_grad_()"
        )
    return sorted(made, key=lambda group: group["rank"] is None)


def _params(group: Mapping[str, Any], names: Mapping[int, str]) -> list[Tensor]:
    """The parameters of a group, which must be the model's."""
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(f"groups must be param groups with the key 'params', got {group!r:.60}")
    given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    params = [item[1] if isinstance(item, tuple) else item for item in given]
    for param in params:
        if id(param) not in names:
            raise ValueError(
                f"groups must be over the model's parameters, got one of shape "
                f"{tuple(param.shape)} that is not; make them of this model"
            )
    return params


def _decays(name: str, param: Tensor, no_decay: bool | Sequence[str]) -> bool:
    """Whether the parameter keeps its group's weight decay."""
    if isinstance(no_decay, bool):
        return not (no_decay and param.dim() < 2)
    return not any(fnmatch.fnmatchcase(name, glob) for glob in no_decay)
