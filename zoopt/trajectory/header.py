"""The header of a trajectory: the optimizer, the parameters, and a hash of the base weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zoopt.distributed.sharding import is_sharded, whole
from zoopt.noise import NOISE_VERSION, stream
from zoopt.parameters import named_params
from zoopt.registry import rows
from zoopt.trajectory.format import FORMAT, TrajectoryError
from zoopt.version import __version__
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer

#: Group keys that are not hyperparameters.
_OTHERS = ("params", "param_names")
#: Bytes that are hashed at a time.
_CHUNK = 1 << 24


def names_of(optimizer: ZerothOrderOptimizer, model: Any) -> dict[Tensor, str]:
    """The model's name of each of the optimizer's parameters, or without a model its own.

    Raises:
        ValueError: a parameter is not one of the model's, or has no name.
    """
    if model is None:
        params = list(named_params(optimizer.param_groups))
        if any(isinstance(name, int) for *_, name in params):
            raise ValueError(
                "a recorded run needs a model, or an optimizer made from named parameters, got "
                "neither; pass model.named_parameters()"
            )
        return {param: str(name) for _, _, param, name in params}
    names = {param: name for name, param in model.named_parameters()}
    for _, _, param, own in named_params(optimizer.param_groups):
        if param not in names:
            raise ValueError(
                f"every parameter of the optimizer must be one of the model's, got {own!r}, which "
                f"is not; pass the model whose parameters are trained"
            )
    return names


def describe(optimizer: ZerothOrderOptimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """The header of the optimizer's run, as it stands now."""
    params = [
        {
            "name": names[param],
            "shape": list(param.shape),
            "dtype": str(param.dtype).removeprefix("torch."),
            "stream": stream(own),
        }
        for _, _, param, own in named_params(optimizer.param_groups)
    ]
    return {
        "format": FORMAT,
        "noise_version": NOISE_VERSION,
        "zoopt": __version__,
        "torch": torch.__version__,
        "class": type(optimizer).__name__,
        "groups": [
            {
                "options": {k: to_json(v) for k, v in group.items() if k not in _OTHERS},
                "count": len(group["params"]),
                "names": list(group["param_names"]) if "param_names" in group else None,
            }
            for group in optimizer.param_groups
        ],
        "params": params,
        "trained": [
            param["name"]
            for param, t in zip(params, _all(optimizer), strict=True)
            if (t.requires_grad)
        ],
        "base": fingerprint(_all(optimizer)),
    }


def params_of(header: dict[str, Any], model: Any) -> list[Tensor]:
    """The model's parameters that a run trained.

    Raises:
        TrajectoryError: the model has other parameters.
    """
    own, params = dict(model.named_parameters()), []
    for expected in header["params"]:
        param = own.get(expected["name"])
        shape, dtype = tuple(expected["shape"]), getattr(torch, expected["dtype"])
        if param is None or tuple(param.shape) != shape or param.dtype != dtype:
            got = "none" if param is None else f"{param.dtype} {tuple(param.shape)}"
            raise TrajectoryError(
                f"the model must have a parameter {expected['name']!r}, {dtype} {shape}, got "
                f"{got}; pass the model that the run began from"
            )
        params.append(param)
    return params


def rebuild(header: dict[str, Any], model: Any) -> ZerothOrderOptimizer:
    """The optimizer of a header, over a model's parameters, as it was when the run began.

    Raises:
        TrajectoryError: the model has other parameters, or this version of zoopt cannot continue.
            Nothing has changed then.
    """
    if header["noise_version"] != NOISE_VERSION:
        raise TrajectoryError(
            f"noise_version must be {NOISE_VERSION}, got {header['noise_version']!r}; install the "
            f"version of zoopt that wrote it, {header['zoopt']}"
        )
    found = [row.cls for row in rows() if row.cls.__name__ == header["class"]]
    if not found:
        raise TrajectoryError(f"this version of zoopt has no optimizer {header['class']!r}")
    held = params = params_of(header, model)
    groups = []
    for group in header["groups"]:
        taken, params = params[: group["count"]], params[group["count"] :]
        named = taken if group["names"] is None else list(zip(group["names"], taken, strict=True))
        groups.append({"params": named})
    optimizer = found[0](groups)  # type: ignore[call-arg]
    assert isinstance(optimizer, ZerothOrderOptimizer)
    for built, group in zip(optimizer.param_groups, header["groups"], strict=True):
        built.update({key: from_json(value) for key, value in group["options"].items()})
    for built in optimizer.param_groups:
        optimizer._check_group(built)
    for param, expected in zip(held, header["params"], strict=True):
        param.requires_grad_(expected["name"] in header["trained"])
    return optimizer


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the tensors' bytes, a chunk at a time: SHA-256, about 2 GB/s on present cores.

    Sharded tensors are gathered, one after the other; all processes must call it then."""
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = whole(tensor) if is_sharded(tensor) else tensor
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for chunk in torch.split(flat, _CHUNK):
            digest.update(chunk.cpu().numpy().data)
    return digest.hexdigest()


def to_json(value: Any) -> Any:
    """A group's value in JSON's types; tuples and tensors are marked, to distinguish them from
    lists."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dim() == 0:
            return value.item()
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[to_json(k), to_json(v)] for k, v in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a group's value must be made of numbers and strings, got {value!r}")


def from_json(value: Any) -> Any:
    """The inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        if "tuple" in value:
            return tuple(from_json(item) for item in value["tuple"])
        return {from_json(k): from_json(v) for k, v in value["dict"]}
    return value


def _all(optimizer: ZerothOrderOptimizer) -> list[Tensor]:
    return [param for _, _, param, _ in named_params(optimizer.param_groups)]
