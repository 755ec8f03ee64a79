"""Subspaces that are columns of the identity: columns of the gradient itself, or rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.first_order.base import Site, descent_rate, draw_of
from zoopt.first_order.projected.basis import cycle
from zoopt.first_order.projected.geometry import Geometry, matrix
from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op import add_product_
from zoopt.noise import normal


def random_columns(
    dim: int, rank: int, *, seed: int, stream: int, draw: int, device: torch.device
) -> Tensor:
    """`rank` of the numbers below `dim`, each set as likely as any other, in order: int64, (rank,).

    Args:
        seed, stream, draw: name the noise that decides.
    """
    noise = normal(dim, seed=seed, stream=stream, draw=draw, device=device)
    return noise.argsort(stable=True)[:rank].sort().values


def columns_of(site: Site, geo: Geometry, completed: int) -> Tensor:
    """The columns (rows on the left) of the step after `completed` ones: int64, (r,)."""
    return random_columns(
        geo.m if geo.side == "left" else geo.n,
        geo.rank,
        seed=site.seed,
        stream=site.stream,
        draw=draw_of(cycle(site, completed)),
        device=site.param.device,
    )


def axis_of(geo: Geometry) -> int:
    """The axis of a matrix along which they are chosen."""
    return 0 if geo.side == "left" else 1


def channels_first(block: Tensor, geo: Geometry) -> Tensor:
    """(m, r) as it is, (r, n) as (n, r); and back."""
    return block.t() if geo.side == "left" else block


def write_columns(
    sites: Sequence[Site],
    directions: Tensor | Sequence[Tensor],
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
        directions: of each, (channels, r).
        grads: of each, (m, n).
        columns: of each, int64 (r,).
        signs: the step of the signs.
        before: of how many elements of the whole's chosen columns these are behind.
    """
    site, group = sites[0], sites[0].group
    thetas = kept(lambda: [matrix(own.param.detach()) for own in sites])
    blocks = [
        kept(theta.index_select, axis_of(geo), chosen)
        for theta, chosen in zip(thetas, columns, strict=True)
    ]
    options: dict[str, Any] = {
        "decay": 1.0 - float(group["lr"]) * group["weight_decay"],
        "rounding_draw": site.rounding_draw(step),
    }
    # The bits after those of the whole matrix.
    first = site.whole.numel() + before
    rate = directions[0].new_full((1, 1), descent_rate(group))
    add_product_(
        Batch(blocks, [NoiseKey(own.seed, own.stream, first) for own in sites]),
        None,
        None,
        gradient=[channels_first(direction, geo) for direction in directions],
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
