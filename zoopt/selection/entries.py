"""SpIEL's step: Adam on the active entries of parameters that are alike, and which these are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.first_order.site import Site, batch_of, betas_of, descent_rate
from zoopt.kernels.batch import Batch
from zoopt.kernels.entries.op import adam_entries_, cover_entries_, sum_entries_
from zoopt.kernels.entries.operands import Cover, Entries, Sums
from zoopt.kernels.journal import kept, once, pieces
from zoopt.nn.largest import largest
from zoopt.nn.sparse_delta import Tap, tap_of
from zoopt.optimizer import Group
from zoopt.selection.growth import State, finite, grown, select, window_place


def step_entries(
    sites: Sequence[Site],
    states: Sequence[State],
    gradients: Sequence[Tensor],
    others: Sequence[Tensor | None],
) -> None:
    """Step the active entries of parameters with one group and step, and change them when it is
    time. Either all are weights, or all are deltas beside one.

    Args:
        gradients: of the parameters.
        others: in a window, of a delta the gradients of the candidates.
    """
    group, step = sites[0].group, int(states[0]["step"]) + 1
    taps = [tap_of(site.param) for site in sites]
    if step == 1:
        for i in pieces(range(len(sites))):
            if taps[i] is None:
                _choose(sites[i], states[i], gradients[i])
    adam_entries_(
        batch_of(sites),
        gradients,
        [
            Entries(own.get("index"), own.get("base"), *(own[name] for name in _ADAMS))
            for own in states
        ],
        betas=betas_of(group),
        eps=group["eps"],
        rate=descent_rate(group),
        decay=float(group["lr"]) * group["weight_decay"],
        rounding_draw=sites[0].rounding_draw(step),
    )
    _watch(sites, states, gradients, others, window_place(step, group))
    for tap in taps:
        if tap is not None:
            once(tap.stepped)
    if step % group["update_gap"] == 0:
        for i in pieces(range(len(sites))):
            _replace(sites[i], states[i], step)
    once(torch._foreach_add_, [state["step"] for state in states], 1)


_ADAMS = ("exp_avg", "exp_avg_sq", "age")


def _choose(site: Site, state: State, gradient: Tensor) -> None:
    """Make the entries with the largest first gradients active."""
    theta = kept(site.param.detach().reshape, -1)
    first = kept(largest, gradient.reshape(-1).abs(), state["index"].numel())
    once(state["base"].copy_, kept(theta.__getitem__, first))
    once(state["index"].copy_, first)


def _index_of(site: Site, state: State) -> Tensor:
    """Where the active entries are, int32 (k,): a delta's in the weight beside it."""
    tap = tap_of(site.param)
    return state["index"] if tap is None else tap.layer.index


def _watch(
    sites: Sequence[Site],
    states: Sequence[State],
    gradients: Sequence[Tensor],
    others: Sequence[Tensor | None],
    place: int,
) -> None:
    """Note what growth needs of a step's gradients, at a place in the window."""
    covered = [i for i, state in enumerate(states) if "rows" in state]
    if covered:
        covers = [
            Cover(_index_of(sites[i], states[i]), states[i]["rows"], states[i]["columns"])
            for i in covered
        ]
        batch = Batch([gradients[i] for i in covered], [sites[i].key for i in covered], reads=True)
        cover_entries_(batch, covers, picked=tap_of(sites[0].param) is not None)
    candidates = [i for i, state in enumerate(states) if "candidates" in state]
    if candidates and place == 0:
        for i in pieces(candidates):
            _select(sites[i], states[i], gradients[i])
    elif candidates and place > 0:
        values, sums = [], []
        for i in candidates:
            state, beside = states[i], others[i]
            values.append(gradients[i] if beside is None else beside)
            index = state["candidates"] if beside is None else None
            sums.append(Sums(index, state["gradient_sum"], state["gradient_sq_sum"]))
        sum_entries_(Batch(values, [sites[i].key for i in candidates], reads=True), sums)


def _select(site: Site, state: State, gradient: Tensor) -> None:
    """Select the candidates of a window, and begin their sums."""
    tap = tap_of(site.param)
    if tap is not None:
        picked, finite_there = kept(lambda: (tap.picked, tap.picked_finite))
        if picked is not None:
            select(state, picked, finite_there)
        return
    sizes = gradient.reshape(-1).abs().nan_to_num_(0.0)
    sizes[state["index"].long()] = -1.0
    select(state, largest(sizes, state["candidates"].numel()), finite(gradient))


def _replace(site: Site, state: State, step: int) -> None:
    """Drop the entries that have changed least, and let others grow."""
    tap = tap_of(site.param)
    if not ("rows" in state or "candidates" in state):
        return
    if tap is not None:
        _replace_beside(site, state, tap, step)
        return
    param = site.param
    theta = kept(param.detach().reshape, -1)
    changes = kept(_changes, state, theta, site.group, step)
    if changes is None:
        return
    places, dropped, before, new = changes
    once(theta.__setitem__, dropped, before)
    for name, values in new.items():
        once(state[name].__setitem__, places, values)
    if not param.is_contiguous():
        once(param.copy_, theta.view(param.shape))


def _changes(
    state: State, theta: Tensor, group: Group, step: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]] | None:
    """The places of the entries that are dropped, their positions and what they were before, and
    the state of those that become active. None if there are none."""
    active = state["index"].long()
    found = grown(state, active, theta.numel(), group, step, betas_of(group))
    if found is None:
        return None
    base, wide = state["base"], state["exp_avg"].dtype
    changes = (theta[active].to(wide) - base.to(wide)).abs()
    places = largest(-changes, found[0].numel())
    new = {"index": found[0].to(state["index"].dtype), "base": theta[found[0]], **found[1]}
    return places, active[places], base[places], new


def _replace_beside(site: Site, state: State, tap: Tap, step: int) -> None:
    """`_replace` of the entries of a layer's delta."""
    delta, index = site.param.detach(), tap.layer.index
    numel, group = math.prod(tap.shape), site.group
    found = kept(grown, state, index, numel, group, step, betas_of(group))
    if found is None:
        return
    places = kept(largest, -delta.abs(), found[0].numel())
    once(delta.__setitem__, places, 0.0)
    once(index.__setitem__, places, found[0].to(index.dtype))
    for name, values in found[1].items():
        once(state[name].__setitem__, places, values)
