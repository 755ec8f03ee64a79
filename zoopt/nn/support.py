"""Random supports of a matrix: a fixed number of columns in each row, regenerated from the seed."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.noise.philox import words

_MASK32 = 0xFFFFFFFF


def columns_per_row(n: int, density: float) -> int:
    """How many of a row's n columns are in a support of that density: at least 1."""
    return max(1, round(density * n))


def support(
    m: int, n: int, count: int, *, seed: int, stream: int, device: torch.device | None = None
) -> Tensor:
    """The columns of a random support, ascending and distinct in each row: int64, (m, count).

    The n columns are cut into `count` runs of nearly equal width, and one column is taken from
    each: in run j of row i, number (a_i j + b_i mod 2^32) * width_j div 2^32, where a_i and b_i are
    words 0 and 1 of Philox's block i. So an element is chosen with probability 1 / width_j. Rows
    are independent, and the runs of one row are pairwise independent. It costs one block of noise
    for each row.
    """
    row = torch.arange(m, device=device)
    # The planner runs this on tensors without values. Philox's rounds would take a tenth of its
    # time, and need little memory compared with the rest.
    fake = is_fake(row)
    rows = row.new_empty(m, 4) if fake else words(row, seed=seed, stream=stream, draw=0)  # (m, 4)
    number = torch.arange(count, device=device)
    start = number * n // count
    width = (number + 1) * n // count - start
    hashed = (rows[:, :1] * number + rows[:, 1:2]).bitwise_and_(_MASK32)
    return hashed.mul_(width).bitwise_right_shift_(32).add_(start)
