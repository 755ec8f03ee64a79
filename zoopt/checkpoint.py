"""Checks of a state_dict, before anything changes: whatever a constructor or a step would
refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zoopt.checks import shown
from zoopt.distributed.sharding import is_sharded
from zoopt.groups import Group, check_names, plain

#: The dtypes in which counters may be saved. Release 0.1 counted in float32.
_COUNTERS = (torch.float32, torch.float64, torch.int32, torch.int64)
#: Larger than any run's count, and exact in each of these dtypes except float32 and int32.
MOST_STEPS = 1 << 53


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """The shape and dtype of one state tensor.

    Attributes:
        shape, dtype: the tensor's.
        most: the largest value of a counter that Python reads in a step. Counters lie on the CPU,
            so that no step waits for a device. None for all other tensors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    most: int | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


#: How many steps a parameter has taken; a float32 number would stop at 2^24.
STEP = TensorSpec((), torch.int64, most=MOST_STEPS)


def check_form(state_dict: Any, optimizer: str) -> None:
    """Raise unless this has the form of a state_dict: groups of parameters, and state."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a dict, got {type(state_dict).__name__}; pass what "
            f"{optimizer}.state_dict() returned"
        )
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"state_dict must have the keys 'state' and 'param_groups', got "
            f"{sorted(map(str, state_dict))}; pass what {optimizer}.state_dict() returned"
        )
    saved = state_dict["param_groups"]
    well_formed = isinstance(saved, list | tuple) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list | tuple) for group in saved
    )
    if not well_formed:
        raise ValueError(
            f"param_groups must be a list of dicts with the key 'params', got {shown(saved)}; pass "
            f"what {optimizer}.state_dict() returned"
        )
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError(
            f"state must be a dict, got {shown(state_dict['state'])}; pass what "
            f"{optimizer}.state_dict() returned"
        )


def saved_groups(
    state_dict: Mapping[str, Any], groups: Sequence[Group], optimizer: str
) -> list[Group]:
    """The groups of a checkpoint, as they would be in the optimizer.

    Parameters keep the names with which they were saved, if any, since these determine their noise.

    Args:
        state_dict: the one to load, of the right form.
        groups: the optimizer's own.
        optimizer: the name of its class.

    Raises:
        TypeError, ValueError: its parameters are others than the optimizer's.
    """
    saved = state_dict["param_groups"]
    own_sizes = [len(group["params"]) for group in groups]
    sizes = [len(group["params"]) for group in saved]
    if sizes != own_sizes:
        raise ValueError(
            f"state_dict must have as many parameters a group as the optimizer, {own_sizes}, "
            f"got {sizes}; {_regrouped(saved, groups, optimizer)}"
        )
    ids = [index for group in saved for index in group["params"]]
    if not all(isinstance(index, int | str) for index in ids) or len(set(ids)) < len(ids):
        raise ValueError(
            f"the parameters of a state_dict must be numbered, each once, got {shown(ids)}; pass "
            f"what {optimizer}.state_dict() returned"
        )
    loaded = [_loaded(group, own, optimizer) for group, own in zip(saved, groups, strict=True)]
    if len({"param_names" in group for group in loaded}) > 1:
        raise ValueError("param_names must be in all groups of a state_dict, or in none, got some")
    return loaded


def _regrouped(saved: Sequence[Group], groups: Sequence[Group], optimizer: str) -> str:
    """What to do about a checkpoint with other groups."""
    counts = {sum(len(group["params"]) for group in each) for each in (saved, groups)}
    ranks = [group.get("rank") for group in saved]
    parted = len(counts) == 1 and any(group.get("rank", 1) is None for group in groups)
    if parted and len(saved) < len(groups) and None not in ranks:
        return (
            f"release 0.1.0 projected embeddings and output layers too: to continue its runs, give "
            f"the group its rank, {optimizer}([{{'params': list(model.named_parameters()), 'rank': "
            f"{shown(ranks[0])}}}], ...)"
        )
    return f"build {optimizer} from the parameters it was saved with"


def _loaded(saved: Group, own: Group, optimizer: str) -> Group:
    """A saved group over the optimizer's own parameters."""
    params = own["params"]
    group = {key: plain(value) for key, value in saved.items() if key != "shapes"}
    # torch.distributed.checkpoint numbers parameters by name and puts them in the optimizer's
    # order. Names and shapes are then still in the order of the saved optimizer.
    by_name = any(isinstance(index, str) for index in saved["params"])
    names, own_names = group.get("param_names"), own.get("param_names")
    check_names(names, len(params))
    shapes = [list(param.shape) for param in params]
    if not by_name and _numbers(saved.get("shapes", shapes)) != shapes:
        raise ValueError(
            f"state_dict must be of parameters of the same shapes, {shapes}, got "
            f"{shown(saved['shapes'])}; build {optimizer} from the parameters it was saved with"
        )
    if names is None:
        group.pop("param_names", None)
    elif own_names is not None and list(names) != own_names and set(names) == set(own_names):
        if not by_name:
            raise ValueError(
                f"state_dict must be of parameters in the same order, {shown(own_names)}, got "
                f"{shown(names)}; build {optimizer} from the parameters as they were then"
            )
        group["param_names"] = own_names
    return {**group, "params": params}


def _numbers(shapes: Any) -> list[list[int]] | None:
    """Saved shapes, if that is what they are; they may be damaged."""
    lists = isinstance(shapes, list) and all(isinstance(shape, list) for shape in shapes)
    ints = lists and all(type(size) is int for shape in shapes for size in shape)
    return shapes if ints else None


def saved_entries(entries: Any) -> Any:
    """A parameter's saved state; torch.distributed.checkpoint writes {} if none was saved."""
    absent = isinstance(entries, dict) and not any(
        not isinstance(value, dict) or value for value in entries.values()
    )
    return {} if absent else entries


def check_entries(
    entries: Any, declared: Mapping[str, TensorSpec], index: Any, param: Tensor, optimizer: str
) -> None:
    """Raise unless a parameter's saved state is empty, or as declared."""
    if not isinstance(entries, Mapping):
        raise ValueError(
            f"state of parameter {index} must be a dict, got {shown(entries)}; pass what "
            f"{optimizer}.state_dict() returned"
        )
    for name in entries:
        if name not in declared:
            raise ValueError(
                f"state of parameter {index} must have the entries {sorted(declared)} for "
                f"{optimizer}, got {name!r}; load it into the class that saved it"
            )
    for name, spec in declared.items() if entries else ():
        if name not in entries:
            raise ValueError(
                f"state of parameter {index} must have the entries {sorted(declared)} for "
                f"{optimizer}, got none for {name!r}; load all that {optimizer}.state_dict() "
                f"returned"
            )
        check_entry(name, entries[name], spec, index, param)


def check_entry(name: str, value: Any, spec: TensorSpec, index: Any, param: Tensor) -> None:
    """Raise unless a saved state tensor can be loaded for the parameter."""
    if spec.most is not None and not spec.shape and _is_counter(value):
        number = value.item() if isinstance(value, Tensor) else value
        if not (number == number // 1 and 0 <= number <= spec.most):
            raise ValueError(
                f"state {name!r} of parameter {index} must be a {spec.dtype} "
                f"number from 0 to {spec.most}, got {number}; load a checkpoint that is not "
                f"damaged"
            )
        return
    wrapper: bool = isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)
    if not isinstance(value, Tensor):
        got = type(value).__name__
    elif wrapper and not (is_sharded(value) and is_sharded(param)):
        got = f"a {type(value).__name__}"
    elif value.layout != torch.strided:
        got = f"one of layout {value.layout}"
    elif value.is_meta and not param.is_meta:
        got = "one without values, on the meta device"
    elif (tuple(value.shape), value.dtype) != (spec.shape, spec.dtype):
        got = f"{value.dtype} {tuple(value.shape)}"
    elif spec.most is not None and not bool(((value >= 0) & (value <= spec.most)).all()):
        got = f"numbers that are not all from 0 to {spec.most}"
    else:
        return
    raise ValueError(
        f"state {name!r} of parameter {index} must be a {spec.dtype} tensor of shape "
        f"{spec.shape}, got {got}; load the checkpoint over parameters of the same shapes"
    )


def _is_counter(value: Any) -> bool:
    """Whether a number may be a saved counter, in the form of any release."""
    if isinstance(value, Tensor):
        wrapper: bool = is_traceable_wrapper_subclass(value)
        real = value.layout == torch.strided and not value.is_meta and not wrapper
        return real and value.dim() == 0 and value.dtype in _COUNTERS
    return isinstance(value, int | float) and not isinstance(value, bool)


def counter(value: Any, dtype: torch.dtype) -> Tensor:
    """A saved counter in its present form: (), on the CPU."""
    number = value.item() if isinstance(value, Tensor) else value
    return torch.tensor(int(number), dtype=dtype, device="cpu")
