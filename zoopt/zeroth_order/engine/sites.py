"""The parameters that take part in a probe, with their directions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from zoopt.dtypes import Rounding
from zoopt.kernels import dispatch
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.places import place_of
from zoopt.lasting import Lasting
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


@dataclasses.dataclass(eq=False)
class Bucket:
    """Parameters of a group that move alike, each along its own direction: on a GPU those for which
    one launch can do it. Elsewhere each is a bucket by itself.

    Attributes:
        launching: whether operations on them are launches.
        kept: what is used at each step: by the form of what is asked for in a pass, what it is made
            of (see `Passes`), and by names what methods keep.
    """

    sites: tuple[Site, ...]
    launching: bool
    kept: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = self.sites[0]
        self.params = [site.param for site in self.sites]
        self._places = [place_of(param) for param in self.params] if len(self.sites) > 1 else []

    @property
    def moved(self) -> bool:
        """Whether one of several parameters has been moved to other memory."""
        if is_fake(self.first.param):
            return False
        return list(map(Tensor.data_ptr, self.params)) != self._places


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
    def buckets(self) -> list[Bucket]:
        """All of them in buckets. Parameters tied by their data are in different ones, in order."""
        buckets: dict[Hashable, list[Site]] = {}
        places: dict[Hashable, set[tuple[int, int]]] = {}
        for i, site in enumerate(self):
            own, name = site.param, cast("Hashable", i)
            if dispatch.launches(own) and own.is_contiguous():
                alike = (type(site.direction), site.direction.kin, site.virtual, site.copied)
                numbers = (id(site.group), site.rounding, site.zo_eps)
                turn, kind = 0, (*alike, *numbers, own.dtype, own.device)
                while (place_of(own), turn) in places.setdefault(kind, set()):
                    turn += 1
                places[kind].add((place_of(own), turn))
                name = (*kind, turn)
            buckets.setdefault(name, []).append(site)
        return [Bucket(tuple(own), dispatch.launches(own[0].param)) for own in buckets.values()]

    def kin(self, buckets: Sequence[Bucket]) -> tuple[Lasting, list[int]]:
        """The directions of buckets, and the ids of their parameters."""
        known: dict[Any, tuple[Lasting, list[int]]] = self.__dict__.setdefault("_kin", {})
        name = tuple(buckets)
        if name not in known:
            sites = [site for bucket in buckets for site in bucket.sites]
            known[name] = Lasting([s.direction for s in sites]), [id(s.param) for s in sites]
        return known[name]

    @functools.cached_property
    def in_place(self) -> list[Bucket]:
        """Those whose parameters move in place."""
        return [bucket for bucket in self.buckets if bucket.first.in_place]

    @functools.cached_property
    def copied(self) -> list[Site]:
        """Those whose parameters move from copies."""
        return [site for site in self if site.copied]

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
    def devices(self) -> frozenset[torch.device]:
        """Where the parameters are."""
        return frozenset(site.param.device for site in self)

    @property
    def lasting(self) -> bool:
        """Whether the next step has the same directions if nothing else changes."""
        return all(site.direction.lasting for site in self)
