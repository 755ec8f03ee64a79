"""Replays a recorded run: the same weights, bit for bit."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from zoopt.ambient import OwnArithmetic
from zoopt.checks import check_number
from zoopt.distributed.seed import alone
from zoopt.interrupts import uninterrupted
from zoopt.kernels import Write
from zoopt.parameters import named_params
from zoopt.trajectory.files import locked
from zoopt.trajectory.format import Contents, Event, TrajectoryError, read, steps_of
from zoopt.trajectory.format import Kind as EventKind
from zoopt.trajectory.header import fingerprint, from_json, params_of, rebuild
from zoopt.trajectory.recorder import Recorder
from zoopt.trajectory.script import Kind, NotScriptedError, Scripted
from zoopt.warn import warn
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.closure import RecordedLosses
from zoopt.zeroth_order.evolution import EvolutionStrategy

#: How many steps one pass over the weights applies.
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
    """Take a recorded run's steps on the weights that it started from.

    Every write of the run is repeated with the same rounding. The weights and the optimizer's state
    are therefore bit for bit those after the run's last step. The model is not evaluated.

    For some methods one pass over the weights applies 128 steps. These are methods whose steps are
    sums of directions, signs of such sums, or moments computed from a window of directions, and
    that keep nothing beside the weights but a momentum buffer: `MeZO` and `FZOO` (on a GPU without
    momentum or with a window), `ZOAdam(state="window")` and `"scalar"`, `ZOSignSGD`,
    `ZOConservativeSGD` and `EvolutionStrategy` without a rank, with any mask but `"magnitude"`. For
    all others each step needs its own passes: one for each evaluation and one for the update with
    in-place perturbation, only that of the update with virtual perturbation.

    Args:
        model: a module, or any object with `named_parameters()`, that holds the base weights. They
            are changed in place.
        path: the file.
        until: how many steps to take; default: all complete ones.
        exact: repeat each write with its rounding. If False, apply the closed form

                theta_T = prod_t(1 - lr_t weight_decay) theta_0 + sum_j c_j z_j

            in one pass over the weights (one more for each change of a group between steps). The
            result is equal up to rounding, and has less rounding error. Sign steps and Adam steps
            have no closed form.
        check_base: raise unless the weights have the hash of those the run started from, and after
            its last step the hash with which a closed recorder has ended the file. If False, the
            run's updates may be applied to other weights, for example to move a fine-tune to
            another release of its base.
        progress: called after each step with its number and the number of steps. The weights may
            be written later than that.

    Returns:
        The optimizer after these steps.

    Raises:
        TrajectoryError: the file is damaged, of an unknown version, or of another model; or the
            weights are not the base. The model is then unchanged. Or the weights after the last
            step are not those that the run has ended with.
        ValueError: until is greater than the number of steps; or exact=False, and the run has no
            closed form.
    """
    contents = read(path)
    steps = list(steps_of(contents.events))
    check_until(contents, path, until)
    params = params_of(contents.header, model)
    if check_base and fingerprint(params) != contents.header["base"]:
        raise TrajectoryError(
            f"the model's weights are not those that {path} begins from; load these, or pass "
            f"check_base=False to apply the run to others"
        )
    optimizer = rebuild(contents.header, model)
    _report_torn(contents, path)
    last = len(steps) if until is None else until
    _Steps(optimizer, exact=exact).take(steps[:last], progress)
    known = contents.trained if exact and check_base and last == len(steps) else None
    if known is not None and fingerprint(params) != known:
        raise TrajectoryError(
            f"the weights after step {last} are not those that {path} has ended with, got others: "
            f"something else than the optimizer has written to the run's weights, through "
            f"param.data say; or, in a low-rank run, this machine rounds products in another way. "
            f"Pass check_base=False for the weights that the steps alone make"
        )
    return optimizer


def check_until(contents: Contents, path: str | Path, until: int | None) -> None:
    """Raise unless `until` is a step of the run or None."""
    if until is not None and (type(until) is not int or not 0 <= until <= contents.steps):
        raise ValueError(
            f"until must be in [0, {contents.steps}], the steps of {path}, got {until!r}"
        )


def script_of(
    optimizer: ZerothOrderOptimizer, steps: Sequence[list[Event]], since: int
) -> list[tuple[Kind, list[Write]]]:
    """The closed form of a run's steps after `since`, in order. No weights are touched.

    Raises:
        ValueError: the run has no closed form.
    """
    taking = _Steps(optimizer, exact=False)
    taking.go(steps[:since])
    taking.waiting.clear()
    taking.go(steps[since:])
    return taking.waiting


class _Steps:
    """Takes recorded steps: many at a time through a script if possible, otherwise one by one."""

    def __init__(self, optimizer: ZerothOrderOptimizer, *, exact: bool) -> None:
        self._optimizer, self._exact = optimizer, exact
        #: Writes that are applied to the weights at the end; only for the closed form.
        self.waiting: list[tuple[Kind, list[Write]]] = []
        #: Keeps signals away from the steps of a script, which take little time.
        self._quiet, self._held = contextlib.ExitStack(), False
        self._script()

    def take(
        self, steps: Sequence[list[Event]], progress: Callable[[int, int], None] | None
    ) -> None:
        """Take the steps, and write the weights. A step is a list of events, itself the last."""
        self.go(steps, progress)
        for kind, writes in self.waiting:
            kind.make(writes)

    def go(
        self,
        steps: Sequence[list[Event]],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """As `take`, but leave writes for the end in `waiting`."""
        with self._quiet, OwnArithmetic():
            self._go(steps, progress)

    def _go(
        self, steps: Sequence[list[Event]], progress: Callable[[int, int], None] | None
    ) -> None:
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
        """Take a step; `alone`: without the script, as groups change while probes are pending."""
        if self._scripted is None or alone:
            if not self._exact:
                self._refuse()
            self._settle()
            for event in events:
                _again(self._optimizer, event)
            self._script()
            return
        if not self._held:
            self._quiet.enter_context(uninterrupted())
            self._held = True
        for event in events:
            _again(self._scripted.stand_in, event)

    def _script(self) -> None:
        """Make a script for the next steps, if the optimizer allows one."""
        try:
            self._scripted: Scripted | None = Scripted(self._optimizer)
        except NotScriptedError:
            self._scripted = None

    def _settle(self) -> None:
        """Copy the stand-in's progress to the optimizer; apply or keep the collected writes."""
        self._quiet.close()
        self._held = False
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
    model: Any,
    path: str | Path,
    *,
    until: int | None = None,
    check_base: bool = True,
    sync_every: float = 1.0,
) -> ZerothOrderOptimizer:
    """Replay a run, and continue to record it to the same file.

    This continues a run whose process was killed. Only the step in progress is lost. An incomplete
    record at the end of the file is removed.

    Args:
        model, path, check_base: as for `replay`.
        until: continue after this step. The file's later steps are removed once the replay has
            succeeded; to keep them, resume from a copy of the file. Default: after the last one.
        sync_every: as for the optimizer's `record`.

    Returns:
        The optimizer, with its recorder.

    Raises:
        TrajectoryError, ValueError: as for `replay`, or another process is writing to the file. The
            file is then unchanged.
        OSError: the file cannot be written.
    """
    check_number("sync_every", sync_every, low=0.0)
    path = Path(path)
    with contextlib.ExitStack() as opened:
        file = locked(path, os.O_RDWR)
        opened.callback(os.close, file)
        optimizer = replay(model, path, until=until, check_base=check_base)
        options = {"until": until, "sync_every": sync_every, "model": model}
        optimizer.recorder = Recorder.going_on(optimizer, path, file, **options)
        opened.pop_all()
    return optimizer


def _report_torn(contents: Contents, path: str | Path) -> None:
    if contents.torn:
        warn(
            f"{path} ends with {contents.torn} bytes of a record that was cut off; the steps "
            f"before it, {contents.steps}, are whole"
        )


def _again(optimizer: ZerothOrderOptimizer, event: Event) -> None:
    """Repeat a recorded event."""
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
        # The run itself has already warned about losses that are not finite.
        warnings.simplefilter("ignore")
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
