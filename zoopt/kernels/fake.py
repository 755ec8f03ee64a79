"""The operations on tensors without values: nothing, in no memory but what the caller gave.

With it every optimizer steps on fake tensors, and the memory planner counts what it allocates.
"""

from __future__ import annotations

from typing import Any


def nothing(*args: Any) -> None:
    """Leave everything as it is."""


weighted_sum = momentum_sum = adam_window = gather_rows = nothing
adam = adamw = add_product = sm3 = nothing
