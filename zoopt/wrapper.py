"""What hooks an optimizer's steps; an optimizer has one such wrapper at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from zoopt.removable import Removable

# Weak both ways: wrappers live as long as the optimizer, whose hooks hold them.
_wrappers: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Wrapper]] = weakref.WeakKeyDictionary()


def wrapper_of(optimizer: Optimizer) -> Wrapper | None:
    """What wraps the optimizer."""
    found = _wrappers.get(optimizer)
    return None if found is None else found()


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a step, self included, with `wrap` of its closure; None if it has none."""
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    if len(args) > 1 and args[1] is not None:
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    return None


class Wrapper(Removable):
    """Hooks an optimizer's steps until `remove`.

    Two at a time would each save, restore or freeze what the other one changes.

    Attributes:
        label: its name in messages.
        chooses: whether it decides which parameters train.
        from_gradients: whether the optimizer must step from gradients, not from losses.
        unfused: why the optimizer must not be fused into the backward pass; None: it may be.
    """

    label: ClassVar[str]
    chooses: ClassVar[bool] = False
    from_gradients: ClassVar[bool] = False
    unfused: ClassVar[str | None] = None

    @classmethod
    def _check(cls, optimizer: Any) -> None:
        """Raise unless the optimizer can be wrapped."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        label = cls._label_of(optimizer)
        if label is not None:
            raise ValueError(
                f"optimizer must not be under {label} yet, got one that is; call remove() on it "
                f"first"
            )
        if cls.from_gradients and hasattr(optimizer, "probe"):
            raise TypeError(
                f"optimizer must be a first-order one for {cls.label}, which works on steps from "
                f"gradients, got {type(optimizer).__name__}; use zoopt.AdamW, say"
            )
        if cls.chooses and isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                f"optimizer must update parameters from their own gradients under {cls.label}, got "
                f"LBFGS, whose history moves those that rest; use zoopt.AdamW, say"
            )
        if cls.chooses and hasattr(optimizer, "sampled_layers"):
            raise ValueError(
                f"optimizer must not be {type(optimizer).__name__}, which decides itself which "
                f"parameters train, under {cls.label}; use one of them"
            )
        if cls.unfused is not None and getattr(optimizer, "_fusion", None) is not None:
            raise ValueError(
                f"optimizer must not be fused into the backward pass, got one that is: "
                f"{cls.unfused}; call remove() on the handle of fuse_backward"
            )

    @classmethod
    def _label_of(cls, optimizer: Optimizer) -> str | None:
        """The label of what wraps the optimizer."""
        wrapper = wrapper_of(optimizer)
        return None if wrapper is None else wrapper.label

    def _attach(self, optimizer: Optimizer, *hooks: Any) -> None:
        """Become the optimizer's wrapper, with the hooks that `_detach` removes."""
        self._wrapped, self._hooks = weakref.ref(optimizer), hooks
        _wrappers[optimizer] = weakref.ref(self)

    def _detach(self) -> None:
        """Remove the hooks; the optimizer can be wrapped again."""
        for hook in self._hooks:
            hook.remove()
        optimizer = self._wrapped()
        if optimizer is not None and wrapper_of(optimizer) is self:
            del _wrappers[optimizer]
