"""Passes over many parameters that are made together: on a GPU one launch for all that are alike.

Updates and moves are written for one parameter. On a device on which an operation is a launch, they
are queued here, and made as batches once all have been requested. For a bucket of parameters only
the first pass is written. Its requests are then made for the whole bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zoopt.kernels import adam_window_, apply_, dispatch, momentum_
from zoopt.kernels.descent.op import curve_, descend_, turn_
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.places import place_of
from zoopt.zeroth_order.engine.parts import Part, Request, parts_of
from zoopt.zeroth_order.engine.progress import BucketProgress, Progress
from zoopt.zeroth_order.engine.sites import Bucket, Site

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "apply": apply_,
    "momentum": momentum_,
    "adam_window": adam_window_,
    "descend": descend_,
    "curve": curve_,
    "turn": turn_,
}


class _Alike:
    """Parameters for which the same operation, with the same numbers, is requested."""

    def __init__(self, request: Request) -> None:
        operation = request.operation
        self._operation = _OPERATIONS[operation] if isinstance(operation, str) else operation
        self._options = request.options
        self._parts: list[Part] = []
        self._single = Part()
        self._progress: list[Progress] = []

    def has(self, places: set[int]) -> bool:
        """Whether one of the addresses is that of a parameter here."""
        return not all(map(places.isdisjoint, (p.places for p in (*self._parts, self._single))))

    def add(self, request: Request, part: Part | None) -> None:
        """Add the parameters of a part, which is kept between steps, or a single one."""
        if part is None:
            self._single.append(request)
        else:
            self._parts.append(part)
        self._progress.append(request.progress)

    def make(self) -> None:
        """Do the operation on all of them."""
        first, *others = [*self._parts, *([self._single] if len(self._single) else [])]
        first.with_others(others).make(self._operation, self._options)
        for progress in self._progress:
            progress.finish()


class Passes:
    """A queue of operations, each on one parameter, that change nothing until `make`."""

    #: What the parameter whose pass is being written asks for, while that is only noted.
    _noted: list[Request] | None = None
    #: Whether a piece of its pass has been written without the queue.
    _apart = False

    def __init__(self) -> None:
        self._queue: dict[tuple[int, Hashable, int], _Alike] = {}

    def put(
        self,
        operation: str | Callable[..., Any],
        theta: Tensor,
        key: NoiseKey,
        progress: Progress,
        *,
        indices: Tensor | None = None,
        beside: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> bool:
        """Queue an operation on a parameter, unless it has to be done now, by itself.

        Args:
            operation: a key of `_OPERATIONS`, or a function on a batch.
            progress: that of the pass, which ends when the queue is made.
            indices: the elements on which the operation works; None for all.
            beside: what else belongs to the parameter, by the operation's names: tensors with as
                many elements, or other objects for a function that expects them.
            options: its other arguments.

        Returns:
            Whether it is queued, or has already been done.
        """
        if not (dispatch.launches(theta) and theta.is_contiguous()):
            return False
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        request = Request(operation, theta, key, progress, indices, beside or {}, options)
        if self._noted is not None:
            self._noted.append(request)
        else:
            self._add(request)
        return True

    def put_bucket(
        self,
        bucket: Bucket,
        progress: BucketProgress,
        run: Callable[[Site, Progress], None],
        alike: bool,
    ) -> None:
        """Write the passes of a bucket's parameters.

        Args:
            progress: that of each parameter; where the parameters are alike, the first one's is
                that of all.
            run: writes one parameter's pass.
            alike: whether `run` asks for the same, with the same numbers, of all of them.
        """
        if len(bucket.sites) == 1:
            run(bucket.first, progress[0])
            return
        own = self._note(run, bucket.first, progress[0])
        parts = None
        if alike and own and not self._apart and not bucket.moved:
            parts = self._parts(bucket, own, progress, run)
        if parts is not None:
            progress.together = True
            for request, part in zip(own, parts, strict=True):
                self._add(request, part)
            return
        progress.part()
        for request in own:
            self._add(request)
        for site, others in progress.others():
            run(site, others)

    def _parts(
        self,
        bucket: Bucket,
        own: Sequence[Request],
        progress: BucketProgress,
        run: Callable[[Site, Progress], None],
    ) -> Sequence[Part] | None:
        """The whole bucket, for each operation that its first parameter requests; None if others
        request something else."""
        form = tuple([request.form for request in own])
        parts: list[Part] | None = bucket.kept.get(form)
        if parts is not None and all(map(Part.fits, parts, own)):
            return parts
        noted = [own, *(self._note(run, *each) for each in progress.others())]
        parts = parts_of(noted)
        if parts is not None:
            bucket.kept[form] = parts
        return parts

    def _note(
        self, run: Callable[[Site, Progress], None], site: Site, progress: Progress
    ) -> list[Request]:
        """What a parameter's pass asks for of the queue."""
        noted: list[Request] = []
        self._noted, self._apart = noted, False
        try:
            run(site, progress)
            return noted
        finally:
            self._noted = None

    def _add(self, request: Request, part: Part | None = None) -> None:
        """Queue an operation on a parameter, or on all of a part, unless it has been done."""
        progress = request.progress
        if progress.done:
            return
        what, turn = request.what, 0
        places = {place_of(request.theta)} if part is None else part.places
        # Parameters tied by their data are written one after the other.
        while (alike := self._queue.get((progress.stage, what, turn))) and alike.has(places):
            turn += 1
        if alike is None:
            alike = self._queue[progress.stage, what, turn] = _Alike(request)
        alike.add(request, part)

    def takes(self, theta: Tensor) -> bool:
        """Whether operations on the parameter are worth a place in the queue."""
        return dispatch.launches(theta)

    def made_apart(self) -> None:
        """A piece of a pass is about to be written without the queue."""
        self._apart = True

    def make(self) -> None:
        """Do what is queued, one batch for all that are alike; operations on one parameter stay in
        order."""
        for name in sorted(self._queue, key=lambda name: name[0]):
            self._queue[name].make()
            del self._queue[name]

    def clear(self) -> None:
        """Forget what is queued."""
        self._queue.clear()
