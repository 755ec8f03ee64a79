"""The operands of operations on some entries of a tensor."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from zoopt.kernels.adam.reference import Numbers

#: The greatest age.
OLDEST = 2**15 - 1


class Entries(NamedTuple):
    """Entries of a tensor, (k,), with Adam's state of each.

    Attributes:
        positions: int32, in the tensor, distinct; None for all entries in order.
        base: in the tensor's dtype, what entries are decayed to; None for 0.
        exp_avg, exp_avg_sq: in the accumulator's dtype.
        age: int16, from 0 to `OLDEST`.
    """

    positions: Tensor | None
    base: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: Tensor


class Rates(NamedTuple):
    """Numbers of an update, rounded to the accumulator's dtype: Adam's, whose `scale` multiplies
    the direction, and what the way to the base is multiplied by."""

    adam: Numbers
    decay: float


@functools.lru_cache(maxsize=16)
def corrections(beta: float, device: torch.device) -> Tensor:
    """1 - beta^age of every age, float32 (OLDEST + 1,). In float64 before it is rounded: while age
    is small, it would have only a few correct bits in float32."""
    age = torch.arange(OLDEST + 1, dtype=torch.float64, device="cpu")
    return (1.0 - beta**age).float().to(device)


class Sums(NamedTuple):
    """Sums over some entries of a gradient, (c,) each.

    Attributes:
        positions: int32, in the gradient; None for all entries in order.
        total, squares: of the gradients, and of their squares; of one dtype.
    """

    positions: Tensor | None
    total: Tensor
    squares: Tensor


class Cover(NamedTuple):
    """SM3's bounds of some entries of a matrix.

    Attributes:
        positions: int32, in the matrix, (k,), distinct.
        rows, columns: the accumulators of the rows and the columns, in the accumulator's dtype.
    """

    positions: Tensor
    rows: Tensor
    columns: Tensor
