"""Generates the thin factors of many matrices' directions together, with few kernel launches.

On a GPU every operation is a launch. Making the factors one matrix at a time would take most of a
step. A bucket has the same directions at each step, so what does not depend on the draws (where
factors lie in their buffer, their noise, the tables of a launch) is prepared once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoopt.kernels import apply_
from zoopt.kernels.batch import Batch
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.packed import Layout, Packed, layout_of
from zoopt.kernels.product.op_batch import add_products_

#: L (D, m, r) and R (D, n, r), whose product is sum_d L[d] R[d]^T.
Pair = tuple[Tensor, Tensor]
#: draw -> coefficient, in order.
Terms = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Normals:
    """Weighted sums of draws of one noise.

    Attributes:
        key: the noise; every sum starts at its first number.
        shape: the shape of a sum.
        sums: the terms of each sum; a sum without terms is zero.
    """

    key: NoiseKey
    shape: tuple[int, int]
    sums: tuple[Terms, ...]


class Maker:
    """Computes sums of draws of noises in one buffer, again and again.

    Args:
        places: the noise of each tensor, and the shape of a sum.
    """

    def __init__(
        self,
        places: Sequence[tuple[NoiseKey, tuple[int, int]]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._keys = [key for key, _ in places]
        self._shapes = [shape for _, shape in places]
        self._dtype, self._device = dtype, device
        self._plans: dict[Hashable, _Plan] = {}

    def make(self, kinds: Sequence[Sequence[Terms]], of: Sequence[int]) -> Packed:
        """Sums of draws for each tensor, (sums, *shape). Those with the same terms share a launch.

        Args:
            kinds: the terms of each sum, of each kind of tensor.
            of: the kind of each tensor.
        """
        alike: dict[Terms, list[tuple[int, int]]] = {}
        for kind, sums in enumerate(kinds):
            for place, terms in enumerate(sums):
                if terms:
                    alike.setdefault(terms, []).append((kind, place))
        name = (id(of), tuple(map(len, kinds)), tuple(map(tuple, alike.values())))
        plan = self._plans.get(name)
        if plan is None:
            plan = self._plans[name] = self._planned([len(own) for own in kinds], alike, of)
        made = Packed.new(plan.layout, self._dtype, self._device, zeros=True)
        for terms, (places, batch) in zip(alike, plan.launches, strict=True):
            if isinstance(places, Layout):
                parts = Packed.within(made.buffer, places)
            else:
                parts = made.some(places)
            apply_(batch.on(parts), [c for _, c in terms], draws=[d for d, _ in terms])
        return made

    def _planned(
        self,
        counts: Sequence[int],
        alike: Mapping[Terms, Sequence[tuple[int, int]]],
        of: Sequence[int],
    ) -> _Plan:
        shapes = [(counts[kind], *shape) for kind, shape in zip(of, self._shapes, strict=True)]
        layout = layout_of(tuple(shapes), self._dtype.itemsize)
        buffer = torch.zeros(layout.size, dtype=self._dtype, device=self._device)
        members: dict[int, list[int]] = {}
        for number, kind in enumerate(of):
            members.setdefault(kind, []).append(number)
        launches = []
        for wanted in alike.values():
            places = [(number, place) for kind, place in wanted for number in members.get(kind, ())]
            numbers = [number for number, _ in sorted(places)]
            own = layout.parts(sorted(places), self._dtype.itemsize)
            like = Batch(Packed.within(buffer, own), [self._keys[number] for number in numbers])
            whole = all(shapes[number][0] == 1 for number in numbers)
            # The batch does not hold the buffer.
            launches.append((numbers if whole else own, like.on(Packed.none())))
        return _Plan(layout, launches, of)


class _Plan(NamedTuple):
    """How sums are made.

    Attributes:
        layout: of the tensors.
        launches: the tensors of each launch, or the layout of their parts, and a batch like them.
        of: the kind of each tensor.
    """

    layout: Layout
    launches: list[tuple[list[int] | Layout, Batch]]
    of: Sequence[int]


def make(wanted: Sequence[Normals], dtype: torch.dtype, device: torch.device) -> Packed:
    """Compute the wanted sums, (sums, *shape) each, in one buffer, once."""
    kinds: dict[tuple[Terms, ...], int] = {}
    of = [kinds.setdefault(each.sums, len(kinds)) for each in wanted]
    maker = Maker([(each.key, each.shape) for each in wanted], dtype, device)
    return maker.make(list(kinds), of)


class Multiplier:
    """Multiplies pairs of matrices in one launch, again and again.

    Args:
        sizes: those of the products.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layout = layout_of(tuple([(1, *size) for size in sizes]), dtype.itemsize)
        self._matrices = layout_of(tuple(sizes), dtype.itemsize)
        self._dtype, self._device = dtype, device
        self._batch: Batch | None = None

    def multiply(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Packed:
        """The product of each pair, (1, m, r) by (1, r, k): (1, m, k)."""
        out = Packed.new(self._layout, self._dtype, self._device, zeros=True)
        matrices = Packed.within(out.buffer, self._matrices)
        if self._batch is None:
            like = Batch(matrices, [NoiseKey(0, 0)] * len(matrices))
            self._batch = like.on(Packed.none())  # which does not hold the products
        add_products_(self._batch.on(matrices), left, right)
        return out


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Cast the tensors into one buffer. Nothing is copied if all have the dtype already."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    layout = layout_of(tuple([tuple(tensor.shape) for tensor in tensors]), dtype.itemsize)
    out = Packed.new(layout, dtype, tensors[0].device)
    torch._foreach_copy_(out, list(tensors))
    return out


def side_by_side(factor: Tensor) -> Tensor:
    """Reshape (D, m, r) to (m, D r): a view if D is 1, otherwise a copy."""
    return factor.squeeze(0) if factor.shape[0] == 1 else factor.movedim(0, 1).flatten(1)
