"""Where the closure sees its parameters: at a displacement from theta, in place or virtually.

Both kinds can hold at once: each parameter's `Slot` says which is its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from torch import Tensor

from zoopt.ambient import OwnArithmetic
from zoopt.dtypes import Rounding
from zoopt.kernels import dispatch
from zoopt.optimizer import Group
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.passes import Passes
from zoopt.zeroth_order.engine.progress import Progress, count_write, uninterrupted
from zoopt.zeroth_order.engine.uncompiled import uncompiled
from zoopt.zeroth_order.engine.virtual import Interception, Substitution

PerturbationMode = Literal["auto", "inplace", "virtual"]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter that takes part in a probe."""

    param: Tensor
    group: Group
    direction: Direction
    virtual: bool
    rounding: Rounding
    zo_eps: float


#: Where each parameter is to stand, relative to theta.
Displacement = Callable[[Slot], Coefficients]


def along(draw: int, scale: float) -> Displacement:
    """The displacement scale zo_eps z(draw)."""
    return lambda slot: {draw: scale * slot.zo_eps} if scale else {}


class Perturbation:
    """Moves the parameters of a probe from point to point around theta.

    In place, the parameters hold theta + sum_d offset[d] z(d), and one pass leads from one offset
    to the next. The last offset is left to the update, which takes it away in its own pass (three
    passes a step instead of four); `restore` takes it away alone.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        #: Whether operators read the parameters where they stand.
        self.evaluated = True
        self._virtual = {slot.param: slot for slot in slots if slot.virtual}
        self._in_place = [slot for slot in slots if not slot.virtual]
        self._offset: dict[Tensor, Coefficients] = {}
        self._flights: dict[Tensor, _Flight] = {}

    def offset(self, slot: Slot) -> Coefficients:
        """By how much the parameter stands off theta."""
        return self._offset.get(slot.param, {})

    @contextlib.contextmanager
    def at(self, displacement: Displacement) -> Iterator[None]:
        """Let parameters read as theta plus the displacement.

        Raises:
            RuntimeError: there are virtual parameters, and the closure read none of them.
        """
        self._move(displacement, self._in_place)
        if not self._virtual or not self.evaluated:
            yield
            return

        @OwnArithmetic()
        def perturbed(param: Tensor) -> Tensor:
            slot = self._virtual[param]
            coefficients = displacement(slot)
            return slot.direction.perturbed(param, coefficients) if coefficients else param

        @OwnArithmetic()
        def perturbed_rows(weight: Tensor, rows: Tensor) -> Tensor:
            slot = self._virtual[weight]
            coefficients = displacement(slot)
            if not coefficients:
                return weight[rows]
            return slot.direction.perturbed_rows(weight, rows, coefficients)

        @OwnArithmetic()
        def factors(weight: Tensor) -> tuple[Tensor, Tensor] | None:
            slot = self._virtual[weight]
            coefficients = displacement(slot)
            return slot.direction.factors(coefficients) if coefficients else None

        # At theta itself too: modules take the path that they take at theta + a z.
        with self.substituted(perturbed, perturbed_rows, factors):
            yield

    @contextlib.contextmanager
    def substituted(
        self,
        perturbed: Callable[[Tensor], Tensor],
        perturbed_rows: Callable[[Tensor, Tensor], Tensor],
        factors: Callable[[Tensor], tuple[Tensor, Tensor] | None],
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

    def restore(self, slots: Sequence[Slot] | None = None) -> None:
        """Bring parameters perturbed in place back to theta, these or all."""
        self._move(lambda slot: {}, self._in_place if slots is None else slots)

    def forget(self, slot: Slot) -> None:
        """The caller has taken the parameter's offset away itself."""
        self._offset.pop(slot.param, None)

    def release(self) -> None:
        """Let the parameters stand where they are; the caller knows of them."""
        self._in_place = []

    @OwnArithmetic()
    def _move(self, displacement: Displacement, slots: Sequence[Slot]) -> None:
        """Bring parameters perturbed in place to a displacement.

        If that breaks off, the next move goes on where this one was.
        """
        with uninterrupted():
            passes = Passes()
            flying = []
            for slot in slots:
                self._land(slot)
                target = displacement(slot)
                change = {draw: -c for draw, c in self.offset(slot).items()}
                for draw, c in target.items():
                    change[draw] = change.get(draw, 0.0) + c
                change = {draw: c for draw, c in change.items() if c}
                if change:
                    self._flights[slot.param] = _Flight(change, target, Progress(passes))
                    self._fly(slot)
                    flying.append(slot)
                    if not dispatch.launches(slot.param):
                        self._arrive(slot)
                else:
                    self._offset[slot.param] = target
            passes.make()
            for slot in flying:
                self._arrive(slot)

    def _fly(self, slot: Slot) -> None:
        """Make the parameter's move, or queue it."""
        flight = self._flights[slot.param]
        slot.direction.add_(slot.param, flight.change, progress=flight.progress)

    def _land(self, slot: Slot) -> None:
        """Finish the move that the parameter is in."""
        flight = self._flights.get(slot.param)
        if flight is None:
            return
        flight.progress.passes = None
        self._fly(slot)
        self._arrive(slot)

    def _arrive(self, slot: Slot) -> None:
        """The parameter's move, if it is in one, has been made."""
        flight = self._flights.get(slot.param)
        if flight is not None:
            count_write(slot.param)
            self._offset[slot.param] = flight.target
            del self._flights[slot.param]


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A move of one parameter: noted before it begins, so that it can be finished."""

    change: Coefficients
    target: Coefficients
    progress: Progress
