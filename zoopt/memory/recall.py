"""Caches the results of operators on fake tensors, which depend only on shapes.

torch infers shapes again at each call. This takes ten times as long as looking them up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter

from zoopt.memory.grouped import run

_PLAIN = frozenset(
    {
        *(int, float, bool, str, type(None)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    }
)
#: Operators with these results depend on values, or change the shape of an argument.
_BEYOND_SHAPES = frozenset(
    {
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
        torch.Tag.inplace_view,
    }
)
#: This operator returns a view, but is not declared as one.
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


class _Made(NamedTuple):
    """A new tensor, or a view of the first argument.

    Attributes:
        shape, stride, offset, dtype, device: those of the tensor.
        view: whether it shares the first argument's storage.
        attributes: the other attributes of the fake tensor.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    view: bool
    attributes: dict[str, Any]


#: An operator's result: a new tensor, the number of the argument it returned, None, or several.
_Result = _Made | int | None | tuple["_Result", ...] | list["_Result"]


class _Unknown(Exception):
    """The shapes of these arguments do not determine the operator's result."""


class Recall:
    """Runs operators on fake tensors, once for all arguments of the same shapes."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Result] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the operator's result, from the cache if it is known."""
        signature: list[Any] = [func, torch.get_default_dtype()]
        try:
            _describe(args, signature)
            for name, value in kwargs.items():
                signature.append(name)
                _describe(value, signature)
        except _Unknown:
            return run(func, args, kwargs)
        key = tuple(signature)
        if key in self._known:
            # Disable dispatch, or the fake mode would treat the new tensors as the model's.
            with torch._C._DisableTorchDispatch():
                return _remade(self._known[key], args)
        result = run(func, args, kwargs)
        with contextlib.suppress(_Unknown):
            self._known[key] = _remembered(func, args, kwargs, result)
        return result


def _describe(value: Any, signature: list[Any]) -> None:
    """Append everything that a result can depend on to the signature."""
    kind = type(value)
    if kind in _PLAIN:
        signature += (kind, value)
    elif isinstance(value, FakeTensor):
        # Refuse complex tensors, whose conjugation is lazy, and constants, whose values matter.
        if value.layout != torch.strided or value.is_complex() or value.constant is not None:
            raise _Unknown
        signature += (value.shape, value.stride(), value.storage_offset())
        signature += (value.dtype, value.fake_device)
    elif kind is list or kind is tuple or isinstance(value, list | tuple):
        signature.append(len(value))
        for item in value:
            _describe(item, signature)
    else:
        raise _Unknown


def _remembered(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Result:
    if func.namespace != "aten" or not _BEYOND_SHAPES.isdisjoint(func.tags):
        raise _Unknown
    if isinstance(result, list | tuple):
        return type(result)(_remembered(func, args, kwargs, item) for item in result)
    if result is None:
        return None
    for number, value in enumerate(args):
        if value is result:
            return number
    if not isinstance(result, FakeTensor) or result.requires_grad:
        raise _Unknown
    _describe(result, [])
    storage = result.untyped_storage()
    sharing = [
        value
        for value in tree_iter((args, kwargs))
        if isinstance(value, Tensor) and value.untyped_storage() is storage
    ]
    view = bool(sharing)
    if view and not (sharing[0] is args[0] and (func.is_view or func is _UNSAFE_VIEW)):
        raise _Unknown
    made = _Made(
        result.shape,
        result.stride(),
        int(result.storage_offset()),
        result.dtype,
        result.fake_device,
        view,
        dict(vars(result)),
    )
    with torch._C._DisableTorchDispatch():
        if not view and _remade(made, args).untyped_storage().nbytes() != storage.nbytes():
            raise _Unknown
    return made


def _remade(result: _Result, args: Sequence[Any]) -> Any:
    if isinstance(result, _Made):
        shape, stride, offset, dtype, device, view, attributes = result
        meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if view:
            meta.set_(args[0].untyped_storage(), offset, shape, stride)
        # Do what FakeTensor's constructor does. Calling it would double the time of this function.
        tensor = Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
        )
        vars(tensor).update(attributes)
        return tensor
    if isinstance(result, int):
        return args[result]
    if result is None:
        return None
    return type(result)([_remade(item, args) for item in result])
