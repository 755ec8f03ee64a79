"""Makes the temporaries of several parameters in one launch, in the order of their reads.

A virtual perturbation gives each operator a temporary theta + a z. On a GPU, one launch for each
parameter can cost more than the forward pass. The order of the reads is therefore recorded. When a
parameter is read, the temporaries of those that follow it are made too, as views of one buffer. The
views are freed with their operators, and the buffer with its last view. An unexpected order only
costs another launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from zoopt.ambient import OwnArithmetic
from zoopt.kernels.batch import Batch
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.op import perturbed_copies

#: The size of a buffer, unless one parameter is larger.
WINDOW_BYTES = 64 << 20


class Move(NamedTuple):
    """A displacement alpha z(draw) of a parameter along its noise."""

    key: NoiseKey
    draw: int
    alpha: float

    def shares(self, other: Move) -> bool:
        """Whether one launch can make both."""
        own, key = self.key, other.key
        return (self.draw, self.alpha, own.seed, own.distribution, own.density) == (
            *(other.draw, other.alpha, key.seed, key.distribution, key.density),
        )


class Window(NamedTuple):
    """Parameters whose temporaries share a buffer and a launch."""

    ids: list[int]
    batch: Batch


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
        if len(order) != len(self.order) or any(
            own is not other for own, other in zip(order, self.order, strict=True)
        ):
            self.order = order
            self._windows.clear()

    def find(self, param: Tensor, position: int, moves: Mapping[int, Move]) -> Window:
        """The window of the parameter and those after it that fit in a buffer and can share a
        launch. It is reused while its parameters are displaced along the same noise."""
        name = (id(param), position)
        known = self._windows.get(name)
        if known is None or not _still(known, moves, moves[id(param)]):
            known = self._windows[name] = self._made(param, position, moves)
        return known

    def _made(self, param: Tensor, position: int, moves: Mapping[int, Move]) -> Window:
        first = moves[id(param)]
        params, keys, room = [param], [first.key], WINDOW_BYTES - param.nbytes
        places = {param.data_ptr()}
        for other in self.order[position + 1 :]:
            room -= other.nbytes
            move = moves.get(id(other))
            if room < 0 or not _alike(other, param) or move is None or not move.shares(first):
                break
            if other.data_ptr() in places:  # The same one again, or one that is tied by its data.
                break
            if other.numel():
                places.add(other.data_ptr())
            params.append(other)
            keys.append(move.key)
        return Window(list(map(id, params)), Batch(params, keys))


def _alike(param: Tensor, other: Tensor) -> bool:
    return param.dtype == other.dtype and param.device == other.device


def _still(window: Window, moves: Mapping[int, Move], first: Move) -> bool:
    """Whether all parameters of a window still move like the first one, along the same keys, and
    can share its buffer and its launch."""
    tensors = window.batch.tensors
    shared, room, places = len(tensors) > 1, WINDOW_BYTES, set[int]()
    dtype, device = tensors[0].dtype, tensors[0].device
    # A plain loop: this runs at every operator, and generators would double its calls.
    for number, key, param in zip(window.ids, window.batch.keys, tensors, strict=True):
        move = moves.get(number)
        if move is None or move[1:] != first[1:] or move.key != key:
            return False
        if shared:
            place, room = param.data_ptr(), room - param.nbytes
            tied = place in places and param.numel() > 0
            if tied or room < 0 or param.dtype != dtype or param.device != device:
                return False
            places.add(place)
    return True


class Reads:
    """The reads of one evaluation.

    Args:
        windows: holds the expected order.
        moves: id of a parameter -> its displacement. Only contiguous parameters are in it.
    """

    def __init__(self, windows: Windows, moves: Mapping[int, Move]) -> None:
        self._windows = windows
        self._moves = moves
        self._made: dict[int, Tensor] = {}
        self._next = 0
        self.order: list[Tensor] = []

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
        ids, batch = self._windows.find(param, position, self._moves)
        first = self._moves[id(param)]
        copies = perturbed_copies(batch, first.alpha, draw=first.draw)
        self._made = dict(zip(ids, copies, strict=True))
        return self._made.pop(id(param))

    def _position(self, param: Tensor) -> int:
        """The parameter's position in the order. The expected next position is preferred;
        len(order) if it is not in the order."""
        order = self._windows.order
        if self._next < len(order) and order[self._next] is param:
            return self._next
        places = (i for i, other in enumerate(order) if other is param)
        return next(places, len(order))
