"""The bases of one parameter: how they are stored, refreshed and loaded."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.projected.basis_codec import decode_int4, encode_int4, int4_specs
from zoopt.first_order.projected.geometry import Geometry
from zoopt.first_order.projected.subspace import random_bases, subspace
from zoopt.first_order.site import Site, draw_of
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey
from zoopt.optimizer import Group, TensorSpec

State = dict[str, Tensor]


def basis_specs(geo: Geometry, group: Group, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
    """The state tensors that hold the bases, of parameters (m, n) of this dtype; none for random
    ones, which the seed remakes. Of bfloat16 parameters they are bfloat16, unless `basis_dtype`
    says otherwise.
    """
    if group.get("projector") == "random":
        return {}
    return _basis_specs(geo, group.get("basis_dtype"), dtype)


@functools.cache
def _basis_specs(geo: Geometry, asked: str | None, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    stored = accumulator_dtype(dtype)
    if asked is None and dtype == torch.bfloat16:
        stored = dtype
    for name, shape in geo.bases.items():
        specs |= int4_specs(name, shape) if asked == "int4" else {name: TensorSpec(shape, stored)}
    return specs


def refresh(
    site: Site, state: State, gradient: Tensor, geo: Geometry
) -> list[tuple[Tensor, Tensor]]:
    """Make the bases anew from the gradient (m, n).

    Returns:
        For each basis that there was, itself and the one in its place.
    """
    if site.group["projector"] == "random":
        return []
    made, previous = kept(_made, site, state, gradient, geo)
    # Once all have been made: linear algebra can fail.
    for name, basis in made.items():
        if site.group.get("basis_dtype") == "int4":
            codes, scale = encode_int4(basis)
            once(state[name].copy_, codes)
            once(state[f"{name}_scale"].copy_, scale)
        else:
            once(state[name].copy_, basis)
    return [(basis, made[name]) for name, basis in previous.items()]


def _made(
    site: Site, state: State, gradient: Tensor, geo: Geometry
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """New bases, and those that there were."""
    first = not int(state["step"])
    made, previous = {}, {}
    wide = accumulator_dtype(gradient.dtype)
    for name in geo.bases:
        if not first:
            previous[name] = _stored(site, state, geo, name).to(wide, copy=True)
        made[name] = subspace(
            gradient,
            geo.rank,
            right=_is_right(name, geo),
            projector=site.group["projector"],
            previous=previous.get(name),
            seed=site.seed,
            stream=site.stream,
            draw=_draw(name, int(state["step"])),
        )
    return made, previous


def load_bases(site: Site, state: State, geo: Geometry, completed: int) -> dict[str, Tensor]:
    """The bases of the step after `completed` ones: stored ones as they are, others in the
    accumulator's dtype."""
    return load_all_bases([site], [state], geo, completed)[0]


def load_all_bases(
    sites: Sequence[Site],
    states: Sequence[State],
    geo: Geometry,
    completed: int,
    dtype: torch.dtype | None = None,
) -> list[dict[str, Tensor]]:
    """`load_bases` of parameters of one geometry: random ones are made together.

    Args:
        dtype: of random ones; default, the accumulator's.
    """
    wide = accumulator_dtype(sites[0].param.dtype)
    if sites[0].group.get("projector") != "random":
        if sites[0].group.get("basis_dtype") != "int4" or len(sites) == 1:
            return [
                {name: _stored(site, state, geo, name) for name in geo.bases}
                for site, state in zip(sites, states, strict=True)
            ]
        decoded = {
            name: decode_int4(
                torch.stack([state[name] for state in states]),
                torch.stack([state[f"{name}_scale"] for state in states]),
                shape,
                wide,
            )
            for name, shape in geo.bases.items()
        }
        return [{name: stack[i] for name, stack in decoded.items()} for i in range(len(sites))]
    found: list[dict[str, Tensor]] = [{} for _ in sites]
    for name, (dim, rank) in geo.bases.items():
        draws: dict[int, list[int]] = {}
        for i, site in enumerate(sites):
            draws.setdefault(_draw(name, cycle(site, completed)), []).append(i)
        for draw, members in draws.items():
            keys = [NoiseKey(sites[i].seed, sites[i].stream) for i in members]
            made = random_bases(keys, dim, rank, draw, sites[0].param.device, wide)
            made = made if dtype is None else made.to(dtype)
            for i, basis in zip(members, made, strict=True):
                found[i][name] = basis
    return found


def refresh_due(site: Site, completed: int, gap: int) -> bool:
    """Whether the step after `completed` ones makes the bases anew, at that gap."""
    return completed == 0 or (completed + _phase(site)) % gap == 0


def age(site: Site, completed: int) -> int:
    """How many steps the present bases have served, with the one after `completed` steps."""
    gap: int = site.group["update_proj_gap"]
    return min(completed, (completed + _phase(site)) % gap) + 1


def cycle(site: Site, completed: int) -> int:
    """How many refreshes lie before the step after `completed` ones, a first one not counted."""
    gap: int = site.group["update_proj_gap"]
    return (completed + _phase(site)) // gap


def _phase(site: Site) -> int:
    """Refreshes are spread over the parameters, so that no step pays for all of them."""
    gap: int = site.group["update_proj_gap"]
    return site.position * gap // site.count if site.group["stagger"] else 0


def _stored(site: Site, state: State, geo: Geometry, name: str) -> Tensor:
    """A basis as it is in the state, decoded."""
    if site.group.get("basis_dtype") != "int4":
        return state[name]
    scale = state[f"{name}_scale"]
    return decode_int4(state[name], scale, geo.bases[name], accumulator_dtype(site.param.dtype))


def _is_right(name: str, geo: Geometry) -> bool:
    """Whether the basis is one of the row space, (n, r)."""
    return name == "basis" and geo.side != "left"


def _draw(name: str, number: int) -> int:
    """The draw of a basis's noise: two a refresh, for there may be two bases."""
    return draw_of(2 * number + (name == "basis_left"))
