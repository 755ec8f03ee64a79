"""torch.optim.AdamW's arguments and checkpoints, taken over and given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.checks import check_bool
from zoopt.first_order.projected.codecs import moment
from zoopt.kernels.adam.moments import decode, encode
from zoopt.optimizer import Group, TensorSpec

#: Keys of torch.optim.AdamW's groups that ours do not have.
_IGNORED = ("foreach", "fused")
_REFUSED = ("amsgrad", "capturable", "differentiable")
_TORCHS = (*_IGNORED, *_REFUSED, "decoupled_weight_decay")
_SHARED = ("lr", "betas", "eps", "weight_decay", "maximize")
#: The moments, and whether they have signs.
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}


def without_torchs_options(options: Group) -> Group:
    """The options without those of torch.optim.AdamW that have no effect here.

    Raises:
        ValueError: one of them asks for something that zoopt does not have.
    """
    for name in (*_IGNORED, *_REFUSED):
        value = options.get(name)
        if value is not None:
            check_bool(name, value)
        if value and name in _REFUSED:
            raise ValueError(f"{name} must be False, got True: use torch.optim.AdamW for it")
    return {key: value for key, value in options.items() if key not in _TORCHS}


def is_torchs(state_dict: Mapping[str, Any]) -> bool:
    """Whether it is one of torch.optim.Adam or AdamW."""
    groups = state_dict.get("param_groups", ())
    return bool(groups) and all(
        "noise_version" not in group and {*_SHARED, "amsgrad"} <= group.keys() for group in groups
    )


def from_torch(
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    specs: Sequence[Sequence[Mapping[str, TensorSpec] | None]],
) -> tuple[dict[str, Any], int]:
    """torch.optim.AdamW's state_dict as one of ours.

    Args:
        groups: of our optimizer, each with as many parameters as the state_dict's.
        specs: the state of each of their parameters; None if it is projected.

    Returns:
        the state_dict, and how many parameters have moments that cannot be used because they are
        projected here: they start without.

    Raises:
        ValueError: it is of amsgrad, or of Adam with a weight decay, which is another method.
    """
    state: dict[Any, dict[str, Any]] = {}
    dropped, saved = 0, []
    for group, own, declared in zip(state_dict["param_groups"], groups, specs, strict=True):
        if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
            raise ValueError(
                f"a checkpoint of torch must be of AdamW, got Adam's with weight_decay "
                f"{group['weight_decay']}, which is not decoupled; go on with torch.optim.Adam"
            )
        kept = {key: own[key] for key in own if key not in ("params", *_SHARED)}
        saved.append({**without_torchs_options(group), **kept})
        for index, spec in zip(group["params"], declared, strict=True):
            entries = state_dict["state"].get(index)
            if not entries:
                continue
            if "max_exp_avg_sq" in entries:
                raise ValueError(
                    "amsgrad must be False, got a checkpoint of it; go on with torch.optim.AdamW"
                )
            if spec is None:
                dropped += 1
                continue
            state[index] = _encoded(entries, spec, group["maximize"])
    return {**state_dict, "state": state, "param_groups": saved}, dropped


def to_torch(state_dict: Mapping[str, Any], defaults: Group) -> dict[str, Any]:
    """One of our state_dicts as one of torch.optim.AdamW, moments decoded to float32 (float64).

    Args:
        defaults: the keys of our own groups.

    Raises:
        ValueError: a parameter is projected: torch.optim.AdamW has no such moments.
    """
    torchs = torch.optim.AdamW([torch.empty(0)]).defaults
    groups = [
        {
            **torchs,
            **{
                key: value
                for key, value in group.items()
                if key in _SHARED or key not in {*defaults, "shapes"}
            },
        }
        for group in state_dict["param_groups"]
    ]
    state = {
        index: _decoded(state_dict["state"][index], index, shape, group["maximize"])
        for group in state_dict["param_groups"]
        for index, shape in zip(group["params"], group["shapes"], strict=True)
        if index in state_dict["state"]
    }
    return {"state": state, "param_groups": groups}


def _encoded(
    entries: Mapping[str, Any], spec: Mapping[str, TensorSpec], maximize: bool
) -> dict[str, Any]:
    """torch's entries in the formats that are declared, rounded to nearest.

    If it maximises, torch's first moment is that of the negative gradients.
    """
    encoded = dict(entries)
    for name, signed in _MOMENTS.items():
        values = entries.get(name)
        if not isinstance(values, Tensor):
            continue
        values = -values if signed and maximize else values
        if f"{name}_scale" not in spec:
            encoded[name] = values.to(spec[name].dtype)
            continue
        for part in (name, f"{name}_scale"):
            encoded[part] = torch.zeros(
                spec[part].shape, dtype=spec[part].dtype, device=values.device
            )
        stored = moment(encoded, name, values.numel(), signed=signed)
        encode(values.detach().reshape(-1).to(stored.accumulator), stored)
    return encoded


def _decoded(
    entries: Mapping[str, Tensor], index: int, shape: Sequence[int], maximize: bool
) -> dict[str, Tensor]:
    numel = torch.Size(shape).numel()
    moments = {
        name: moment(dict(entries), name, numel, signed=signed)
        for name, signed in _MOMENTS.items()
        if name in entries
    }
    if entries.keys() - {"step", *_MOMENTS, *(f"{name}_scale" for name in _MOMENTS)}:
        raise ValueError(
            f"parameters must not be projected, got parameter {index}, which is: "
            f"torch.optim.AdamW has no such moments; begin it anew there"
        )
    return {
        "step": entries["step"].float(),
        **{
            name: decode(stored).view(torch.Size(shape)) * (-1 if stored.signed and maximize else 1)
            for name, stored in moments.items()
        },
    }
