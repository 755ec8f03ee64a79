"""How far a step has come: a step that an error interrupts goes on when it is taken again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoopt.kernels.journal import Journal

if TYPE_CHECKING:
    from zoopt.first_order.site import Site


class Mark:
    """How far a parameter has come in the step from a gradient.

    Attributes:
        done: whether it has been updated, or is not to be.
    """

    def __init__(self, gradient: Tensor, *, done: bool = False) -> None:
        self._gradient, self._version = weakref.ref(gradient), gradient._version
        self.done = done
        #: Of its preparation, until that is done.
        self._journal: Journal | None = Journal()

    def prepare(self, prepare: Callable[..., bool], *args: Any) -> None:
        """Prepare the parameter, or finish that; if that returns False, it is not updated."""
        if self._journal is not None:
            self.done = not self._journal.run(prepare, *args)
            self._journal = None

    def is_of(self, gradient: Tensor) -> bool:
        """Whether it was made for this gradient, which has not been written since."""
        return self._gradient() is gradient and gradient._version == self._version


class Update:
    """An update of parameters, with its gradients among the arguments, and a journal of it.

    Attributes:
        sites: of the parameters.
        changes_weights: whether it writes the parameters, not only their state.
    """

    def __init__(
        self, sites: Sequence[Site], update: Callable[..., None], args: Any, changes_weights: bool
    ) -> None:
        self.sites, self.changes_weights = sites, changes_weights
        self._update, self._args = update, args
        self._journal = Journal()
        self._states: dict[Tensor, Any] = {}

    @property
    def begun(self) -> bool:
        """Whether it may have written."""
        return self._journal.begun

    def run(self) -> None:
        """Update the parameters, or finish that."""
        self._journal.run(self._update, *self._args)

    def keep_states(self, states: MutableMapping[Tensor, Any]) -> None:
        """Remember the parameters' states, which matrices of a stack have during a step only."""
        self._states = {
            site.param: states[site.param] for site in self.sites if site.param in states
        }

    def finish(self, states: MutableMapping[Tensor, Any]) -> None:
        """Finish it, with the states that it began with."""
        lent = [param for param in self._states if param not in states]
        states.update({param: self._states[param] for param in lent})
        try:
            self.run()
        finally:
            for param in lent:
                del states[param]
