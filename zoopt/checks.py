"""Checks of arguments. Messages say value, constraint and, where it is not plain, the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from numbers import Real
from typing import Any

from torch import Tensor


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless `value` is a finite number (or tensor of one element) in the interval."""
    scalar, number = value, type(value) in (float, int)
    if not number:
        scalar = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        number = isinstance(scalar, Real) and not isinstance(scalar, bool)
    if (
        number
        and math.isfinite(scalar)
        and (low < scalar if open_low else low <= scalar)
        and (scalar < high if open_high else scalar <= high)
    ):
        return
    bounds = []
    if low > -math.inf:
        bounds.append(f"{'>' if open_low else '>='} {low:g}")
    if high < math.inf:
        bounds.append(f"{'<' if open_high else '<='} {high:g}")
    constraint = " and ".join(bounds)
    message = f"{name} must be a finite number{' ' if bounds else ''}{constraint}, got {value!r}"
    raise ValueError(message) if number or isinstance(value, Tensor) else TypeError(message)


def check_positive_int(name: str, value: Any) -> None:
    """Raise unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def check_nonnegative_int(name: str, value: Any) -> None:
    """Raise unless `value` is an int of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 0, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value!r}")


def check_bool(name: str, value: Any) -> None:
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def nearest(value: Any, known: Collection[str]) -> str:
    """The end of a message about a name that is not known: "; did you mean 'lr'?", or nothing."""
    found = difflib.get_close_matches(str(value).lower(), known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
