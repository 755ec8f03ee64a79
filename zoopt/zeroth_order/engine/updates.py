"""A zeroth-order step once it has been probed: every parameter updated, counted, written down."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from zoopt.ambient import OwnArithmetic
from zoopt.optimizer import Group
from zoopt.warn import warn
from zoopt.zeroth_order.engine.closure import Closure
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.groups import ZerothOrderGroups
from zoopt.zeroth_order.engine.passes import Passes
from zoopt.zeroth_order.engine.perturbation import Perturbation
from zoopt.zeroth_order.engine.probe import (
    PendingProbe,
    StepRecord,
)
from zoopt.zeroth_order.engine.progress import BucketProgress, Commit, Progress, count_write
from zoopt.zeroth_order.engine.sites import Bucket, Site


def withdrawn(offset: Coefficients, decay: float) -> dict[int, float]:
    """The coefficients that, beside decay theta, take the offset of theta + sum_d offset[d] z(d)
    away."""
    return {draw: -decay * coefficient for draw, coefficient in offset.items()}


def descent(
    offset: Coefficients, g: Mapping[int, float], *, lr: float, decay: float
) -> dict[int, float]:
    """theta <- decay theta - lr sum_d g_d z(d), from theta + sum_d offset[d] z(d).

    Returns:
        draw -> coefficient: what is added beside decay times the present value, in one pass.
    """
    total = withdrawn(offset, decay)
    for draw, g_d in g.items():
        total[draw] = total.get(draw, 0.0) - lr * g_d
    return {draw: total[draw] for draw in sorted(total) if total[draw]}


class RunRecorder(Protocol):
    """What a recorder of runs is told."""

    def before(self) -> None:
        """A probe or a step begins."""

    def listen(self, closure: Closure) -> Closure:
        """The closure to evaluate in its place."""

    def listen_together(self) -> Callable[[Sequence[float]], None]:
        """What to tell the losses that all ranks have, in the place of the closure's own."""

    def told(self, losses: Sequence[float]) -> None:
        """Losses were measured elsewhere, for the step that comes."""

    def probed(self) -> None:
        """Losses have been added up."""

    def stepped(self, closure: bool) -> None:
        """A step has been taken, of a closure or of what was probed."""

    def dropped(self) -> None:
        """What was probed is dropped."""

    def failed(self, moved: bool) -> None:
        """An error has ended evaluations, during which parameters had moved in place or not."""


class ZerothOrderUpdates(ZerothOrderGroups):
    """Takes a step from a probe, all of it or nothing.

    Attributes:
        last_step: what the last step measured, or None before the first.
        skipped_probes: how many probes this optimizer has left out for a non-finite loss.
    """

    #: Whether updates along plain noise depend only on losses, hyperparameters and a momentum
    #: buffer, never on the weights' values.
    scripted = False
    #: Whether updates of parameters of a group that move alike have the same numbers.
    alike = False
    # A copy, which torch makes without calling __init__, starts from these.
    last_step: StepRecord | None = None
    skipped_probes: int = 0
    _pending: PendingProbe | None = None
    _unfinished: Callable[[], None] | None = None
    #: The probe whose step an error has cut short, which `_unfinished` takes to its end.
    _cut_short: PendingProbe | None = None
    #: Writes down what the run is made of, see `record`.
    recorder: RunRecorder | None = None
    #: Makes the queue of a step's passes.
    _queue: Callable[[], Passes] = Passes

    @OwnArithmetic()
    def _take(self, pending: PendingProbe, perturbation: Perturbation | None) -> None:
        """Take the step: update every parameter, count the step and record it; all or nothing.

        What can fail comes first. An error in the updates themselves is raised after they have been
        finished; if they cannot be, by the next call, and the weights that are not updated wait at
        theta.
        """
        for group in self.param_groups:
            self._check_options(group)
        if perturbation is not None:
            perturbation.put_back()
        passes = self._queue()
        updates = [
            (bucket, BucketProgress(bucket.sites, passes)) for bucket in pending.sites.buckets
        ]
        commit = Commit(self._tasks(pending, perturbation, updates, passes))
        try:
            commit.run()
        except BaseException:
            if commit.begun and not commit.finished:
                self._unfinished, self._cut_short = OwnArithmetic()(commit.run), pending
                if perturbation is not None:
                    perturbation.restore(
                        [bucket for bucket, progress in updates if not progress.begun]
                    )
                    perturbation.release()
            raise
        self._warn_of_skipped(pending)

    def _tasks(
        self,
        pending: PendingProbe,
        perturbation: Perturbation | None,
        updates: Sequence[tuple[Bucket, BucketProgress]],
        passes: Passes,
    ) -> list[Callable[[], None]]:
        """What the step changes, in order."""
        run = {"step": self.param_groups[0]["step"] + 1, "draw": pending.draws[-1] + 1}
        further = self._change_run(run)
        groups = [
            (group, {**run, **(self._closing(group, pending) if pending.kept else {})})
            for group in self.param_groups
        ]
        record = self._record(pending, run["step"])
        skipped_probes = self.skipped_probes + pending.skipped

        def queue(bucket: Bucket, progress: BucketProgress) -> None:
            offset = perturbation.offset(bucket) if perturbation is not None else {}

            def update(site: Site, progress: Progress) -> None:
                self._update(site, pending, offset, progress)

            passes.put_bucket(bucket, progress, update, self._alike(bucket))

        def written(*buckets: Bucket) -> None:
            count_write(*[param for bucket in buckets for param in bucket.params])
            if perturbation is not None:
                perturbation.forget(*buckets)

        def update_alone(bucket: Bucket, progress: BucketProgress) -> None:
            queue(bucket, progress)
            written(bucket)

        def update_together() -> None:
            # What an interruption has left in the queue knows of offsets that are gone.
            passes.clear()
            for each in together:
                queue(*each)
            passes.make()
            written(*[bucket for bucket, _ in together])

        together = [each for each in updates if each[0].launching]
        alone = [each for each in updates if not each[0].launching]

        def close() -> None:
            for group, values in groups:
                group.update(values)
            self.last_step, self.skipped_probes, self._pending = record, skipped_probes, None
            self._release(pending.sites)

        def write_down() -> None:
            if self.recorder is not None:
                self.recorder.stepped(closure=perturbation is not None)

        tasks = [functools.partial(update_alone, *each) for each in alone]
        return [*tasks, *([update_together] if together else []), *further, close, write_down]

    def _release(self, sites: Sequence[Site]) -> None:
        """Free what directions have held for a probe that is over."""

    def _alike(self, bucket: Bucket) -> bool:
        """Whether all updates of a bucket have the same numbers, and differ only by what lies
        beside the parameters. The update of the first one then describes them all."""
        return self.alike

    def _change_run(self, run: dict[str, int]) -> list[Callable[[], None]]:
        """What the step changes besides the updates; what all groups are to hold goes into `run`,
        which has the `step` and the `draw` that the next step begins with."""
        return []

    def _record(self, pending: PendingProbe, step: int) -> StepRecord:
        """What the step has measured."""
        grads = self._projected_grads(pending, self.param_groups[0])
        by_draw = dict(zip((pending.draws[j] for j in pending.kept), grads, strict=True))
        return StepRecord(
            step=step,
            draws=pending.draws,
            projected_grads=tuple(by_draw.get(draw, float("nan")) for draw in pending.draws),
            losses=tuple(pending.losses),
            skipped=pending.skipped,
        )

    def _warn_of_skipped(self, pending: PendingProbe) -> None:
        """Warn of the first losses that were not finite."""
        if pending.skipped and pending.skipped == self.skipped_probes:
            warn(
                f"skipped {pending.skipped} of {len(pending.losses)} probes because a loss was "
                f"not finite; if this goes on, lower lr or zo_eps (later ones are only counted, "
                f"in skipped_probes)"
            )

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        """Update one parameter from the probe, and take the displacement `offset` away from it.

        Made again with the same `progress`, it continues where it broke off.
        """
        raise NotImplementedError

    def _descend(
        self,
        site: Site,
        pending: PendingProbe,
        offset: Coefficients,
        weights: Coefficients,
        progress: Progress,
    ) -> None:
        """theta <- decay (theta - offset) - lr sum_d weights[d] z(d), in one pass."""
        lr, decay = float(site.group["lr"]), self._decay(site.group, pending)
        self._add(site, pending, descent(offset, weights, lr=lr, decay=decay), progress)

    def _add(
        self, site: Site, pending: PendingProbe, coefficients: Coefficients, progress: Progress
    ) -> None:
        """theta <- decay theta + sum_d coefficients[d] z(d), in one pass."""
        decay = self._decay(site.group, pending)
        if coefficients or decay != 1.0:
            site.direction.add_(
                site.param, coefficients, decay=decay, rounding=site.rounding, progress=progress
            )

    def _closing(self, group: Group, pending: PendingProbe) -> dict[str, Any]:
        """What the group is to hold after the step, besides its place in the run."""
        return {}

    def _decay(self, group: Group, pending: PendingProbe) -> float:
        """What the update multiplies theta by: 1 if there is nothing to update from."""
        return 1.0 - float(group["lr"]) * float(group["weight_decay"]) if pending.kept else 1.0

    def _weights(self, group: Group, pending: PendingProbe) -> dict[int, float]:
        """draw -> weight of the gradient estimate sum_j weight_j z_j, in descent's sign."""
        grads = self._projected_grads(pending, group)
        sign = -1.0 if group["maximize"] else 1.0
        return {
            pending.draws[j]: sign * g / len(grads)
            for j, g in zip(pending.kept, grads, strict=True)
        }

    def _projected_grads(self, pending: PendingProbe, group: Group) -> list[float]:
        """The projected gradients of the kept directions in the group's zo_eps, clipped."""
        grads = [pending.deltas[j] / float(group[self._names.scale]) for j in pending.kept]
        bound = group.get("max_projected_grad")
        return grads if bound is None else [max(-bound, min(bound, g)) for g in grads]
