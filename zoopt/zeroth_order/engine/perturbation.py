"""Where the closure sees its parameters: at a displacement from theta, in place or virtually.

Both kinds can hold at once: each parameter's `Site` says which is its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoopt.ambient import OwnArithmetic
from zoopt.interrupts import uninterrupted
from zoopt.kernels import dispatch
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.factors import side_by_side
from zoopt.zeroth_order.engine.passes import Passes
from zoopt.zeroth_order.engine.progress import BucketProgress, Progress, count_write
from zoopt.zeroth_order.engine.sites import Bucket, Displacement, Site, Sites
from zoopt.zeroth_order.engine.uncompiled import uncompiled
from zoopt.zeroth_order.engine.virtual import Interception, Substitution
from zoopt.zeroth_order.engine.windows import Moves, Reads, Windows

PerturbationMode = Literal["auto", "inplace", "virtual"]


class Perturbation:
    """Moves the parameters of a probe from point to point around theta.

    In place, the parameters hold theta + sum_d offset[d] z(d), and one pass leads from one offset
    to the next. The last offset is left to the update, which takes it away in its own pass (three
    passes a step instead of four); `restore` takes it away alone.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        queue: Callable[[], Passes] = Passes,
        windows: Windows | None = None,
    ) -> None:
        self.sites = Sites.of(sites)
        self._queue = queue
        self._windows = windows or Windows()
        #: Whether operators read the parameters where they stand.
        self.evaluated = True
        self._virtual = self.sites.virtual
        self._in_place = self.sites.in_place
        self._copied = self.sites.copied
        self._copies: dict[Tensor, Tensor] = {}
        self._offset: dict[Bucket, Coefficients] = {}
        self._flights: dict[Bucket, _Flight] = {}

    def offset(self, bucket: Bucket) -> Coefficients:
        """By how much the parameters stand off theta."""
        return self._offset.get(bucket, {})

    @contextlib.contextmanager
    def at(self, displacement: Displacement) -> Iterator[None]:
        """Let parameters read as theta plus the displacement.

        Raises:
            RuntimeError: there are virtual parameters, and the closure read none of them.
        """
        self._move(displacement, self._in_place)
        if self.evaluated:
            self._move_copied(displacement)
        if not self._virtual or not self.evaluated:
            yield
            return

        made: dict[int, tuple[Tensor, Tensor]] = {}

        def together(site: Site) -> tuple[Tensor, Tensor] | None:
            """Factors that are made for all matrices when the first one is read."""
            if not site.direction.thin or not dispatch.launches(site.param):
                return None
            if not made:
                made.update(_thin_factors(self.sites, displacement))
            return made[id(site.param)]

        reads = self.reads(displacement)
        in_windows = reads.serves

        @OwnArithmetic()
        def perturbed_alone(param: Tensor) -> Tensor:
            site = self._virtual[id(param)]
            coefficients = displacement(site)
            return site.direction.perturbed(param, coefficients) if coefficients else param

        def either(param: Tensor) -> Tensor:
            return reads.take(param) if id(param) in in_windows else perturbed_alone(param)

        perturbed = reads.take if len(in_windows) == len(self._virtual) else either

        @OwnArithmetic()
        def perturbed_rows(weight: Tensor, rows: Tensor) -> Tensor:
            site = self._virtual[id(weight)]
            coefficients = displacement(site)
            if not coefficients:
                return weight[rows]
            pair = together(site)
            if pair is not None:
                left, right = (factor.to(torch.float32) for factor in (pair[0][rows], pair[1]))
                return (weight[rows] + left @ right.T).to(weight.dtype)
            return site.direction.perturbed_rows(weight, rows, coefficients)

        def factors(weight: Tensor) -> tuple[Tensor, Tensor] | None:
            return made.get(id(weight)) or new_factors(weight)

        @OwnArithmetic()
        def new_factors(weight: Tensor) -> tuple[Tensor, Tensor] | None:
            site = self._virtual[id(weight)]
            coefficients = displacement(site)
            if not coefficients:
                return None
            return together(site) or site.direction.factors(coefficients)

        # At theta itself too: modules take the path that they take at theta + a z.
        thin = factors if self.sites.thin else None
        with self.intercepted(Substitution(self._virtual, perturbed, perturbed_rows, thin, made)):
            yield
        reads.learn()

    def reads(self, displacement: Displacement, *, decay: float = 1.0) -> Reads:
        """Makes temporaries of virtual parameters in windows, during an evaluation."""
        return Reads(self._windows, Moves(self.sites, displacement), decay)

    @contextlib.contextmanager
    def substituted(
        self,
        perturbed: Callable[[Tensor], Tensor],
        perturbed_rows: Callable[[Tensor, Tensor], Tensor],
        factors: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None,
    ) -> Iterator[None]:
        """Let operators read the virtual parameters as the functions say (see `Substitution`).

        Raises:
            RuntimeError: the closure read none of them.
        """
        with self.intercepted(Substitution(self._virtual, perturbed, perturbed_rows, factors)):
            yield

    @contextlib.contextmanager
    def intercepted(self, interception: Interception) -> Iterator[None]:
        """Let operators read parameters as the interception does.

        Raises:
            RuntimeError: the closure read none of them, and none is perturbed in place.
        """
        with uncompiled(), interception:
            yield
        if not interception.read and not self._in_place:
            raise RuntimeError(
                "the closure read none of the optimizer's parameters, so a virtual perturbation "
                "cannot reach it (a compiled or scripted graph, another thread or another copy of "
                "the model); use perturbation='inplace', or call the model itself"
            )

    def restore(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Bring parameters perturbed in place back to theta, these or all."""
        self.put_back()
        self._move(lambda site: {}, self._in_place if buckets is None else buckets)

    def put_back(self) -> None:
        """Bring parameters that move from copies back to theta."""
        for param, theta in self._copies.items():
            param.copy_(theta)
        self._copies = {}

    def forget(self, *buckets: Bucket) -> None:
        """The caller has taken the parameters' offsets away itself."""
        for bucket in buckets:
            self._offset.pop(bucket, None)

    def release(self) -> None:
        """Let the parameters stand where they are; the caller knows of them."""
        self._in_place = []

    @OwnArithmetic()
    def _move_copied(self, displacement: Displacement) -> None:
        """Bring parameters that move from copies to a displacement, rounded once."""
        for site in self._copied:
            if site.param in self._copies:
                site.param.copy_(self._copies[site.param])
            else:
                self._copies[site.param] = site.param.clone()
            site.direction.add_(site.param, displacement(site))

    @OwnArithmetic()
    def _move(self, displacement: Displacement, buckets: Sequence[Bucket]) -> None:
        """Bring parameters perturbed in place to a displacement.

        If that breaks off, the next move continues where this one was.
        """
        with uninterrupted():
            passes = self._queue()
            flying = []
            for bucket in buckets:
                self._land(bucket)
                target = displacement(bucket.first)
                change = {draw: -c for draw, c in self.offset(bucket).items()}
                for draw, c in target.items():
                    change[draw] = change.get(draw, 0.0) + c
                change = {draw: c for draw, c in change.items() if c}
                if change:
                    flight = _Flight(change, target, BucketProgress(bucket.sites, passes))
                    self._flights[bucket] = flight
                    passes.put_bucket(bucket, flight.progress, flight.move, True)
                    if bucket.launching:
                        flying.append(bucket)
                    else:
                        self._arrive(bucket)
                else:
                    self._offset[bucket] = target
            passes.make()
            for bucket in flying:
                self._arrive(bucket)

    def _land(self, bucket: Bucket) -> None:
        """Finish the move that the parameters are in."""
        flight = self._flights.get(bucket)
        if flight is not None:
            flight.progress.finish(flight.move)
            self._arrive(bucket)

    def _arrive(self, bucket: Bucket) -> None:
        """The parameters' move, if they are in one, has been made."""
        flight = self._flights.get(bucket)
        if flight is not None:
            count_write(*bucket.params)
            self._offset[bucket] = flight.target
            del self._flights[bucket]


def _thin_factors(sites: Sites, displacement: Displacement) -> dict[int, tuple[Tensor, Tensor]]:
    """L (m, k) and R (n, k) of each matrix whose displacement is L R^T, in its dtype, by its id:
    made together for those of one class and displacement."""
    alike: dict[Any, list[Bucket]] = {}
    for bucket in sites.buckets:
        site = bucket.first
        if bucket.launching and site.virtual and site.direction.thin:
            coefficients = tuple(displacement(site).items())
            name = (type(site.direction), coefficients, site.param.dtype, site.param.device)
            alike.setdefault(name, []).append(bucket)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for (kind, coefficients, dtype, _), buckets in alike.items():
        kin, ids = sites.kin(buckets)
        left, right = kind.pairs_together(kin, dict(coefficients), dtype)
        pairs = zip(map(side_by_side, left), map(side_by_side, right), strict=True)
        found.update(zip(ids, pairs, strict=True))
    return found


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A move of a bucket: noted before it begins, so that it can be finished."""

    change: Coefficients
    target: Coefficients
    progress: BucketProgress

    def move(self, site: Site, progress: Progress) -> None:
        """Make the move of one parameter, or queue it."""
        site.direction.add_(site.param, self.change, progress=progress)
