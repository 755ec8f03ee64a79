"""Checks of arguments. Messages give the value, the constraint and, unless obvious, the remedy."""

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
        one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
        scalar = value.item() if one else value
        number = isinstance(scalar, Real) and not isinstance(scalar, bool)
    if (
        number
        and _is_finite(scalar)
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
    message = (
        f"{name} must be a finite number{' ' if bounds else ''}{constraint}, got {shown(value)}"
    )
    raise ValueError(message) if number or isinstance(value, Tensor) else TypeError(message)


def check_positive_int(name: str, value: Any) -> None:
    """Raise unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive int, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be a positive int, got {shown(value)}")


def check_nonnegative_int(name: str, value: Any, most: int | None = None) -> None:
    """Raise unless `value` is an int of at least 0, and of at most `most` if there is one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 0, got {shown(value)}")
    if value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be an int >= 0 and <= {most}, got {shown(value)}")


def check_bool(name: str, value: Any) -> None:
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")


def check_betas(betas: Any) -> None:
    """Raise unless they are a pair of numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {shown(betas)}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, low=0.0, high=1.0, open_high=True)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {known}, got {shown(value)}")


def nearest(value: Any, known: Collection[str], likeness: float = 0.6) -> str:
    """The end of a message about an unknown name: "; did you mean 'lr'?", or nothing."""
    found = difflib.get_close_matches(str(value).lower(), known, n=3, cutoff=likeness)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def shown(value: Any) -> str:
    """The value as a message shows it: only its beginning if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"an int of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no float can hold
        return False
