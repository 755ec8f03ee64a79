"""The dtypes in which parameters are stored and results computed, and how results are rounded."""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Literal

import torch

#: Dtypes of parameters.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Those that are narrower than their accumulator, so that a write rounds.
NARROW = (torch.bfloat16, torch.float16)

Rounding = Literal["nearest", "stochastic"]
#: The rounding of a param group; `"auto"` is `"stochastic"` for narrow dtypes.
RoundingMode = Literal["auto", "nearest", "stochastic"]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums for a tensor of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolved_rounding(mode: RoundingMode, dtype: torch.dtype) -> Rounding:
    """How writes to a tensor of this dtype round; `"nearest"` if there is nothing to round."""
    if mode == "nearest" or dtype not in NARROW:
        return "nearest"
    return "stochastic"


def scalars(values: Sequence[float], dtype: torch.dtype) -> list[float]:
    """The numbers as every implementation sees them: rounded to the accumulator's dtype."""
    if dtype == torch.float64:
        return [float(value) for value in values]
    return array.array("f", values).tolist()
