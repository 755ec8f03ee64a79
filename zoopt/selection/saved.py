"""Checks of weights and of saved states, before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoopt.checks import check_nonnegative_int, shown
from zoopt.kernels.noise.key import check_unsigned
from zoopt.parameters import is_wrapper


def check_plain(name: str, param: Tensor) -> None:
    """Raise unless a parameter's values lie in its own memory."""
    if is_wrapper(param):
        raise TypeError(
            f"weights must be plain tensors, got the subclass {type(param).__name__} for {name!r}, "
            f"whose elements zoopt cannot write; leave it out"
        )


def check_saved(owner: str, state: Any, key: str) -> None:
    """Raise unless a state has the key, the seed of a run and its number of steps."""
    if not isinstance(state, Mapping) or not {"seed", "step", key} <= state.keys():
        keys = list(state) if isinstance(state, Mapping) else state
        raise ValueError(f"state must be one of {owner}.state_dict(), got keys {shown(keys)}")
    check_unsigned("seed", state["seed"], 64)
    check_nonnegative_int("step", state["step"], 1 << 53)


def check_vectors(name: str, vectors: Any, sizes: Mapping[str, int], of: str) -> None:
    """Raise unless the vectors of real numbers, by name, have the known sizes.

    Args:
        name: of the entry of the state.
        of: what each is of, for the message.
    """
    if not isinstance(vectors, Mapping):
        raise TypeError(f"{name} must be a dict of tensors, got {shown(vectors)}")
    for key, values in vectors.items():
        if not isinstance(values, Tensor) or values.is_meta or not values.is_floating_point():
            raise TypeError(f"{name}[{key!r}] must be a tensor of numbers, got {shown(values)}")
        rows = len(values) if values.dim() else 0
        if key not in sizes or values.shape != (sizes[key],):
            raise ValueError(
                f"state must be of the same {of}, got {key!r} of {rows} rows, shape "
                f"{tuple(values.shape)}; load it over the model that it was saved with"
            )
