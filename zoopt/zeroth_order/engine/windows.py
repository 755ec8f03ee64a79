"""Makes the temporaries of several parameters in one launch, in the order of their reads.

A virtual perturbation gives each operator a temporary theta + a z. On a GPU, one launch for each
parameter can cost more than the forward pass. The order of the reads is therefore recorded. When a
parameter is read, the temporaries of those that follow it are made too, as views of one buffer. The
views are freed with their operators, and the buffer with its last view. An unexpected order only
costs another launch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from zoopt.ambient import OwnArithmetic
from zoopt.kernels.batch import Batch
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.sites import Displacement, Site, Sites

#: The size of a buffer, unless one parameter is larger.
WINDOW_BYTES = 64 << 20


class Moves:
    """Where parameters stand during an evaluation: those of a param group alike.

    Attributes:
        all: the sites of the probe.
        sites: those that windows serve: each of them moves.
        groups: id of a param group -> its displacement.
    """

    def __init__(self, sites: Sites, displacement: Displacement) -> None:
        self.all = sites
        self.groups = {number: displacement(site) for number, site in sites.groups.items()}
        self.sites = sites.windowed
        if not all(self.groups.values()):
            moving = {number for number, own in self.groups.items() if own}
            self.sites = {n: site for n, site in self.sites.items() if id(site.group) in moving}

    def of(self, site: Site) -> Coefficients:
        """The displacement of a parameter that windows serve."""
        return self.groups[id(site.group)]


class Window(NamedTuple):
    """Parameters whose temporaries share a buffer and a launch.

    Attributes:
        ids: the parameters' ids.
        batch: the parameters, with their noise.
        directions: their directions.
        groups: the ids of their param groups.
        sites: the sites of the probe that it was made in.
        places: the parameters' addresses.
    """

    ids: list[int]
    batch: Batch
    directions: list[Direction]
    groups: frozenset[int]
    sites: Sites
    places: list[int]


class Windows:
    """The order in which parameters are read, kept between evaluations.

    Attributes:
        order: the reads of the last evaluation, in order.
    """

    def __init__(self) -> None:
        self.order: list[Tensor] = []
        self._windows: dict[tuple[int, int], Window] = {}

    def learn(self, order: list[Tensor]) -> None:
        """Remember the order of a finished evaluation."""
        if list(map(id, order)) != list(map(id, self.order)):
            self.order = order
            self._windows.clear()

    def find(self, param: Tensor, position: int, moves: Moves) -> Window:
        """The window of the parameter and those after it that fit in a buffer and can share a
        launch. It is reused while its parameters are displaced alike and stay where they are."""
        name = (id(param), position)
        known = self._windows.get(name)
        if known is None or not _still(known, moves):
            known = self._windows[name] = self._made(param, position, moves)
        return known

    def _made(self, param: Tensor, position: int, moves: Moves) -> Window:
        first = moves.sites[id(param)]
        own, form = moves.of(first), _form(first, moves.of(first))
        chosen, room = [first], WINDOW_BYTES - param.nbytes
        places = {param.data_ptr()}
        for other in self.order[position + 1 :]:
            room -= other.nbytes
            site = moves.sites.get(id(other))
            if room < 0 or site is None or moves.of(site) != own or _form(site, own) != form:
                break
            if other.data_ptr() in places:  # The same one again, or one that is tied by its data.
                break
            if other.numel():
                places.add(other.data_ptr())
            chosen.append(site)
        params = [site.param for site in chosen]
        directions = [site.direction for site in chosen]
        return Window(
            [id(other) for other in params],
            directions[0].window([(site.param, site.direction) for site in chosen]),
            directions,
            frozenset(id(site.group) for site in chosen),
            moves.all,
            [other.data_ptr() for other in params],
        )


def _form(site: Site, coefficients: Coefficients) -> tuple[object, ...]:
    """What is the same of all parameters of a launch."""
    return (site.param.dtype, site.param.device, *site.direction.form(coefficients))


def _still(window: Window, moves: Moves) -> bool:
    """Whether a window's parameters are as they were, and still move alike."""
    if window.sites is not moves.all:
        return False
    first, *others = [moves.groups[number] for number in window.groups]
    places = list(map(Tensor.data_ptr, window.batch.tensors))
    return window.places == places and all(other == first for other in others)


class Reads:
    """The reads of one evaluation.

    Args:
        windows: holds the expected order.
        moves: where the parameters stand.
        decay: 1 for theta + sum_d coefficients[d] z(d), or 0 for the sum alone.
    """

    def __init__(self, windows: Windows, moves: Moves, decay: float = 1.0) -> None:
        self._windows = windows
        self._moves, self._decay = moves, decay
        self._made: dict[int, Tensor] = {}
        self._next = 0
        self.order: list[Tensor] = []

    @property
    def serves(self) -> Collection[int]:
        """The ids of the parameters whose temporaries can be taken here."""
        return self._moves.sites

    def learn(self) -> None:
        """The evaluation is over: remember its order for the next one."""
        if self._moves.sites:
            self._windows.learn(self.order)

    def take(self, param: Tensor) -> Tensor:
        """The parameter's temporary."""
        self.order.append(param)
        made = self._made.pop(id(param), None)
        if made is None:
            return self._make(param)
        self._next += 1
        return made

    @OwnArithmetic()
    def _make(self, param: Tensor) -> Tensor:
        self._made.clear()  # Free the old buffer before the next one is made.
        position = self._position(param)
        self._next = position + 1
        window = self._windows.find(param, position, self._moves)
        coefficients = self._moves.of(self._moves.sites[id(param)])
        first = window.directions[0]
        copies = first.copies(window.batch, window.directions, coefficients, decay=self._decay)
        self._made = dict(zip(window.ids, copies, strict=True))
        return self._made.pop(id(param))

    def _position(self, param: Tensor) -> int:
        """The parameter's position in the order. The expected next position is preferred;
        len(order) if it is not in the order."""
        order = self._windows.order
        if self._next < len(order) and order[self._next] is param:
            return self._next
        places = (i for i, other in enumerate(order) if other is param)
        return next(places, len(order))
