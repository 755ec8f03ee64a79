"""The thin factors of many matrices' directions, made together: a launch for all of a kind.

Where operations are launches, factors made one matrix after the other would be most of a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zoopt.kernels import apply_
from zoopt.kernels.batch import Batch, packed
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op_batch import add_products_

#: L (D, m, r) and R (D, n, r), whose product is sum_d L[d] R[d]^T.
Pair = tuple[Tensor, Tensor]
#: draw -> coefficient, in order.
Terms = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Normals:
    """Weighted sums of draws of one noise, in rows.

    Attributes:
        key: the noise, from the first number on.
        shape: how the numbers of a sum lie.
        sums: the terms of each sum; none for zeros.
    """

    key: NoiseKey
    shape: tuple[int, int]
    sums: tuple[Terms, ...]


def make(wanted: Sequence[Normals], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """All that are wanted, (sums, *shape) each, in one buffer: a launch for those that have their
    terms in common."""
    flat = packed([len(each.sums) * math.prod(each.shape) for each in wanted], dtype, device)
    made = [values.view(-1, *each.shape) for values, each in zip(flat, wanted, strict=True)]
    torch._foreach_zero_(made)
    alike: dict[Terms, list[tuple[Tensor, NoiseKey]]] = {}
    for values, each in zip(made, wanted, strict=True):
        for part, terms in zip(values, each.sums, strict=True):
            if terms:
                alike.setdefault(terms, []).append((part, each.key))
    for terms, own in alike.items():
        apply_(Batch(*zip(*own, strict=True)), [c for _, c in terms], draws=[d for d, _ in terms])
    return made


def multiply(left: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """left right of each, (m, r) and (r, k): in a dtype, one launch."""
    sizes = [(len(a), b.shape[1]) for a, b in zip(left, right, strict=True)]
    flat = packed([m * k for m, k in sizes], dtype, left[0].device)
    torch._foreach_zero_(flat)
    out = [values.view(size) for values, size in zip(flat, sizes, strict=True)]
    batch = Batch(out, [NoiseKey(0, 0)] * len(out))
    add_products_(batch, [a.unsqueeze(0) for a in left], [b.mT.unsqueeze(0) for b in right])
    return out


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in a dtype: themselves, or copies in one buffer."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return list(tensors)
    flat = packed([tensor.numel() for tensor in tensors], dtype, tensors[0].device)
    out = [values.view(own.shape) for values, own in zip(flat, tensors, strict=True)]
    torch._foreach_copy_(out, list(tensors))
    return out


def side_by_side(factor: Tensor) -> Tensor:
    """(D, m, r) as (m, D r): a view of one, a copy of several."""
    return factor[0] if len(factor) == 1 else factor.movedim(0, 1).flatten(1)
