"""Generates the thin factors of many matrices' directions together, with few kernel launches.

On a GPU every operation is a launch. Making the factors one matrix at a time would take most of a
step.
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
    """Weighted sums of draws of one noise.

    Attributes:
        key: the noise; every sum starts at its first number.
        shape: the shape of a sum.
        sums: the terms of each sum; a sum without terms is zero.
    """

    key: NoiseKey
    shape: tuple[int, int]
    sums: tuple[Terms, ...]


def make(wanted: Sequence[Normals], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Compute the wanted sums, (sums, *shape) each, in one buffer. Sums with the same terms share a
    launch."""
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
    """Multiply each pair, (m, r) by (r, k), in one launch; the products have the given dtype."""
    sizes = [(len(a), b.shape[1]) for a, b in zip(left, right, strict=True)]
    flat = packed([m * k for m, k in sizes], dtype, left[0].device)
    torch._foreach_zero_(flat)
    out = [values.view(size) for values, size in zip(flat, sizes, strict=True)]
    batch = Batch(out, [NoiseKey(0, 0)] * len(out))
    add_products_(batch, [a.unsqueeze(0) for a in left], [b.mT.unsqueeze(0) for b in right])
    return out


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cast the tensors into one buffer. Nothing is copied if all have the dtype already."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return list(tensors)
    flat = packed([tensor.numel() for tensor in tensors], dtype, tensors[0].device)
    out = [values.view(own.shape) for values, own in zip(flat, tensors, strict=True)]
    torch._foreach_copy_(out, list(tensors))
    return out


def side_by_side(factor: Tensor) -> Tensor:
    """Reshape (D, m, r) to (m, D r): a view if D is 1, otherwise a copy."""
    return factor[0] if len(factor) == 1 else factor.movedim(0, 1).flatten(1)
