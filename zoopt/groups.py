"""Param groups: which keys they have, in what order their parameters are, and plain numbers."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoopt.checks import nearest, shown
from zoopt.registry import rows

#: What torch.optim.Optimizer accepts as `params`.
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group = dict[str, Any]

#: Keys that any optimizer's groups may be given besides its own: those of torch and its schedulers,
#: and a group's label. A scheduler of the user's own adds its keys here, or to the groups.
GROUP_KEYS = {
    *("params", "param_names"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"),
    *("name", "group_name", "label", "tag"),
}

#: Group keys in which classes of this package note where a run is.
_NOTED = {
    *("step", "draw", "noise_version", "window", "past", "updates", "exp_avg_sq", "basis_draw"),
    *("layers", "matrices"),
}
#: How like a key of the class a saved one may be, before it is taken for a slip of the pen.
_TYPO = 0.85

_UNORDERED = (set, frozenset, weakref.WeakSet)


def all_params(groups: Iterable[Group]) -> list[Any]:
    """The parameters of all groups, in order."""
    return [param for group in groups for param in group["params"]]


def check_keys(optimizer: str, keys: Collection[Any], known: Collection[str]) -> None:
    """Raise unless all keys of a group are known: the optimizer's, or those of `GROUP_KEYS`."""
    for key in keys:
        if key not in known and key not in GROUP_KEYS:
            raise ValueError(
                f"a param group of {optimizer} must have keys that {optimizer} knows, "
                f"{', '.join(known)}, got {shown(key)}{nearest(key, known)}"
            )


def check_saved_keys(optimizer: str, keys: Collection[Any], known: Collection[str]) -> None:
    """Raise if a saved group has a key of another class, or one that is nearly the optimizer's.

    Others are kept, as torch keeps them: schedulers of anyone's write to groups.
    """
    for key in keys:
        if isinstance(key, str) and (key in known or key in GROUP_KEYS):
            continue
        if not isinstance(key, str) or key in _hyperparameters() or nearest(key, known, _TYPO):
            check_keys(optimizer, [key], known)


@functools.cache
def _hyperparameters() -> frozenset[str]:
    """What the optimizers of torch and of this package have in their groups."""
    torchs = [cls for cls in vars(torch.optim).values() if isinstance(cls, type)]
    classes = [cls for cls in torchs if issubclass(cls, torch.optim.Optimizer)]
    classes += [row.cls for row in rows()]
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    return frozenset(names | _NOTED)


def check_ordered(params: Any) -> None:
    """Raise if the order of the parameters may differ between processes."""
    if isinstance(params, _UNORDERED):
        raise TypeError(
            f"params must be in an order that is the same in every run, got a "
            f"{type(params).__name__}; pass a list"
        )


def listed(group: Any) -> tuple[list[Tensor], list[str] | None]:
    """The parameters of a user's group, and their names if known.

    Raises:
        TypeError, ValueError: not a dict with ordered parameters, each once, named by strings or
            not at all.
    """
    if not isinstance(group, dict) or "params" not in group:
        got = f"the keys {list(group)}" if isinstance(group, dict) else type(group).__name__
        raise (ValueError if isinstance(group, dict) else TypeError)(
            f"a param group must be a dict with the key 'params', got {got}; write "
            f"{{'params': [...], 'lr': 1e-3}}"
        )
    check_ordered(group["params"])
    given = group["params"]
    items = [given] if isinstance(given, Tensor) else list(given)
    pairs = [item for item in items if isinstance(item, tuple)]
    if pairs and (len(pairs) < len(items) or any(len(pair) != 2 for pair in pairs)):
        raise ValueError(
            "params must be all tensors, or all (name, tensor) pairs, got some of each; pass "
            "model.named_parameters() or model.parameters()"
        )
    params = [pair[1] for pair in pairs] or items
    names = [pair[0] for pair in pairs] or group.get("param_names")
    for param in params:
        if not isinstance(param, Tensor):
            raise TypeError(
                f"params must be tensors or (name, tensor) pairs, got a {type(param).__name__}; "
                f"pass model.named_parameters()"
            )
    check_names(names, len(params))
    seen: set[int] = set()
    for i, param in enumerate(params):
        if id(param) in seen:
            raise ValueError(
                f"params must hold each parameter once, got {names[i] if names else i!r} a second "
                f"time; leave it out (model.named_parameters() names a tied weight once)"
            )
        seen.add(id(param))
    return params, None if names is None else list(names)


def check_names(names: Any, count: int) -> None:
    """Raise unless they are None, or as many strings as there are parameters."""
    if names is None:
        return
    plain_list = isinstance(names, Sequence) and not isinstance(names, str)
    if not plain_list or not all(isinstance(name, str) for name in names):
        raise TypeError(f"the names of parameters must be strings, got {shown(names)}")
    if len(names) != count:
        raise ValueError(f"param_names must name the {count} parameters, got {len(names)} names")


def plain(value: Any) -> Any:
    """The value in Python's own numbers, inside tuples and lists too.

    Checkpoints with numpy's numbers or with subclasses cannot be loaded with `weights_only=True`.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, bool) or type(value) in (int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value
