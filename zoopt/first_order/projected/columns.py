"""Subspaces that are columns of the identity: columns of the gradient itself, or rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.projected.basis import cycle
from zoopt.first_order.projected.geometry import Geometry, matrix
from zoopt.first_order.site import Site, descent_rate, draw_of
from zoopt.kernels import perturb
from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op import add_product_


def random_columns(
    dim: int, rank: int, *, seed: int, stream: int, draw: int, device: torch.device
) -> Tensor:
    """`rank` of the numbers below `dim`, each set as likely as any other, in order: int64, (rank,).

    Args:
        seed, stream, draw: name the noise that decides.
    """
    return _several(dim, rank, [NoiseKey(seed, stream)], draw, device)[0]


def _several(
    dim: int, rank: int, keys: Sequence[NoiseKey], draw: int, device: torch.device
) -> Tensor:
    """`random_columns` of k streams, in a few passes: (k, rank)."""
    noise = torch.zeros(len(keys), dim, device=device)
    # No value of the noise is a zero, so 0 + 1 z has z's bits.
    batch = Batch(noise.unbind(), keys)
    perturb(batch, 1.0, draw=draw, out=batch.tensors)
    return noise.argsort(dim=1, stable=True)[:, :rank].sort(1).values


def columns_of(sites: Sequence[Site], geo: Geometry, completed: int) -> Tensor:
    """The columns (rows on the left) of the step after `completed` ones: int64, (k, r)."""
    dim, device = geo.m if geo.side == "left" else geo.n, sites[0].param.device
    draws: dict[int, list[int]] = {}
    for i, site in enumerate(sites):
        draws.setdefault(draw_of(cycle(site, completed)), []).append(i)
    found = torch.empty(len(sites), geo.rank, dtype=torch.int64, device=device)
    for draw, members in draws.items():
        keys = [NoiseKey(sites[i].seed, sites[i].stream) for i in members]
        made = _several(dim, geo.rank, keys, draw, device)
        if len(draws) == 1:
            return made
        torch._foreach_copy_([found[i] for i in members], made.unbind())
    return found


def chosen_of(matrices: Sequence[Tensor], columns: Sequence[Tensor], geo: Geometry) -> Tensor:
    """Columns (rows on the left) of k matrices, as they lie there: (k, m, r) or (k, r, n)."""
    axis, first = axis_of(geo), matrices[0]
    if len(matrices) == 1:
        return first.index_select(axis, columns[0]).unsqueeze(0)
    shape = list(first.shape)
    shape[axis] = len(columns[0])
    found = first.new_empty(len(matrices), *shape)
    for own, chosen, target in zip(matrices, columns, found, strict=True):
        torch.index_select(own, axis, chosen, out=target)
    return found


def reduced_to(gradients: Sequence[Tensor], columns: Sequence[Tensor], geo: Geometry) -> Tensor:
    """R of k gradients, in the accumulator's dtype: (k, channels, r)."""
    blocks = chosen_of([matrix(gradient) for gradient in gradients], columns, geo)
    blocks = blocks.mT if geo.side == "left" else blocks
    return blocks.to(accumulator_dtype(blocks.dtype)).contiguous()


def axis_of(geo: Geometry) -> int:
    """The axis of a matrix along which they are chosen."""
    return 0 if geo.side == "left" else 1


def write_columns(
    sites: Sequence[Site],
    directions: Tensor,
    grads: Sequence[Tensor],
    columns: Sequence[Tensor],
    geo: Geometry,
    step: int,
    *,
    signs: float,
    before: int = 0,
) -> None:
    """Descend the directions of the chosen columns, and the signs of all others.

    Args:
        directions: (k, channels, r).
        grads: of each, (m, n).
        columns: of each, int64 (r,).
        signs: the step of the signs.
        before: of how many elements of the whole's chosen columns these are behind.
    """
    site, group = sites[0], sites[0].group
    thetas = kept(lambda: [matrix(own.param.detach()) for own in sites])
    blocks = kept(chosen_of, thetas, columns, geo).unbind()
    if geo.side == "left":
        # Those of several have to lie in row-major memory for one launch.
        directions = directions.mT if len(sites) == 1 else directions.mT.contiguous()
    options: dict[str, Any] = {
        "decay": 1.0 - float(group["lr"]) * group["weight_decay"],
        "rounding_draw": site.rounding_draw(step),
    }
    # The bits after those of the whole matrix.
    first = site.whole.numel() + before
    rate = directions.new_full((1, 1), descent_rate(group))
    add_product_(
        Batch(blocks, [NoiseKey(own.seed, own.stream, first) for own in sites]),
        None,
        None,
        gradient=directions.unbind(),
        channel_scale=[rate] * len(sites),
        **options,
    )
    # The signs of all columns, in one pass, and then the block in the place of its own.
    rows, width = thetas[0].shape
    nothing = rate.new_zeros(rows, 1), rate.new_zeros(width, 1)
    add_product_(
        Batch(thetas, [own.key for own in sites]),
        None,
        None,
        gradient=grads,
        sign_of=[nothing] * len(sites),
        sign_step=signs * (1.0 if group["maximize"] else -1.0),
        **options,
    )
    for own, theta, chosen, block in zip(sites, thetas, columns, blocks, strict=True):
        once(theta.index_copy_, axis_of(geo), chosen, block)
        if not own.param.is_contiguous():
            once(own.param.copy_, theta.reshape(own.param.shape))
