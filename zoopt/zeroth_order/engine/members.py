"""Members of a population side by side in one batch, and their directions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.kernels import dispatch
from zoopt.kernels.noise.key import NoiseKey
from zoopt.zeroth_order.engine.factors import Normals, make
from zoopt.zeroth_order.engine.low_rank import OuterProduct
from zoopt.zeroth_order.engine.noise import Elementwise
from zoopt.zeroth_order.engine.sites import Site

#: Directions of up to this many bytes are kept until the evaluation ends: a tied weight is read
#: twice, and in text generation every token needs all of them.
_KEPT_BYTES = 1 << 28
#: On a GPU, normals of up to this many bytes are made by one launch a draw.
_TOGETHER_BYTES = 1 << 26


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
        self._made: dict[int, Tensor] = {}
        self._room = _KEPT_BYTES
        self._scales: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def factors(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Of a matrix: A^T / sqrt(r) (D, r, m) and B^T (D, r, n), contiguous, in its dtype."""

        def make() -> list[Tensor]:
            direction = self._sites[id(param)].direction
            assert isinstance(direction, OuterProduct)
            size = direction.rows + direction.columns
            normals = self._normals(param).view(-1, size, direction.rank)
            return [
                factor.transpose(1, 2).to(param.dtype).contiguous()
                for factor in direction.split(normals)
            ]

        left, right = self._keep(param, make)
        return left, right

    def vectors(self, param: Tensor) -> Tensor:
        """Of a parameter of at most one dimension: z (D, d)."""
        [z] = self._keep(param, lambda: [self._normals(param)])
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

    def _normals(self, param: Tensor) -> Tensor:
        """The first numbers of each draw's sequence, as many as the parameter's directions have:
        (D, count), in the accumulator's dtype."""
        key, count = self._noise(self._sites[id(param)])
        wide = accumulator_dtype(param.dtype)
        if dispatch.launches(torch.empty(0, dtype=torch.float32, device=param.device)):
            # A copy: a view would keep the memory of all that are made with it.
            return self._together(param).to(wide, copy=True)
        shape = (len(self._batch.draws), count)
        normals = torch.zeros(shape, dtype=torch.float32, device=param.device)
        backend = dispatch.choose(normals, None)
        for row, draw in zip(normals, self._batch.draws, strict=True):
            # The kernel itself, since checks of arguments would take as long as a short sequence.
            backend.weighted_sum(row, row, None, [1.0], [draw], 1.0, None, key)
        return normals.to(wide)

    def _together(self, param: Tensor) -> Tensor:
        """A parameter's normals, float32 (D, count). Those of the parameters that follow are made
        with them, in expectation of being read next."""
        if id(param) not in self._made:
            terms = tuple(((draw, 1.0),) for draw in self._batch.draws)
            following = self._following(param)
            wanted = [Normals(key, (1, count), terms) for key, count in map(self._noise, following)]
            made = make(wanted, torch.float32, param.device)
            for site, normals in zip(following, made, strict=True):
                self._made[id(site.param)] = normals.squeeze(1)
        return self._made.pop(id(param))

    def _following(self, param: Tensor) -> list[Site]:
        """The parameter and those behind it whose normals are not there, of one device and seed,
        as many as may be made together."""
        own = self._sites[id(param)]
        own_key, count = self._noise(own)
        following, size = [own], count
        behind = list(self._sites).index(id(param)) + 1
        for name, site in itertools.islice(self._sites.items(), behind, None):
            key, count = self._noise(site)
            if name in self._kept or name in self._made:
                continue
            if site.param.device != param.device or key.seed != own_key.seed:
                continue
            size += count
            if 4 * size * len(self._batch.draws) > _TOGETHER_BYTES:
                break
            following.append(site)
        return following

    @staticmethod
    def _noise(site: Site) -> tuple[NoiseKey, int]:
        """The noise of a parameter's directions, and how many numbers each has."""
        direction = site.direction
        if isinstance(direction, OuterProduct):
            return direction.key, (direction.rows + direction.columns) * direction.rank
        assert isinstance(direction, Elementwise)
        return direction.key, site.param.numel()

    def _keep(self, param: Tensor, make: Callable[[], list[Tensor]]) -> tuple[Tensor, ...]:
        kept = self._kept.get(id(param))
        if kept is None:
            kept = tuple(make())
            size = sum(tensor.nbytes for tensor in kept)
            if size <= self._room:
                self._room -= size
                self._kept[id(param)] = kept
        return kept
