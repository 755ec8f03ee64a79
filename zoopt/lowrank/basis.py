"""The bases of one parameter: how they are stored, refreshed and loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.first_order import Site
from zoopt.lowrank.geometry import Geometry, matrix
from zoopt.lowrank.subspace import subspace
from zoopt.optimizer import Group, TensorSpec

State = dict[str, Tensor]


def basis_specs(geo: Geometry, group: Group, accumulator: torch.dtype) -> dict[str, TensorSpec]:
    """The state tensors that hold the bases; none for random ones, which the seed remakes."""
    if group["projector"] == "random":
        return {}
    return {name: TensorSpec(shape, accumulator) for name, shape in geo.bases.items()}


def refresh(site: Site, state: State, gradient: Tensor, geo: Geometry) -> None:
    """Make the bases anew from the gradient (m, n)."""
    if site.group["projector"] == "random":
        return
    first = not int(state["step"])
    for name in geo.bases:
        state[name].copy_(
            subspace(
                gradient,
                geo.rank,
                right=_is_right(name, geo),
                projector=site.group["projector"],
                previous=None if first else state[name],
                seed=site.seed,
                stream=site.stream,
                draw=_draw(name, int(state["step"])),
            )
        )


def load_bases(site: Site, state: State, geo: Geometry, completed: int) -> dict[str, Tensor]:
    """The bases of the step after `completed` ones, in the accumulator's dtype."""
    if site.group["projector"] != "random":
        return {name: state[name] for name in geo.bases}
    return {
        name: subspace(
            matrix(site.param),
            geo.rank,
            right=_is_right(name, geo),
            projector="random",
            previous=None,
            seed=site.seed,
            stream=site.stream,
            draw=_draw(name, refreshes(site, completed)),
        )
        for name in geo.bases
    }


def refresh_due(site: Site, completed: int) -> bool:
    """Whether the step after `completed` ones makes the bases anew."""
    return completed == 0 or refreshes(site, completed) > refreshes(site, completed - 1)


def refreshes(site: Site, completed: int) -> int:
    """How many refreshes lie before the step after `completed` ones, a first one not counted.

    They are spread over the parameters, so that no step pays for all of them.
    """
    gap: int = site.group["update_proj_gap"]
    phase = site.position * gap // site.count if site.group["stagger"] else 0
    return (completed + phase) // gap


def _is_right(name: str, geo: Geometry) -> bool:
    """Whether the basis is one of the row space, (n, r)."""
    return name == "basis" and geo.side != "left"


def _draw(name: str, number: int) -> int:
    """The draw of a basis's noise: two a refresh, for there may be two bases."""
    return 2 * number + (name == "basis_left")
