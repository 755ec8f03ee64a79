"""The norms of a matrix's columns or rows, by which GradNormLoRP divides."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype

#: Norms of the columns of W (out, in), one for each input, or of its rows.
Norm = Literal["input", "output"]


def channel_norms(v: Tensor, norm: Norm) -> Tensor:
    """The norms of V's columns, (..., m, n) -> (..., n), or rows, (..., m), and the smallest
    positive number instead of 0."""
    wide = accumulator_dtype(v.dtype)
    norms: Tensor = torch.linalg.vector_norm(v, dim=-2 if norm == "input" else -1, dtype=wide)
    return norms.clamp_min_(torch.finfo(wide).tiny)
