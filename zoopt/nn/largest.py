"""The largest of many scores, all at once or as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels.dispatch import is_fake

#: How many scores are computed or compared at a time.
CHUNK = 1 << 20


def largest(scores: Tensor, count: int) -> Tensor:
    """The positions of the `count` largest scores (n,), ascending. Ties go to the first ones."""
    if is_fake(scores):
        return torch.topk(scores, count).indices
    top = torch.topk(scores, count).values
    least = top[-1]
    wanted = count - int((top > least).sum())  # How many of the tied scores to take.
    found = []
    for start in range(0, scores.numel(), CHUNK):
        run = scores[start : start + CHUNK]
        above = (run > least).nonzero().squeeze(1)
        equal = (run == least).nonzero().squeeze(1)[:wanted]
        wanted -= equal.numel()
        found.append(torch.cat((above, equal)).add_(start))
    return torch.cat(found).sort().values


class Largest:
    """The `count` largest of scores that come in parts, in order; as `largest` of all of them.

    Attributes:
        scores: the largest ones so far.
        positions: theirs, int64, ascending.
    """

    def __init__(self, count: int, like: Tensor) -> None:
        self._count = count
        self.scores = like.new_empty(0)
        self.positions = like.new_empty(0, dtype=torch.int64)

    def add(self, scores: Tensor, start: int) -> None:
        """Take scores (n,) of the positions from `start` on."""
        own = largest(scores, min(self._count, scores.numel()))
        best = torch.cat((self.scores, scores[own]))
        where = torch.cat((self.positions, own + start))
        kept = largest(best, min(self._count, best.numel()))
        self.scores, self.positions = best[kept], where[kept]
