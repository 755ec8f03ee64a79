"""A run once more, from its record: the same weights, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from zoopt.distributed.seed import alone
from zoopt.kernels import Write
from zoopt.parameters import named_params
from zoopt.trajectory.format import Contents, Event, TrajectoryError, read, steps_of
from zoopt.trajectory.format import Kind as EventKind
from zoopt.trajectory.header import fingerprint, from_json, rebuild
from zoopt.trajectory.recorder import Recorder
from zoopt.trajectory.script import Kind, NotScriptedError, Scripted
from zoopt.warn import warn
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.closure import RecordedLosses
from zoopt.zeroth_order.evolution import EvolutionStrategy

#: Steps that are one pass over the weights.
_STEPS = 128


@alone()
def replay(
    model: Any,
    path: str | Path,
    *,
    until: int | None = None,
    exact: bool = True,
    check_base: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ZerothOrderOptimizer:
    """Take a recorded run's steps on the weights that it began from.

    Every write of the run is made again, rounded as it was, so the weights and the optimizer's
    state are those of the run after the last step, to the bit. The model is not evaluated.

    Where a step writes nothing but sums of directions, signs of them or moments made of a window
    of them, and nothing is stored beside the weights, 128 steps are one pass over the weights:
    `MeZO` and `FZOO` without momentum or with a window, `ZOAdam(state="window")` and `"scalar"`,
    `ZOSignSGD`, `ZOConservativeSGD` and `EvolutionStrategy` without a rank, with any mask but
    `"magnitude"`. Elsewhere each step takes its passes: in place one for each evaluation and one
    for the update, virtually the update's alone.

    Args:
        model: a module, or anything with `named_parameters()`, which holds the base weights; they
            are trained in place.
        path: the file.
        until: how many steps to take; default all that are whole.
        exact: make each write, rounded as it was. Without, the closed form

                theta_T = prod_t(1 - lr_t weight_decay) theta_0 + sum_j c_j z_j

            in one pass over the weights (one more for each change of a group between steps): equal
            up to rounding, of which it has less. Steps that are signs or Adam's are no such sum.
        check_base: raise unless the weights are those the run began from, by their hash. Without,
            the run's updates are applied to other weights: a fine-tune moved to another release of
            its base.
        progress: called after each step with its number and their count; weights may follow later.

    Returns:
        The optimizer after these steps.

    Raises:
        TrajectoryError: the file is damaged, of an unknown version, or of another model; or the
            weights are others. Nothing has changed then.
        ValueError: until is more than there are steps, or exact=False and no closed form.
    """
    contents = read(path)
    steps = list(steps_of(contents.events))
    check_until(contents, path, until)
    optimizer = rebuild(contents.header, model)
    params = [param for _, _, param, _ in named_params(optimizer.param_groups)]
    if check_base and fingerprint(params) != contents.header["base"]:
        raise TrajectoryError(
            f"the model's weights are not those that {path} begins from; load these, or pass "
            f"check_base=False to apply the run to others"
        )
    _report_torn(contents, path)
    last = len(steps) if until is None else until
    _Steps(optimizer, exact=exact).take(steps[:last], progress)
    return optimizer


def check_until(contents: Contents, path: str | Path, until: int | None) -> None:
    """Raise unless it is a step of the run, or None."""
    if until is not None and (type(until) is not int or not 0 <= until <= contents.steps):
        raise ValueError(
            f"until must be in [0, {contents.steps}], the steps of {path}, got {until!r}"
        )


def script_of(
    optimizer: ZerothOrderOptimizer, steps: Sequence[list[Event]], since: int
) -> list[tuple[Kind, list[Write]]]:
    """The closed form of a run from a step on, in order; no weights are touched.

    Raises:
        ValueError: it has none.
    """
    taking = _Steps(optimizer, exact=False)
    taking.go(steps[:since])
    taking.waiting.clear()
    taking.go(steps[since:])
    return taking.waiting


class _Steps:
    """Takes recorded steps: by a script, as many at a time as can be, or one by one."""

    def __init__(self, optimizer: ZerothOrderOptimizer, *, exact: bool) -> None:
        self._optimizer, self._exact = optimizer, exact
        #: What is to be made of the weights, where they wait for the end.
        self.waiting: list[tuple[Kind, list[Write]]] = []
        self._script()

    def take(
        self, steps: Sequence[list[Event]], progress: Callable[[int, int], None] | None
    ) -> None:
        """Take the steps, of which each is the events that led to it, and itself."""
        self.go(steps, progress)
        for kind, writes in self.waiting:
            kind.make(writes)

    def go(
        self,
        steps: Sequence[list[Event]],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """As `take`, but for what waits."""
        for number, events in enumerate(steps, 1):
            events = list(events)
            while events[0].kind is EventKind.CHANGE:
                self._settle()
                _again(self._optimizer, events.pop(0))
                self._script()
            alone = any(event.kind is EventKind.CHANGE for event in events)
            self._one(events, alone=alone)
            if self._exact and number % _STEPS == 0:
                self._settle()
            if progress is not None:
                progress(number, len(steps))
        self._settle()

    def _one(self, events: list[Event], *, alone: bool) -> None:
        """A step; `alone`: groups change while probes are pending."""
        if self._scripted is None or alone:
            if not self._exact:
                self._refuse()
            self._settle()
            for event in events:
                _again(self._optimizer, event)
            self._script()
            return
        for event in events:
            _again(self._scripted.stand_in, event)

    def _script(self) -> None:
        """Find what takes the steps without the weights, if anything can."""
        try:
            self._scripted: Scripted | None = Scripted(self._optimizer)
        except NotScriptedError:
            self._scripted = None

    def _settle(self) -> None:
        """Bring the optimizer to where its stand-in is, and its weights, unless they wait."""
        if self._scripted is None:
            return
        try:
            made = self._scripted.settled(exact=self._exact)
        except NotScriptedError:
            self._refuse()
        if self._exact:
            for kind, writes in made:
                kind.make(writes)
        else:
            self.waiting += made

    def _refuse(self) -> NoReturn:
        name = type(self._optimizer).__name__
        raise ValueError(
            f"exact must be True for this run of {name}, got False: a closed form is a sum of "
            f"directions that losses weigh, and its steps are none"
        )


def resume(
    model: Any, path: str | Path, *, check_base: bool = True, sync_every: float = 1.0
) -> ZerothOrderOptimizer:
    """`replay`, and go on recording to the same file.

    A process that was killed goes on where it was: what it had not finished of a step is lost, and
    nothing else. A record that was cut off is removed.

    Raises:
        TrajectoryError: as for `replay`, or another process writes to the file.
    """
    optimizer = replay(model, path, check_base=check_base)
    optimizer.recorder = Recorder.going_on(optimizer, path, sync_every=sync_every)
    return optimizer


def _report_torn(contents: Contents, path: str | Path) -> None:
    if contents.torn:
        warn(
            f"{path} ends with {contents.torn} bytes of a record that was cut off; the steps "
            f"before it, {contents.steps}, are whole"
        )


def _again(optimizer: ZerothOrderOptimizer, event: Event) -> None:
    """Do what was recorded."""
    if event.kind is EventKind.CHANGE:
        for number, values in event.change.get("groups", {}).items():
            optimizer.param_groups[int(number)].update(
                {key: from_json(value) for key, value in values.items()}
            )
        trained = event.change.get("trained")
        if trained is not None:
            params = [param for _, _, param, _ in named_params(optimizer.param_groups)]
            for param, requires_grad in zip(params, trained, strict=True):
                param.requires_grad_(requires_grad)
        return
    for group, rate in zip(optimizer.param_groups, event.rates, strict=False):
        group["lr"] = rate
    losses = RecordedLosses(event.losses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of losses that are not finite: the run has had these.
        try:
            if event.kind in (EventKind.STEP, EventKind.FAILED):
                optimizer.step(losses)
            elif event.kind is EventKind.PROBE:
                optimizer.probe(losses)
            elif event.kind is EventKind.APPLY:
                optimizer.step()
            elif event.kind is EventKind.TOLD and isinstance(optimizer, EvolutionStrategy):
                optimizer.update([losses() for _ in event.losses])
            else:
                optimizer.zero_grad()
        except EOFError as error:
            if event.kind is not EventKind.FAILED:
                raise TrajectoryError(f"the file is not of this optimizer: {error}") from None
    if losses.rest:
        raise TrajectoryError(
            f"the file is not of this optimizer: a step has taken fewer than its "
            f"{len(event.losses)} losses"
        )
