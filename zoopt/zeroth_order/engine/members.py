"""Members of a population side by side in one batch, and their directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.kernels import apply_, dispatch
from zoopt.zeroth_order.engine.low_rank import LowRank, OuterProduct
from zoopt.zeroth_order.engine.noise import Elementwise
from zoopt.zeroth_order.engine.sites import Site

#: Directions of up to this many bytes are kept until the evaluation ends: a tied weight is read
#: twice, and in text generation every token needs all of them.
_KEPT_BYTES = 1 << 28


class MemberBatch:
    """Members side by side in a batch.

    Args:
        places: each member's draw, and the sign of its displacement along it.
        examples: how many examples each has.

    Attributes:
        members, examples, rows: how many there are; rows = members x examples.
        draws: one for each pair of neighbours if all such pairs share theirs, else one each.
        signs: one for each member.
    """

    def __init__(self, places: Sequence[tuple[int, float]], examples: int) -> None:
        draws = [draw for draw, _ in places]
        self.draws = draws[0::2] if draws[0::2] == draws[1::2] else draws
        self.signs = [sign for _, sign in places]
        self.members = len(places)
        self.examples = examples
        self.rows = self.members * examples


class MemberDirections:
    """The directions of a batch's members, D of them, and how far each member goes along its own.

    Args:
        sites: the parameters; those of two or more dimensions have an `OuterProduct`.
        batch: the members.
        poisoned: replace the first member's displacement by NaN.
    """

    def __init__(self, sites: Sequence[Site], batch: MemberBatch, *, poisoned: bool) -> None:
        self._sites = {id(site.param): site for site in sites}
        self._batch = batch
        self._poisoned = poisoned
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._room = _KEPT_BYTES
        self._scales: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def factors(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Of a matrix: A^T / sqrt(r) (D, r, m) and B^T (D, r, n), contiguous, in its dtype."""

        def make() -> list[Tensor]:
            direction = self._sites[id(param)].direction
            assert isinstance(direction, OuterProduct)
            size = direction.rows + direction.columns
            normals = self._normals(param, size * direction.rank).view(-1, size, direction.rank)
            return [
                factor.transpose(1, 2).to(param.dtype).contiguous()
                for factor in direction.split(normals)
            ]

        left, right = self._keep(param, make)
        return left, right

    def vectors(self, param: Tensor) -> Tensor:
        """Of a parameter of at most one dimension: z (D, d)."""
        [z] = self._keep(param, lambda: [self._normals(param, param.numel())])
        return z

    def own(self, param: Tensor) -> Tensor:
        """The members' values of a parameter of at most one dimension: (members, d)."""
        z = self.vectors(param)
        step = z.unsqueeze(1) * self.scales(param, z.dtype).view(len(z), -1, 1)
        return (param.detach().flatten() + step.flatten(0, 1)).to(param.dtype)

    def scales(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """The factors of the directions: (members,)."""
        scale = self._sites[id(param)].zo_eps
        key = (scale, dtype, param.device)
        if key not in self._scales:
            scales = [sign * scale for sign in self._batch.signs]
            if self._poisoned:
                scales[0] = math.nan
            self._scales[key] = torch.tensor(scales, dtype=dtype, device=param.device)
        return self._scales[key]

    def _normals(self, param: Tensor, count: int) -> Tensor:
        """The first numbers of each draw's sequence: (D, count), in the accumulator's dtype."""
        direction = self._sites[id(param)].direction
        assert isinstance(direction, LowRank | Elementwise)
        shape = (len(self._batch.draws), count)
        normals = torch.zeros(shape, dtype=torch.float32, device=param.device)
        key, backend = direction.key, dispatch.choose(normals, None)
        for row, draw in zip(normals, self._batch.draws, strict=True):
            if dispatch.launches(normals):
                apply_(row, [1.0], key=key, draws=[draw])
            else:
                # The kernel itself, since checks of arguments would take as long as a short
                # sequence.
                backend.weighted_sum(row, row, None, [1.0], [draw], 1.0, None, key)
        return normals.to(accumulator_dtype(param.dtype))

    def _keep(self, param: Tensor, make: Callable[[], list[Tensor]]) -> tuple[Tensor, ...]:
        kept = self._kept.get(id(param))
        if kept is None:
            kept = tuple(make())
            size = sum(tensor.nbytes for tensor in kept)
            if size <= self._room:
                self._room -= size
                self._kept[id(param)] = kept
        return kept
