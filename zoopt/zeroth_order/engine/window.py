"""Windows of past steps: the directions from which a moving average is rebuilt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zoopt.checks import check_positive_int, shown
from zoopt.optimizer import Group

#: Past steps of a group, oldest first: the block that was due, and the (draw, weight) pairs.
Window = tuple[tuple[int | None, tuple[tuple[int, float], ...]], ...]


def check_window(name: str, group: Group) -> None:
    """Raise unless the window's length is None, or a positive int that the mask allows."""
    if group[name] is None:
        return
    check_positive_int(name, group[name])
    if group["mask"] == "magnitude":
        raise ValueError(
            f"{name} must be None with mask='magnitude', got {group[name]!r}: past directions "
            f"cannot be rebuilt when the mask follows the weights; use mask='random'"
        )


def check_past(name: str, value: Any) -> None:
    """Raise unless the value has the form of `Window`."""
    steps = value if isinstance(value, tuple | list) else [None]
    for step in steps:
        if not (
            isinstance(step, tuple | list)
            and len(step) == 2
            and (step[0] is None or type(step[0]) is int)
            and isinstance(step[1], tuple | list)
            and all(map(_is_past_direction, step[1]))
        ):
            raise ValueError(
                f"{name} must be past steps, (block, ((draw, weight), ...)) each, got "
                f"{shown(value)}; load a checkpoint that is not damaged"
            )


def _is_past_direction(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and list(map(type, value)) == [int, float]
        and 0 <= value[0] < 1 << 32
        and math.isfinite(value[1])
    )


def window_steps(
    window: Window, block: int | None, weights: Mapping[int, float], length: int
) -> list[tuple[tuple[int, float], ...]]:
    """The block's last `length` steps, the present one included, oldest first."""
    past = [pairs for visited, pairs in window if visited == block]
    return [*past, tuple(weights.items())][-length:]


def extended(
    window: Window, block: int | None, weights: Mapping[int, float], length: int
) -> Window:
    """The window with the present step added, cut to `length` steps of its block."""
    steps = [*window, (block, tuple(weights.items()))]
    own = [i for i, (visited, _) in enumerate(steps) if visited == block]
    dropped = set(own[: max(0, len(own) - length)])
    return tuple(step for i, step in enumerate(steps) if i not in dropped)
