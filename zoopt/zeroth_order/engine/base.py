"""What all zeroth-order optimizers share: probes, steps, checkpoints and records of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoopt.ambient import OwnArithmetic, opaque
from zoopt.checks import check_number
from zoopt.distributed.checkpoint import (
    asks_for_state,
    called_by_checkpoint,
    called_by_get,
    called_by_load,
)
from zoopt.distributed.exchange import Job, Parallel
from zoopt.optimizer import Params
from zoopt.parameters import named_params
from zoopt.zeroth_order.engine.closure import Closure, check_closure
from zoopt.zeroth_order.engine.job import ZerothOrderJob
from zoopt.zeroth_order.engine.narrow import JudgesLosses
from zoopt.zeroth_order.engine.perturbation import Perturbation
from zoopt.zeroth_order.engine.probe import (
    Evaluation,
    Outcome,
    PendingProbe,
    mean_loss,
    one_sided,
    two_sided,
)
from zoopt.zeroth_order.engine.sites import Site, Sites
from zoopt.zeroth_order.engine.updates import RunRecorder
from zoopt.zeroth_order.engine.windows import Windows


class ZerothOrderOptimizer(JudgesLosses, ZerothOrderJob):
    """Probes the loss along directions that are regenerated from the seed.

    A subclass implements `_update`, which receives each parameter's site and the directions'
    projected gradients; it may choose the directions (`_direction`), what is evaluated along them
    (`_evaluate`) and what they weigh (`_weights`). Everything that a run needs to continue is in
    the param groups, as numbers, and in the declared state.

    Attributes:
        last_step: what the last step measured, or None before the first.
        skipped_probes: how many probes this optimizer has left out for a non-finite loss.
    """

    #: Whether a step follows from the numbers that a closure returns.
    recordable = True
    #: The largest |g| that the update can bear in float32, times |z| < 8 and a learning rate.
    _largest_grad = 2.0**100
    #: In which order the closure reads the parameters.
    _windows: Windows | None = None

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        seed: int | None,
        process_group: Job = None,
        parallel: Parallel = "data",
        record: str | Path | None = None,
    ) -> None:
        super().__init__(
            params, defaults, seed=seed, process_group=process_group, parallel=parallel
        )
        if record is not None:
            self.record(record)

    @opaque
    def probe(self, closure: Closure, *, weight: float = 1.0) -> float:
        """Evaluate the closure along this step's directions, and leave the parameters alone.

        Call it once a micro-batch: the directions stay the same until `step`, and losses add up.
        With losses scaled as for backward passes, accumulation is exact.

        Args:
            closure: evaluates the loss and returns it: a float, an int or a tensor of one element.
                It runs without autograd, 2 num_probes times (one-sided: 1 + num_probes), each time
                under the same random state, and must compute the same function each time: the
                run's first probe calls it once more, and warns if it does not. What it cannot see
                is a closure that begins to draw new data later.
            weight: the weight of this rank's losses in a process group whose ranks have their own
                data, for example the number of its tokens or examples.

        Returns:
            The mean of the probe's losses (of all ranks').

        Raises:
            TypeError, ValueError: it is not a closure, or returns something else.
            RuntimeError: a virtual perturbation did not reach the closure, the closure writes to a
                parameter, or no parameter requires a gradient.
        """
        gradients = torch.is_grad_enabled()
        self._settle()
        check_closure(closure, "probe")
        check_number("weight", weight, low=0.0)
        self._note_changes()
        pending = self._pending_copy()
        perturbation = self._perturbation(pending)
        try:
            loss = self._measure(self._evaluation(closure, perturbation, pending, weight), pending)
            perturbation.restore()
        except BaseException:
            # A signal may have come while a context was being left.
            torch.set_grad_enabled(gradients)
            self._undo(perturbation)
            if self.recorder is not None:
                self.recorder.failed(moved=any(site.in_place for site in pending.sites))
            raise
        self._pending = pending
        if self.recorder is not None:
            self.recorder.probed()
        return loss

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, weight: float = 1.0
    ) -> float | None:
        """Take one step: from the closure, or from the probes that are pending.

        Args:
            closure: as for `probe`. With one, the step probes it (in addition to what is pending)
                and updates; the restoring pass and the update are one.
            weight: as for `probe`.

        Returns:
            The mean of the closure's losses (without a closure: of all the pending ones), or None
            if there was nothing to do, in which case nothing at all has changed.

        Raises:
            RuntimeError: there is nothing to do, and a parameter has a gradient: whoever calls the
                step has taken the optimizer for one that is fed by backward passes.
            TypeError, ValueError, RuntimeError: as for `probe`; also a hyperparameter that has been
                set out of range.
        """
        gradients = torch.is_grad_enabled()
        self._settle()
        if closure is None:
            if self._pending is None:
                if asks_for_state(self):
                    if called_by_load():
                        self._ready_all()
                    return None
                self._refuse_gradients()
                return None
            pending = self._pending
            self._note_changes()
            self._confirm(pending)
            self._take(pending, None)
            return mean_loss(pending.losses)
        check_closure(closure, "step")
        check_number("weight", weight, low=0.0)
        self._note_changes()
        pending = self._pending_copy()
        perturbation = self._perturbation(pending)
        try:
            evaluation = self._evaluation(closure, perturbation, pending, weight)
            loss = self._measure(evaluation, pending)
            self._refine(evaluation, pending)
            self._take(pending, perturbation)
        except BaseException:
            # A signal may have come while a context was being left.
            torch.set_grad_enabled(gradients)
            begun = self._unfinished is not None
            self._undo(perturbation)
            if self.recorder is not None and not begun:
                self.recorder.failed(moved=any(site.in_place for site in pending.sites))
            raise
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: as torch's, and the record of the last step."""
        record = {"last_step": self.last_step, "skipped_probes": self.skipped_probes}
        return {**super().__getstate__(), **record}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch: what has been accumulated goes, here the probes that are pending."""
        super().zero_grad(set_to_none)
        dropped, self._pending = self._pending, None
        if dropped is not None:
            self._release(dropped.sites)
            if self.recorder is not None:
                self.recorder.dropped()

    def record(
        self, path: str | Path, model: Any = None, *, sync_every: float = 1.0
    ) -> RunRecorder:
        """Record the run from its first step on: a file from which the weights can be remade.

        A step takes some 15 bytes: what the closure returned. `zoopt.replay` takes the steps again.
        In a process group its first rank writes what all have agreed on, and the others nothing;
        all must call it. Sharded parameters are gathered for the hash, one after the other.

        Args:
            path: a new file.
            model: the module whose parameters are trained; their names go into the file, and a hash
                of their values. Default: parameters go by the names that the optimizer has of
                them, as it does if it was made from `model.named_parameters()`.
            sync_every: seconds after which what was written is forced to the disk.

        Returns:
            The recorder; `close()` ends the recording.

        Raises:
            ValueError: a step has been taken; the run is recorded already; the steps of this class
                do not follow from losses; it is a low-rank class and parameters are sharded, where
                steps follow from losses only up to rounding; or there is neither a model nor a name
                for each parameter.
            FileExistsError: there is such a file; see `zoopt.trajectory.resume`.
        """
        from zoopt.trajectory.recorder import Recorder

        first = self._exchange is None or self._exchange.first
        recorder = Recorder.new(self, model, path, sync_every=sync_every, writes=first)
        if first:
            self.recorder = recorder
        return recorder

    @property
    def has_pending(self) -> bool:
        """Whether something has been probed that no step has used yet."""
        return self._pending is not None

    def _perturbation(self, pending: PendingProbe) -> Perturbation:
        """The parameters of a probe, at theta."""
        if self._windows is None:
            self._windows = Windows()
        return Perturbation(pending.sites, self._queue, self._windows)

    def in_windows(self) -> list[Tensor]:
        """The parameters for which, on a GPU, several operators' temporaries are made at once."""
        sites = self._new_pending().sites
        return [s.param for s in sites if s.virtual and s.direction.in_windows]

    def _note_changes(self) -> None:
        """Let the recorder see what was changed since the last step."""
        if self.recorder is not None:
            self.recorder.before()

    def _pending_copy(self) -> PendingProbe:
        """The step's directions, and a copy of what has been measured along them."""
        return self._new_pending() if self._pending is None else self._pending.copy()

    def _measure(self, evaluation: Evaluation, pending: PendingProbe) -> float:
        """Add the losses along the directions; parameters perturbed in place are left where the
        last one was evaluated."""
        outcomes = [self._usable(each) for each in self._evaluate(evaluation, pending)]
        self._warn_of_narrow(evaluation.rng.eps, self._differences(outcomes))
        pending.add(outcomes)
        return mean_loss([outcome.losses for outcome in outcomes])

    def _usable(self, outcome: Outcome) -> Outcome:
        """The outcome, with a delta of NaN if no update in float32 can bear it."""
        for group in self.param_groups:
            grad = abs(outcome.delta) / float(group[self._names.scale])
            bound = group.get("max_projected_grad")
            if (grad if bound is None else min(grad, bound)) > self._largest_grad:
                return dataclasses.replace(outcome, delta=math.nan)
        return outcome

    def _differences(self, outcomes: Sequence[Outcome]) -> Iterable[Sequence[float]]:
        """The losses whose differences the estimate is made of."""
        return [outcome.losses for outcome in outcomes]

    def _warn_of_narrow(self, eps: float, compared: Iterable[Sequence[float]]) -> None:
        self._judge(eps, compared, self._names.value, self._names.scale)

    def _refuse_gradients(self) -> None:
        """Raise if a parameter has a gradient, unless a checkpoint only asks for state."""
        for *_, param, name in named_params(self.param_groups):
            if param.grad is not None and not called_by_checkpoint():
                cls = type(self).__name__
                raise RuntimeError(
                    f"{cls}.step() needs a closure, or probes that are pending, got neither, and "
                    f"parameter {name!r} has a gradient: {cls} does not read what backward passes "
                    f"leave. Call step(closure), or probe(closure) and then step(); in place of "
                    f"transformers.Trainer use zoopt.integrations.transformers.ZOTrainer"
                )

    def _undo(self, perturbation: Perturbation) -> None:
        """Bring parameters that an error has left somewhere else back to theta."""
        try:
            perturbation.restore()
        except BaseException:
            # A lack of memory, for example. The next call begins by restoring the parameters.
            self._unfinished = perturbation.restore

    def _settle(self) -> None:
        """Finish what an error has cut short."""
        if self._unfinished is not None:
            self._unfinished()
            self._unfinished = self._cut_short = None

    def _evaluate(self, evaluation: Evaluation, pending: PendingProbe) -> Sequence[Outcome]:
        """Measure the loss along the pending directions, a outcome each."""
        one = self.param_groups[0]["estimator"] == "one-sided"
        return (one_sided if one else two_sided)(evaluation, pending.draws)

    def _refine(self, evaluation: Evaluation, pending: PendingProbe) -> None:
        """Evaluate what the update still wants to know, at the closure that the step was given."""

    @OwnArithmetic()
    def _new_pending(self) -> PendingProbe:
        for group in self.param_groups:
            self._check_options(group)
        draws = self._draws()
        if draws[-1] >= 1 << 32:
            raise RuntimeError("the run has used all of its 2^32 draws; begin one with a new seed")
        self._check_seed()
        block = self._block_due()
        sites = self._sites_due(block)
        if not sites:
            where = "" if block is None else f" in block {block}, whose turn it is"
            raise RuntimeError(
                f"no parameter of the optimizer{where} requires a gradient, so there is nothing to "
                f"perturb; unfreeze one with .requires_grad_()"
            )
        self._prepare(sites)
        return PendingProbe(sites, draws, block)

    def _sites_due(self, block: int | None) -> Sites:
        """The sites of a step: those of the last one in the block where all is as it was then."""
        before = self._known_sites.get(block)
        if before is not None:
            facts, (known, sites) = self._facts(), before
            if facts is not None and facts.holds(known):
                self._survey(sites)
                return sites
        self._check_values()
        self._check_state()
        self._survey(None)
        sites = Sites(self._sites(block))
        facts = self._facts()
        if facts is not None and sites.lasting:
            self._known_sites[block] = facts, sites
        return sites

    def _prepare(self, sites: Sequence[Site]) -> None:
        """Make what directions need and is made of all parameters at once."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every zoopt optimizer; drops probes that are pending.

        Raises:
            ValueError: also if the run was recorded with another version of the noise; or if there
                is state and the run is recorded, as the file cannot hold it.
        """
        if self.recorder is not None and any(dict(state_dict).get("state", {}).values()):
            raise ValueError(
                "state must not be loaded while the run is recorded, whose file could not make it "
                "again; close the recorder, or go on by zoopt.trajectory.resume"
            )
        super().load_state_dict(state_dict)
        self._pending = self._unfinished = self._cut_short = None
        # What has been kept between steps holds the state that this one replaces.
        self._known_sites.clear()
        self._windows = None

    def state_dict(self) -> dict[str, Any]:
        """As for every zoopt optimizer."""
        self._settle()
        if not called_by_get():
            return super().state_dict()
        # With all the names that a load will look for, and no trace here.
        new = self._ready_all()
        state_dict = super().state_dict()
        for param in new:
            self.state.pop(param, None)
        return state_dict
