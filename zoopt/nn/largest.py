"""The largest of many scores, all at once or as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels.dispatch import is_fake
from zoopt.nn.initial import CHUNK


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

    Args:
        like: the scores have its dtype and device.
        without: positions that are left out; scores are then at least 0.

    Attributes:
        scores: the largest ones so far.
        positions: theirs, int64, ascending.
    """

    def __init__(self, count: int, like: Tensor, *, without: Tensor | None = None) -> None:
        self._count, self._without = count, None if without is None else without.long()
        self.scores = like.new_empty(0)
        self.positions = like.new_empty(0, dtype=torch.int64)

    def add(self, scores: Tensor, start: int) -> None:
        """Take scores (n,) of the positions from `start` on; those left out are overwritten."""
        if self._without is not None:
            places = self._without - start
            scores[places[(places >= 0) & (places < scores.numel())]] = -1.0
        own = largest(scores, min(self._count, scores.numel()))
        best = torch.cat((self.scores, scores[own]))
        where = torch.cat((self.positions, own + start))
        kept = largest(best, min(self._count, best.numel()))
        self.scores, self.positions = best[kept], where[kept]
