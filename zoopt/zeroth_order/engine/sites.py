"""The parameters that take part in a probe, with their directions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from zoopt.dtypes import Rounding
from zoopt.kernels import dispatch
from zoopt.optimizer import Group
from zoopt.zeroth_order.engine.direction import Coefficients, Direction


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter that takes part in a probe, or the part of a sharded one that lies here.

    Attributes:
        virtual: whether operators read theta plus a displacement, and the parameter stays theta.
        copied: whether it moves from a copy of theta, and back to it exactly.
    """

    param: Tensor
    group: Group
    direction: Direction
    virtual: bool
    rounding: Rounding
    zo_eps: float
    copied: bool = False

    @property
    def in_place(self) -> bool:
        """Whether it moves by rounded additions."""
        return not (self.virtual or self.copied)


#: Where each parameter is to stand, relative to theta: the same for all of a param group.
Displacement = Callable[[Site], Coefficients]


def along(draw: int, scale: float) -> Displacement:
    """The displacement scale zo_eps z(draw)."""
    return lambda site: {draw: scale * site.zo_eps} if scale else {}


class Sites(tuple[Site, ...]):
    """The sites of a probe, in order, and tables of them that are made once.

    As long as nothing about the parameters and groups changes, steps share one such object.
    """

    @staticmethod
    def of(sites: Iterable[Site]) -> Sites:
        """The sites, with tables."""
        return sites if isinstance(sites, Sites) else Sites(sites)

    @functools.cached_property
    def virtual(self) -> dict[int, Site]:
        """The virtual ones by their parameters' ids."""
        return {id(site.param): site for site in self if site.virtual}

    @functools.cached_property
    def in_place(self) -> list[Site]:
        """Those whose parameters move in place."""
        return [site for site in self if site.in_place]

    @functools.cached_property
    def windowed(self) -> dict[int, Site]:
        """The virtual ones whose temporaries windows can make, by their parameters' ids."""
        return {
            number: site
            for number, site in self.virtual.items()
            if site.direction.in_windows
            and dispatch.launches(site.param)
            and site.param.is_contiguous()
        }

    @functools.cached_property
    def groups(self) -> dict[int, Site]:
        """One of `windowed` from each param group, by the group's id."""
        return {id(site.group): site for site in self.windowed.values()}

    @functools.cached_property
    def thin(self) -> list[Site]:
        """The virtual ones whose displacements are products of thin factors."""
        return [site for site in self.virtual.values() if site.direction.thin]

    @functools.cached_property
    def launching(self) -> list[bool]:
        """For each, whether operations on its parameter are launches."""
        return [dispatch.launches(site.param) for site in self]

    @functools.cached_property
    def devices(self) -> frozenset[torch.device]:
        """Where the parameters are."""
        return frozenset(site.param.device for site in self)

    @property
    def lasting(self) -> bool:
        """Whether the next step has the same directions if nothing else changes."""
        return all(site.direction.lasting for site in self)
