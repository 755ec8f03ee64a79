"""The parameters of an optimizer: names, streams, and which ones can be perturbed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from zoopt.dtypes import DTYPES
from zoopt.groups import Group
from zoopt.kernels.dispatch import is_fake
from zoopt.noise import stream


def named_params(groups: Sequence[Group]) -> Iterator[tuple[int, Group, Tensor, str | int]]:
    """Every parameter with its group and its name, or its position if it has none.

    Yields:
        number of the group, group, parameter, name or position over all groups.
    """
    position = 0
    for group_index, group in enumerate(groups):
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            yield group_index, group, param, position if names is None else names[i]
            position += 1


def check_streams(groups: Sequence[Group]) -> None:
    """Raise if two parameters would have the same noise."""
    seen: dict[int, str | int] = {}
    for *_, name in named_params(groups):
        number = stream(name)
        if number in seen:
            raise ValueError(
                f"parameters {seen[number]!r} and {name!r} must have different noise streams, "
                f"got {number} for both; rename one, or pass parameters without names"
            )
        seen[number] = name


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor is a subclass with its own operators, whose values lie in other
    tensors."""
    own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not is_fake(tensor)


def check_param(param: Tensor) -> None:
    """Raise unless the parameter can be written: a plain dense floating-point tensor."""
    remedy = (
        "pass only parameters to be trained, [p for p in model.parameters() if p.requires_grad]"
    )
    if is_lazy(param):
        raise TypeError(
            "a parameter must have a shape, got an uninitialized one of a lazy module; run the "
            "model once before the optimizer is made"
        )
    if is_wrapper(param):
        raise TypeError(
            f"a parameter must be a plain tensor, got the subclass {type(param).__name__}, whose "
            f"elements zoopt cannot write; {remedy}"
        )
    if param.layout != torch.strided:
        raise TypeError(f"a parameter must be dense, got layout {param.layout}; {remedy}")
    if param.is_neg() or any(
        stride == 0 < size - 1 for size, stride in zip(param.shape, param.stride(), strict=True)
    ):
        raise ValueError(
            "a parameter must not share memory among its elements, nor be a view of opposites, got "
            "one that does; pass param.detach().clone()"
        )
    if param.dtype not in DTYPES:
        kind = "complex" if param.dtype.is_complex else "of this dtype"
        hint = "use torch.view_as_real" if param.dtype.is_complex else remedy
        raise TypeError(
            f"a parameter must be float32, bfloat16, float16 or float64, got {param.dtype}; "
            f"parameters {kind} have no perturbation: {hint}"
        )
