"""Virtual perturbation: parameters read as theta + a z, while theta itself is never written.

While the mode is active, each registered parameter that an operator reads is replaced by a
temporary theta + a z (in theta's dtype), which is freed after the operator. Reads of metadata pass
through; an embedding perturbs only the rows that it gathers; a product with a matrix under a
low-rank displacement makes no temporary at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zoopt.zeroth_order.engine.product import displaced_product, plus_product

#: Attributes that depend on the tensor's elements; all others are metadata.
_ELEMENT_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})

#: Functions that only read their tensor's metadata, or whose result has no values of it.
_METADATA = frozenset(
    {
        *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "is_set_to"),
        *("storage_offset", "is_contiguous", "is_floating_point", "is_complex", "is_signed"),
        *("is_conj", "is_neg", "is_inference", "is_same_size", "is_pinned", "is_shared"),
        *("get_device", "data_ptr", "untyped_storage", "requires_grad_", "register_hook"),
        *("has_names", "result_type", "can_cast", "__hash__", "__len__"),
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
    }
)
_WRITES = frozenset(
    {
        *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__"),
        *("__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
    }
)
_EMBEDDINGS = (torch.nn.functional.embedding, torch.embedding)
_LOOKUPS = (*_EMBEDDINGS, torch.nn.functional.embedding_bag)


_CONTAINERS = (list, tuple)


class _Use(NamedTuple):
    """What a torch function does with its tensors.

    Attributes:
        metadata: it reads no elements.
        writes: it writes to its first argument.
        sets: it sets an attribute.
        plain: it is none of these, nor an embedding, and reads its arguments as they are.
    """

    metadata: bool = False
    writes: bool = False
    sets: bool = False
    plain: bool = False


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "")


@functools.lru_cache(maxsize=1024)
def _use(func: Callable[..., Any]) -> _Use:
    name = _name(func)
    if name in ("__get__", "__set__"):
        attribute = func.__self__.__name__  # type: ignore[attr-defined]
        if name == "__get__":
            return _Use(metadata=attribute not in _ELEMENT_ATTRIBUTES)
        return _Use(writes=attribute == "data", sets=True)
    in_place = name in _WRITES or (name.endswith("_") and not name.startswith("_"))
    special = in_place or name in _METADATA or func in _LOOKUPS
    return _Use(metadata=name in _METADATA, writes=in_place, plain=not special)


class Interception(TorchFunctionMode):
    """Hands every torch function that reads elements of a registered parameter to `_run`.

    Args:
        parameters: those to be registered, by their ids; they outlive it.

    Attributes:
        read: whether any of the parameters has been read so far.
    """

    def __init__(self, parameters: Collection[int]) -> None:
        super().__init__()
        self._ids = parameters
        self.read = False

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function that reads registered parameters."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, by `_run` if it reads elements of registered parameters."""
        kwargs = kwargs or {}
        if not self._mentioned(args) and not (kwargs and self._mentioned(kwargs.values())):
            return func(*args, **kwargs)
        use = _use(func)
        if use.metadata:
            return func(*args, **kwargs)
        if use.writes or kwargs:
            self._refuse_writes(func, args if use.writes else (), kwargs)
        if use.sets:
            return func(*args, **kwargs)
        self.read = True
        if func in (torch.nn.functional.embedding, torch.nn.functional.embedding_bag):
            self._refuse_max_norm(args[3] if len(args) > 3 else kwargs.get("max_norm"))
        return self._run(func, args, kwargs)

    def _mentioned(self, values: Iterable[Any]) -> bool:
        ids = self._ids
        for value in values:
            if id(value) in ids:
                return True
            if isinstance(value, _CONTAINERS) and self._mentioned(value):
                return True
        return False

    def _is_registered(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._ids

    def _embedding(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """The weight and the row numbers of an embedding, if the weight is a registered one."""
        if func not in _EMBEDDINGS:
            return None
        functional = func is torch.nn.functional.embedding
        names = ("input", "weight") if functional else ("weight", "indices")
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        weight, rows = values["weight"], values[names[0] if functional else names[1]]
        if not self._is_registered(weight) or self._is_registered(rows):
            return None
        return weight, rows

    def _refuse_max_norm(self, max_norm: float | None) -> None:
        if max_norm is not None:
            raise ValueError(
                f"an embedding with max_norm={max_norm!r} writes to its weight, which virtual "
                f"perturbation cannot allow; use perturbation='inplace' or freeze the weight"
            )

    def _refuse_writes(
        self,
        func: Callable[..., Any],
        written: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Raise if the first of what is written, or `out`, is registered."""
        if self._mentioned(written[:1]) or self._mentioned([kwargs.get("out")]):
            raise RuntimeError(
                f"the closure writes to a parameter (by {_name(func)!r}), which virtual "
                f"perturbation cannot allow; use perturbation='inplace', or take the write out of "
                f"the closure"
            )


class Substitution(Interception):
    """Replaces parameters in the arguments of torch functions.

    Args:
        parameters: those to be replaced, by their ids.
        perturb: parameter -> its perturbed copy.
        perturb_rows: parameter, row numbers -> the perturbed copies of those rows.
        factors: parameter -> the thin factors of its displacement, or None if it has none; None if
            no parameter has any.
        together: those that have been made together so far, on a GPU, by the parameters' ids.
    """

    def __init__(
        self,
        parameters: Collection[int],
        perturb: Callable[[Tensor], Tensor],
        perturb_rows: Callable[[Tensor, Tensor], Tensor],
        factors: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None,
        together: Mapping[int, tuple[Tensor, Tensor]] = MappingProxyType({}),
    ) -> None:
        super().__init__(parameters)
        self._perturb = perturb
        self._perturb_rows = perturb_rows
        self._factors, self._together = factors, together

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function with the registered parameters among its arguments replaced."""
        lookup = self._embedding(func, args, kwargs)
        if lookup is not None:
            return self._perturb_rows(*lookup)
        if self._factors is not None:
            product = displaced_product(
                func, args, kwargs, self._is_registered, self._factors, self._replace
            )
            if product is not None:
                return product
        values = map(self._replace, args)
        return func(*values, **{name: self._replace(value) for name, value in kwargs.items()})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """As in `Interception`; most operators only have their arguments replaced, with as little
        Python as possible."""
        ids = self._ids
        if kwargs or self._factors is not None or not _use(func).plain:
            pair = None
            if func is torch.nn.functional.linear and not kwargs and id(args[0]) not in ids:
                pair = self._together.get(id(args[1]))
            if pair is None:
                return super().__torch_function__(func, types, args, kwargs)
            self.read = True
            y = func(*args[:2], *map(self._replace, args[2:]))
            return plus_product(y, args[0], pair[1], pair[0])
        values: list[Any] = []
        for value in args:
            if id(value) in ids:
                self.read = True
                value = self._perturb(value)
            elif isinstance(value, _CONTAINERS) and self._mentioned(value):
                self.read = True
                value = self._replace(value)
            values.append(value)
        return func(*values)

    def _replace(self, value: Any) -> Any:
        if id(value) in self._ids:
            return self._perturb(value)
        if isinstance(value, list | tuple):
            items = [self._replace(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value
