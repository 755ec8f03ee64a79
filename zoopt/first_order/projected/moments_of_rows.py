"""Adam's moments of a matrix, read and written as numbers, where some of its rows are here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zoopt.distributed.sharding import Rows
from zoopt.first_order.projected.coded_shards import whole_blocks
from zoopt.first_order.projected.geometry import Geometry
from zoopt.first_order.projected.rules import adam_moments, moment_draw
from zoopt.first_order.site import Site
from zoopt.kernels.adam.moments import Moment, decode
from zoopt.kernels.adam.op_average import load_, store_
from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey

State = dict[str, Tensor]


def load_moments(
    site: Site, state: State, geo: Geometry, units: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """m and v, (channels, r) or this process's rows of them, in the basis's dtype.

    Args:
        units: of a shard with coded moments, from `coded_units`; else nothing.
    """
    wide, shape = state["basis"].dtype, geo.reduced_shape
    if site.sharded is not None and geo.side == "right":
        shape = len(site.param), geo.rank
    if site.sharded is None or not units:
        pair = ([moment] for moment in adam_moments(state, math.prod(shape)))
        first, second = (_loaded([site], moments, shape, wide)[0] for moments in pair)
        return first, second
    values = [kept(torch.zeros, shape, dtype=wide, device=site.param.device) for _ in range(2)]
    with whole_blocks(site.sharded, geo.reduced_shape, state, units, writes=values) as cut:
        moments = adam_moments(cut.state, cut.writes[0].numel())
        for stored, written in zip(moments, cut.writes, strict=True):
            written.copy_(decode(stored))
    return values[0], values[1]


def load_all_moments(
    sites: Sequence[Site], states: Sequence[State], geo: Geometry
) -> tuple[Tensor, Tensor]:
    """m and v of several matrices, (e, channels, r), in the bases' dtype."""
    wide, shape = states[0]["basis"].dtype, geo.reduced_shape
    moments = zip(*(adam_moments(state, math.prod(shape)) for state in states), strict=True)
    first, second = (torch.stack(_loaded(sites, list(own), shape, wide)) for own in moments)
    return first, second


def _loaded(
    sites: Sequence[Site], moments: Sequence[Moment], shape: tuple[int, ...], wide: torch.dtype
) -> list[Tensor]:
    """What moments hold, each in this shape: themselves, where they hold it as it is."""
    if moments[0].format == "float32":
        return [moment.codes.detach().view(shape).to(wide) for moment in moments]
    dtype, device = moments[0].accumulator, moments[0].codes.device
    values = kept(torch.empty, (len(moments), *shape), dtype=dtype, device=device)
    keys = [NoiseKey(site.seed, site.stream) for site in sites]
    return [own.to(wide) for own in load_(Batch(values.unbind(), keys), moments).tensors]


def store_all_moments(
    sites: Sequence[Site], states: Sequence[State], values: Sequence[Tensor], step: int
) -> None:
    """Round m and v of several matrices, (e, channels, r), to their format."""
    keys = [NoiseKey(site.seed, site.stream) for site in sites]
    draw, numel = moment_draw(sites[0].group, step), values[0][0].numel()
    each = zip(*(adam_moments(state, numel) for state in states), strict=True)
    for value, moments in zip(values, each, strict=True):
        if moments[0].format == "float32":
            codes = [moment.codes.view(value.shape[1:]) for moment in moments]
            once(torch._foreach_copy_, codes, list(value.unbind()))
        else:
            store_(Batch(value.unbind(), keys, reads=True), moments, moment_draw=draw)


def store_moments(
    site: Site,
    state: State,
    values: Sequence[Tensor],
    geo: Geometry,
    units: Mapping[str, int],
    step: int,
) -> None:
    """Round m and v, or this process's rows of them, to their format; the arguments as for
    `load_moments`."""
    key = NoiseKey(site.seed, site.stream)
    if site.sharded is not None and units:
        with whole_blocks(site.sharded, geo.reduced_shape, state, units, reads=values) as cut:
            _store(cut.reads, cut.state, site, step, key.shifted(cut.first))
        return
    if site.sharded is not None and geo.side == "right":
        key = key.shifted(Rows(site.sharded).first * geo.rank)
    _store(values, state, site, step, key)


def _store(values: Sequence[Tensor], state: State, site: Site, step: int, key: NoiseKey) -> None:
    draw, moments = moment_draw(site.group, step), adam_moments(state, values[0].numel())
    if moments[0].format == "float32":
        codes = [moment.codes.view(values[0].shape) for moment in moments]
        once(torch._foreach_copy_, codes, list(values))
        return
    for value, moment in zip(values, moments, strict=True):
        store_(value, moment, key=key, moment_draw=draw)
