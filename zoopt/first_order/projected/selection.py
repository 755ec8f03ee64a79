"""Which weights of a model are projected: param groups by the kind of layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoopt.checks import check_positive_int
from zoopt.nn.modules import Target, linear_layers
from zoopt.optimizer import Group


def param_groups(
    model: nn.Module, target: Target = "linear", *, rank: int, **group_options: Any
) -> list[Group]:
    """Two param groups: weights of the linear layers to project, and all the others, plain.

    Embeddings, norms, biases, output heads and tied weights are in the second group, whose
    `rank=None` gives them the rule itself, AdamW say. Parameters carry their names, so that their
    noise does not depend on their order. Frozen parameters are in neither group.

    Args:
        model: any module.
        target: which linear layers (nn.Linear and transformers' Conv1D); default `"linear"`, those
            of attention and MLPs. Or a regular expression, shell patterns of module names
            (`["*.q_proj", "*.v_proj"]`), or a predicate of name and module.
        rank: of the projected weights.
        group_options: any further hyperparameters of the projected group, `scale=0.25` say.

    Returns:
        The groups, for any optimizer of `zoopt.lowrank`; a group without parameters is left out.

    Raises:
        TypeError, ValueError: a rank or target of another kind; nothing that matches it, or nothing
            that does and requires a gradient.

    Example:
        >>> groups = zoopt.lowrank.param_groups(model, rank=128, update_proj_gap=200)
        >>> opt = zoopt.GaLoreAdamW(groups, lr=1e-5)
    """
    check_positive_int("rank", rank)
    weights = {id(module.weight) for module in linear_layers(model, target).values()}
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    projected = [(name, param) for name, param in trained if id(param) in weights]
    plain = [(name, param) for name, param in trained if id(param) not in weights]
    if not projected:
        raise ValueError(
            f"target must match a layer whose weight requires a gradient, got {target!r}, which "
            f"matches frozen ones only; unfreeze them with .requires_grad_()"
        )
    groups = [{"params": projected, "rank": rank, **group_options}]
    return [*groups, {"params": plain, "rank": None}] if plain else groups
