"""Which weights of a model are projected: param groups by the kind of layer, and by names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from zoopt.checks import check_positive_int
from zoopt.nn.modules import Target, is_conv1d, matrices, tied_parameters
from zoopt.optimizer import Group
from zoopt.warn import warn

#: Names of embeddings' and output layers' parameters: a module on their path has "embed" in its
#: name, or the last one has a name used in GPT-2, T5, LLaMA, timm or transformers' classifiers.
PLAIN_NAMES = re.compile(
    r"(.*\.)?([^.]*embed[^.]*\..*|(wte|wpe|shared|lm_head|head|output|classifier|score)\.[^.]*)",
    re.IGNORECASE,
)


#: The size, in elements, from which a matrix's state is worth a warning.
LARGE = 1 << 16


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
    """Param groups: weights of linear maps to project, and all the others, plain.

    Projected are the weights of linear layers, and matrices in bare parameters: a layer's fused
    experts (E, m, n), and the three of `nn.MultiheadAttention.in_proj_weight`. A group of such
    stacks has the key `matrices`, and each matrix has its own subspace and state.

    Embeddings, norms, biases, output heads and tied weights are in plain groups with `rank=None`,
    for which the rule itself is used, for example AdamW. Parameters carry their names, so that
    their noise does not depend on their order. Frozen parameters are in no group.

    Args:
        model: any module.
        target: which linear layers (nn.Linear and transformers' Conv1D) and bare parameters;
            default `"linear"`, those of attention and MLPs. Or a regular expression, shell patterns
            of names (`["*.q_proj", "*.experts.*"]`), or a predicate of name and module; the name is
            the layer's, or the bare parameter's.
        rank: of the projected weights.
        groups: param groups that exist already, over parameters of the model, as `torch.optim`
            takes them. Each becomes up to two, its projected and its plain part, which keep its
            options. Default: one group of all that trains.
        no_decay: which parameters have `weight_decay=0.0`: True for all of fewer than two
            dimensions (biases and norms), or shell patterns of parameters' names
            (`["*.bias", "*norm*"]`). Default False, none.
        group_options: any further hyperparameters of the projected groups, such as `scale=0.25`.

    Returns:
        The groups, for any optimizer of `zoopt.lowrank`; a group without parameters is left out.

    Raises:
        TypeError, ValueError: a rank or target of another kind; a target that nothing trainable
            matches; a group with parameters that are not the model's.

    Warns of large matrices that `"linear"` does not find, other than embeddings, convolutions and
    output layers: they keep AdamW's state.

    Example:
        >>> groups = zoopt.lowrank.param_groups(model, rank=128, no_decay=True)
        >>> opt = zoopt.GaLoreAdamW(groups, lr=1e-5, weight_decay=0.1)
    """
    check_positive_int("rank", rank)
    counts = {id(found.param): found.number for found in matrices(model, target).values()}
    names = {id(param): name for name, param in model.named_parameters()}
    made: list[Group] = []
    for group in groups if groups is not None else [{"params": list(model.parameters())}]:
        options = {key: group[key] for key in group.keys() - {"params", "param_names"}}
        trained = [param for param in _params(group, names) if param.requires_grad]
        # By how many matrices a parameter holds, 0 for those that are not projected.
        for count in sorted({counts.get(id(param), 0) for param in trained}):
            for decays in (True, False):
                part = [
                    (names[id(param)], param)
                    for param in trained
                    if counts.get(id(param), 0) == count
                    and _decays(names[id(param)], param, no_decay) == decays
                ]
                own = {"rank": rank, **group_options} if count else {"rank": None}
                stack = {"matrices": count} if count > 1 else {}
                kept = {} if decays else {"weight_decay": 0.0}
                if part:
                    made.append({**options, "params": part, **own, **stack, **kept})
    if not any(group["rank"] for group in made):
        raise ValueError(
            f"target must match a layer whose weight requires a gradient, got {target!r}, which "
            f"matches frozen ones only; unfreeze them with .requires_grad_()"
        )
    if target == "linear":
        _say_left_out(model, made)
    return sorted(made, key=lambda group: group["rank"] is None)


def _say_left_out(model: nn.Module, groups: Iterable[Group]) -> None:
    """Warn of large matrices that are not projected although nothing in the model explains it."""
    meant = tied_parameters(model)
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding | _ConvNd | nn.Linear) or is_conv1d(module):
            meant |= {f"{prefix}.{own}" for own, _ in module.named_parameters(recurse=False)}
    left = [
        f"{name} {tuple(param.shape)}"
        for group in groups
        for name, param in group["params"]
        if group["rank"] is None
        and sum(size > 1 for size in param.shape) > 1
        and param.numel() >= LARGE
        and name not in meant
        and not is_plain_by_name(name)
    ]
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warn(
            f"not projected, hence with the state of AdamW: {shown}; where these are weights of "
            f"linear maps, put them into a group with a rank, and with matrices=E for E matrices "
            f"stacked along the first axis"
        )


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
