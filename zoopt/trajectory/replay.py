"""A run once more, from its record: the same weights, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoopt.distributed.seed import alone
from zoopt.parameters import named_params
from zoopt.trajectory.format import Contents, Event, Kind, TrajectoryError, read, steps_of
from zoopt.trajectory.header import fingerprint, from_json, rebuild
from zoopt.trajectory.recorder import Recorder
from zoopt.warn import warn
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.closure import RecordedLosses


@alone()
def replay(
    model: Any,
    path: str | Path,
    *,
    until: int | None = None,
    check_base: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ZerothOrderOptimizer:
    """Take a recorded run's steps on the weights that it began from.

    Every write of the run is made again, rounded as it was, so the weights and the optimizer's
    state are those of the run after the last step, to the bit. The model is not evaluated. Each
    step takes its passes over the weights: in place one for each evaluation and one for the
    update, virtually the update's alone.

    Args:
        model: a module, or anything with `named_parameters()`, which holds the base weights; they
            are trained in place.
        path: the file.
        until: how many steps to take; default all that are whole.
        check_base: raise unless the weights are those the run began from, by their hash. Without,
            the run's updates are applied to other weights: a fine-tune moved to another release of
            its base.
        progress: called after each step with its number and their count.

    Returns:
        The optimizer after these steps.

    Raises:
        TrajectoryError: the file is damaged, of an unknown version, or of another model; or the
            weights are others. Nothing has changed then.
        ValueError: until is more than there are steps.
    """
    contents = read(path)
    steps = list(steps_of(contents.events))
    if until is not None and not 0 <= until <= len(steps):
        raise ValueError(f"until must be in [0, {len(steps)}], the steps of {path}, got {until!r}")
    optimizer = rebuild(contents.header, model)
    params = [param for _, _, param, _ in named_params(optimizer.param_groups)]
    if check_base and fingerprint(params) != contents.header["base"]:
        raise TrajectoryError(
            f"the model's weights are not those that {path} begins from; load these, or pass "
            f"check_base=False to apply the run to others"
        )
    _report_torn(contents, path)
    last = len(steps) if until is None else until
    for number, events in enumerate(steps[:last], 1):
        for event in events:
            _again(optimizer, event)
        if progress is not None:
            progress(number, last)
    return optimizer


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
    if event.kind is Kind.CHANGE:
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
            if event.kind in (Kind.STEP, Kind.FAILED):
                optimizer.step(losses)
            elif event.kind is Kind.PROBE:
                optimizer.probe(losses)
            elif event.kind is Kind.APPLY:
                optimizer.step()
            else:
                optimizer.zero_grad()
        except EOFError as error:
            if event.kind is not Kind.FAILED:
                raise TrajectoryError(f"the file is not of this optimizer: {error}") from None
    if losses.rest:
        raise TrajectoryError(
            f"the file is not of this optimizer: a step has taken fewer than its "
            f"{len(event.losses)} losses"
        )
