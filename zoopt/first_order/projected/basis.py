"""The bases of one parameter: how they are stored, refreshed and loaded."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.base import Site, draw_of
from zoopt.first_order.projected.basis_codec import decode_int4, encode_int4, int4_specs
from zoopt.first_order.projected.geometry import Geometry, matrix
from zoopt.first_order.projected.subspace import subspace
from zoopt.kernels.dispatch import known
from zoopt.optimizer import Group, TensorSpec

State = dict[str, Tensor]


def basis_specs(geo: Geometry, group: Group, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
    """The state tensors that hold the bases, of parameters (m, n) of this dtype; none for random
    ones, which the seed remakes. Of bfloat16 parameters they are bfloat16, unless `basis_dtype`
    says otherwise.

    With `cos_threshold`, two numbers too: `agreements`, how many refreshes in a row have found
    the subspace where it was, and `doublings`, how often the gap between them has doubled.
    """
    if group.get("projector") == "random":
        return {}
    return _basis_specs(geo, group.get("basis_dtype"), dtype, _is_lazy(group))


@functools.cache
def _basis_specs(
    geo: Geometry, asked: str | None, dtype: torch.dtype, lazy: bool
) -> Mapping[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    stored = accumulator_dtype(dtype)
    if asked is None and dtype == torch.bfloat16:
        stored = dtype
    for name, shape in geo.bases.items():
        specs |= int4_specs(name, shape) if asked == "int4" else {name: TensorSpec(shape, stored)}
    if lazy:
        number = TensorSpec((), torch.float32)
        specs |= {"agreements": number, "doublings": number}
    return specs


def refresh(site: Site, state: State, gradient: Tensor, geo: Geometry) -> None:
    """Make the bases anew from the gradient (m, n)."""
    if site.group["projector"] == "random":
        return
    first = not int(state["step"])
    agreements = []
    for name in geo.bases:
        previous = (
            None if first else _stored(site, state, geo, name).to(accumulator_dtype(gradient.dtype))
        )
        basis = subspace(
            gradient,
            geo.rank,
            right=_is_right(name, geo),
            projector=site.group["projector"],
            previous=previous,
            seed=site.seed,
            stream=site.stream,
            draw=_draw(name, int(state["step"])),
        )
        if previous is not None and _is_lazy(site.group):
            agreements.append(agreement(previous, basis))
        if site.group.get("basis_dtype") == "int4":
            codes, scale = encode_int4(basis)
            state[name].copy_(codes)
            state[f"{name}_scale"].copy_(scale)
        else:
            state[name].copy_(basis)
    if agreements:
        _settle(state, site.group, torch.stack(agreements).amin())


def agreement(previous: Tensor, basis: Tensor) -> Tensor:
    """How near two subspaces are, from their bases (n, r): 1 if the same, 0 if as random ones.

    The root of the mean squared cosine of their principal angles, (1 / r) ||previous^T basis||^2,
    in excess of what random subspaces have, r / n: for r = 1 and a large n the |cos| of the angle.
    """
    n, rank = basis.shape
    if rank == n:
        return basis.new_ones(())
    overlap = (previous.t() @ basis).square().sum() / rank
    return ((overlap - rank / n) / (1.0 - rank / n)).clamp_min(0.0).sqrt()


def load_bases(site: Site, state: State, geo: Geometry, completed: int) -> dict[str, Tensor]:
    """The bases of the step after `completed` ones: stored ones as they are, others in the
    accumulator's dtype."""
    if site.group.get("projector") != "random":
        return {name: _stored(site, state, geo, name) for name in geo.bases}
    return {
        name: subspace(
            matrix(site.param),
            geo.rank,
            right=_is_right(name, geo),
            projector="random",
            previous=None,
            seed=site.seed,
            stream=site.stream,
            draw=_draw(name, cycle(site, completed)),
        )
        for name in geo.bases
    }


def refresh_due(site: Site, state: State, completed: int) -> bool:
    """Whether the step after `completed` ones makes the bases anew."""
    gap: int = site.group["update_proj_gap"]
    if _is_lazy(site.group):
        gap <<= int(state["doublings"])
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


def _is_lazy(group: Group) -> bool:
    """Whether a subspace that stays where it is is refreshed less and less often."""
    return group.get("cos_threshold") is not None


def _settle(state: State, group: Group, found: Tensor) -> None:
    """Count the refresh, and double the gap if the last `queue_size` of them have all agreed."""
    if known(found < group["cos_threshold"], True):
        state["agreements"].zero_()
        return
    state["agreements"] += 1
    if int(state["agreements"]) >= group["queue_size"]:
        state["doublings"] += 1


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
