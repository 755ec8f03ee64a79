"""What all zeroth-order optimizers share: groups, streams, draws, probes, checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

from torch import Tensor

from zoopt.ambient import OwnArithmetic, opaque
from zoopt.checks import (
    check_bool,
    check_choice,
    check_nonnegative_int,
    check_number,
    check_positive_int,
)
from zoopt.distributed.checkpoint import (
    asks_for_state,
    called_by_checkpoint,
    called_by_get,
    called_by_load,
)
from zoopt.dtypes import NARROW, RoundingMode, resolved_rounding
from zoopt.kernels import dispatch
from zoopt.kernels.noise.key import Distribution, NoiseKey
from zoopt.noise import NOISE_VERSION, stream
from zoopt.optimizer import DeclaredStateOptimizer, Group, Params
from zoopt.parameters import check_param, named_params
from zoopt.warn import warn
from zoopt.zeroth_order.engine.blocks import block_due, block_of, check_blocks
from zoopt.zeroth_order.engine.closure import Closure, check_closure
from zoopt.zeroth_order.engine.direction import Coefficients, Direction, Noise, descent
from zoopt.zeroth_order.engine.passes import Passes
from zoopt.zeroth_order.engine.perturbation import (
    Perturbation,
    PerturbationMode,
    Slot,
)
from zoopt.zeroth_order.engine.probe import (
    Estimator,
    Evaluation,
    Outcome,
    PendingProbe,
    StepRecord,
    mean_loss,
    one_sided,
    two_sided,
)
from zoopt.zeroth_order.engine.progress import Commit, Progress, count_write


@dataclasses.dataclass(frozen=True)
class ProbeNames:
    """What a class calls the group keys of its probes.

    Attributes:
        scale: how far from theta the loss is evaluated.
        count: in how many directions.
        run: those that are the same in every group, beside `count` and what every class has.
    """

    scale: str = "zo_eps"
    count: str = "num_probes"
    run: tuple[str, ...] = ()

    @property
    def shared(self) -> tuple[str, ...]:
        """The keys that describe the run, hence are the same in every group."""
        everyone = ("seed", "step", "draw", "noise_version", "estimator", "blocks", "block_order")
        return (*everyone, self.count, *self.run)


#: More directions a step are a mistake, of which memory would be gone before anyone noticed.
_MOST_DIRECTIONS = 1 << 20
#: How many differences of 16-bit losses are judged, the run's first.
_JUDGED = 4


class RunRecorder(Protocol):
    """What a recorder of runs is told."""

    def before(self) -> None:
        """A probe or a step begins."""

    def listen(self, closure: Closure) -> Closure:
        """The closure to evaluate in its place."""

    def probed(self) -> None:
        """Losses have been added up."""

    def stepped(self, closure: bool) -> None:
        """A step has been taken, of a closure or of what was probed."""

    def dropped(self) -> None:
        """What was probed is dropped."""


class ZerothOrderOptimizer(DeclaredStateOptimizer):
    """Probes the loss along directions that are regenerated from the seed.

    A subclass implements `_update`, which receives each parameter's slot and the directions'
    projected gradients; it may choose the directions (`_direction`), what is evaluated along them
    (`_evaluate`) and what they weigh (`_weights`). Everything that a run needs to go on is in the
    param groups, as numbers, and in the declared state.

    Attributes:
        last_step: what the last step measured, or None before the first.
        skipped_probes: how many probes this optimizer has left out for a non-finite loss.
    """

    # A copy, which torch makes without calling __init__, starts from these.
    last_step: StepRecord | None = None
    skipped_probes: int = 0
    _pending: PendingProbe | None = None
    _unfinished: Callable[[], None] | None = None
    #: Writes down what the run is made of, see `record`.
    recorder: RunRecorder | None = None
    #: Whether a step follows from the numbers that a closure returns.
    recordable = True

    _names = ProbeNames()
    #: The largest |g| that the update can bear in float32, times |z| < 8 and a learning rate.
    _largest_grad = 2.0**100
    #: How many differences of 16-bit losses have been judged, and how coarse they were.
    _judged = _coarse = 0

    def __init__(self, params: Params, defaults: dict[str, Any], *, seed: int | None) -> None:
        run = {"seed": self._share_seed(seed), "step": 0, "draw": 0, "noise_version": NOISE_VERSION}
        super().__init__(params, {**defaults, **run})

    @property
    def _shared_keys(self) -> tuple[str, ...]:
        return self._names.shared

    @opaque
    def probe(self, closure: Closure) -> float:
        """Evaluate the closure along this step's directions, and leave the parameters alone.

        Call it once a micro-batch: the directions stay the same until `step`, and losses add up.
        With losses scaled as for backward passes, accumulation is exact.

        Args:
            closure: evaluates the loss and returns it: a float, an int or a tensor of one element.
                It runs without autograd, 2 num_probes times (one-sided: 1 + num_probes), each time
                under the same random state, and must compute the same function each time: the
                run's first probe calls it once more, and warns if it does not. What it cannot see
                is a closure that begins to draw new data later.

        Returns:
            The mean of the probe's losses.

        Raises:
            TypeError, ValueError: the closure is none, or returns something else.
            RuntimeError: a virtual perturbation did not reach the closure, the closure writes to a
                parameter, or no parameter requires a gradient.
        """
        self._settle()
        check_closure(closure, "probe")
        self._note_changes()
        pending = self._pending_copy()
        perturbation = Perturbation(pending.slots)
        try:
            loss = self._measure(self._evaluation(closure, perturbation), pending)
            perturbation.restore()
        except BaseException:
            self._undo(perturbation)
            raise
        self._pending = pending
        if self.recorder is not None:
            self.recorder.probed()
        return loss

    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Take one step: from the closure, or from the probes that are pending.

        Args:
            closure: as for `probe`. With one, the step probes it (in addition to what is pending)
                and updates; the restoring pass and the update are one.

        Returns:
            The mean of the closure's losses (without a closure: of all the pending ones), or None
            if there was nothing to do, in which case nothing at all has changed.

        Raises:
            RuntimeError: there is nothing to do, and a parameter has a gradient: whoever calls the
                step has taken the optimizer for one that is fed by backward passes.
            TypeError, ValueError, RuntimeError: as for `probe`; also a hyperparameter that has been
                set out of range.
        """
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
            self._take(pending, None)
            return mean_loss(pending.losses)
        check_closure(closure, "step")
        self._note_changes()
        pending = self._pending_copy()
        perturbation = Perturbation(pending.slots)
        try:
            evaluation = self._evaluation(closure, perturbation)
            loss = self._measure(evaluation, pending)
            self._refine(evaluation, pending)
            self._take(pending, perturbation)
        except BaseException:
            self._undo(perturbation)
            raise
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: as torch's, and the record of the last step."""
        record = {"last_step": self.last_step, "skipped_probes": self.skipped_probes}
        return {**super().__getstate__(), **record}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch: what has been accumulated goes, here the probes that are pending."""
        super().zero_grad(set_to_none)
        if self._pending is not None and self.recorder is not None:
            self.recorder.dropped()
        self._pending = None

    def record(self, path: str | Path, model: Any, *, sync_every: float = 1.0) -> RunRecorder:
        """Record the run from its first step on: a file from which the weights can be remade.

        A step takes some 15 bytes: what the closure returned. `zoopt.replay` takes the steps again.

        Args:
            path: a new file.
            model: the module whose parameters are trained; their names go into the file, and a hash
                of their values.
            sync_every: seconds after which what was written is forced to the disk.

        Returns:
            The recorder; `close()` ends the recording.

        Raises:
            ValueError: a step has been taken, or steps of this class do not follow from losses.
            FileExistsError: there is such a file; see `zoopt.trajectory.resume`.
        """
        from zoopt.trajectory.recorder import Recorder

        self.recorder = Recorder(self, model, path, sync_every=sync_every)
        return self.recorder

    @property
    def has_pending(self) -> bool:
        """Whether something has been probed that no step has used yet."""
        return self._pending is not None

    def _note_changes(self) -> None:
        """Let the recorder see what was changed since the last step."""
        if self.recorder is not None:
            self.recorder.before()

    def _pending_copy(self) -> PendingProbe:
        """The step's directions, and a copy of what has been measured along them."""
        return self._new_pending() if self._pending is None else self._pending.copy()

    def _evaluation(self, closure: Closure, perturbation: Perturbation) -> Evaluation:
        params = [param for group in self.param_groups for param in group["params"]]
        if self.recorder is not None:
            closure = self.recorder.listen(closure)
        return Evaluation(closure, perturbation, params, verify=self._verifies)

    def _measure(self, evaluation: Evaluation, pending: PendingProbe) -> float:
        """Add the losses along the directions; parameters perturbed in place are left where the
        last one was evaluated."""
        outcomes = [self._usable(each) for each in self._evaluate(evaluation, pending)]
        self._warn_of_narrow(evaluation.spacing, outcomes)
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

    def _warn_of_narrow(self, spacing: float, outcomes: Sequence[Outcome]) -> None:
        """Warn of losses of 16 bits that do not differ, or twice hardly: once, early in the run."""
        for outcome in outcomes:
            if not spacing or len(outcome.losses) < 2 or self._judged >= _JUDGED:
                return
            spread = max(outcome.losses) - min(outcome.losses)
            self._judged += 1
            self._coarse += (spread <= 2.0 * spacing) + (spread == 0.0)
            if self._coarse >= 2:
                self._judged = _JUDGED
                warn(
                    f"the closure returned losses of 16 bits, which differ by {spread:.1g} where "
                    f"such numbers lie {spacing:.1g} apart: the estimate will be mostly rounding; "
                    f"compute the loss in float32, from logits.float() say, and return it as it is "
                    f"(loss.float() at the least), or raise {self._names.scale}"
                )

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
            # Memory, say. Whatever comes next begins with this.
            self._unfinished = perturbation.restore

    def _settle(self) -> None:
        """Finish what an error has cut short."""
        if self._unfinished is not None:
            self._unfinished()
            self._unfinished = None

    @property
    def _verifies(self) -> bool:
        """Whether the next evaluation is the run's first, which is repeated to be compared."""
        return self._pending is None and not self.param_groups[0]["step"]

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
        self._check_values()
        self._check_seed()
        self._check_state()
        self._survey()
        block = self._block_due()
        slots = list(self._slots(block))
        if not slots:
            where = "" if block is None else f" in block {block}, whose turn it is"
            raise RuntimeError(
                f"no parameter of the optimizer{where} requires a gradient, so there is nothing to "
                f"perturb; unfreeze one with .requires_grad_()"
            )
        return PendingProbe(slots, draws, block)

    def _survey(self) -> None:
        """Read what directions depend on beyond their own parameter."""

    def _check_values(self) -> None:
        """Raise if a parameter has no values here."""
        for *_, param, name in named_params(self.param_groups):
            if param.is_meta:
                raise RuntimeError(
                    f"parameter {name!r} must hold values, got one on the meta device, which can "
                    f"be perturbed neither in place nor virtually; load the model whole before the "
                    f"optimizer is made, in bfloat16 say, without accelerate's cpu_offload or "
                    f"disk_offload"
                )

    def _draws(self) -> tuple[int, ...]:
        """The numbers of this step's directions."""
        run = self.param_groups[0]
        return tuple(range(run["draw"], run["draw"] + run[self._names.count]))

    @OwnArithmetic()
    def _take(self, pending: PendingProbe, perturbation: Perturbation | None) -> None:
        """Take the step: update every parameter, count the step and record it; all or nothing.

        What can fail comes first. An error in the updates themselves is raised after they have been
        finished; if they cannot be, by the next call, and the weights that are not updated wait at
        theta.
        """
        for group in self.param_groups:
            self._check_options(group)
        passes = Passes()
        updates = [(slot, Progress(passes)) for slot in pending.slots]
        commit = Commit(self._tasks(pending, perturbation, updates, passes))
        try:
            commit.run()
        except BaseException:
            if commit.begun and not commit.finished:
                self._unfinished = OwnArithmetic()(commit.run)
                if perturbation is not None:
                    perturbation.restore([slot for slot, progress in updates if not progress.begun])
                    perturbation.release()
            raise
        self._warn_of_skipped(pending)

    def _tasks(
        self,
        pending: PendingProbe,
        perturbation: Perturbation | None,
        updates: Sequence[tuple[Slot, Progress]],
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

        def update(slot: Slot, progress: Progress) -> None:
            offset = perturbation.offset(slot) if perturbation is not None else {}
            self._update(slot, pending, offset, progress)

        def written(slot: Slot) -> None:
            count_write(slot.param)
            if perturbation is not None:
                perturbation.forget(slot)

        def update_alone(slot: Slot, progress: Progress) -> None:
            update(slot, progress)
            written(slot)

        def update_together() -> None:
            # What an interruption has left in the queue knows of offsets that are gone.
            passes.clear()
            for each in together:
                update(*each)
            passes.make()
            for slot, _ in together:
                written(slot)

        together = [each for each in updates if dispatch.launches(each[0].param)]
        alone = [each for each in updates if not dispatch.launches(each[0].param)]

        def close() -> None:
            for group, values in groups:
                group.update(values)
            self.last_step, self.skipped_probes, self._pending = record, skipped_probes, None

        def write_down() -> None:
            if self.recorder is not None:
                self.recorder.stepped(closure=perturbation is not None)

        tasks = [functools.partial(update_alone, *each) for each in alone]
        return [*tasks, *([update_together] if together else []), *further, close, write_down]

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
        self, slot: Slot, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        """Update one parameter from the probe, and take the displacement `offset` away from it.

        Made again with the same `progress`, it goes on where it broke off.
        """
        raise NotImplementedError

    def _descend(
        self,
        slot: Slot,
        pending: PendingProbe,
        offset: Coefficients,
        weights: Coefficients,
        progress: Progress,
    ) -> None:
        """theta <- decay (theta - offset) - lr sum_d weights[d] z(d), in one pass."""
        lr, decay = float(slot.group["lr"]), self._decay(slot.group, pending)
        total = descent(offset, weights, lr=lr, decay=decay)
        if total or decay != 1.0:
            slot.direction.add_(
                slot.param, total, decay=decay, rounding=slot.rounding, progress=progress
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

    def _slots(self, block: int | None = None) -> Iterator[Slot]:
        """The parameters that take part now (of one block, or of all), with their directions."""
        run = self.param_groups[0]
        blocks = run.get("blocks")
        for group_index, group, param, name in named_params(self.param_groups):
            if not param.requires_grad:
                continue
            if block is not None and block_of(blocks, group_index, name) != block:
                continue
            self._ready_state(param, group, stream(name))
            if not param.numel():
                continue
            virtual = self._virtual(param, group)
            direction = self._direction(param, group, stream(name), virtual=virtual)
            if direction is not None:
                scale = float(group[self._names.scale])
                rounding = resolved_rounding(group["rounding"], param.dtype)
                yield Slot(param, group, direction, virtual, rounding, scale)

    @OwnArithmetic()
    def _ready_all(self) -> list[Tensor]:
        """Make the state of all parameters, empty for some; returns those that had none."""
        new = []
        for _, group, param, name in named_params(self.param_groups):
            if param.requires_grad and param not in self.state:
                self._ready_state(param, group, stream(name))
                new.append(param)
        for param in new if self.state else ():
            self.state[param] = self.state.get(param, {})
        return new

    def _ready_state(self, param: Tensor, group: Group, number: int) -> None:
        """Make what is missing of the parameter's state: where memory ends, it ends before the
        evaluations."""
        missing = self.declared_state(param, group).keys() - self.state.get(param, {}).keys()
        if not missing:
            return
        try:
            self._state(param, group)
            if param.numel():
                self._initialise(param, group, number)
        except BaseException:
            for name in missing:
                self.state[param].pop(name, None)
            raise

    def _initialise(self, param: Tensor, group: Group, number: int) -> None:
        """Give new state its first values, where those are not zeros; `number` is the stream."""

    def _virtual(self, param: Tensor, group: Group) -> bool:
        """Whether the parameter is perturbed virtually."""
        mode: PerturbationMode = group["perturbation"]
        return param.dtype in NARROW if mode == "auto" else mode == "virtual"

    def _direction(
        self, param: Tensor, group: Group, number: int, *, virtual: bool
    ) -> Direction | None:
        """What the parameter is perturbed along, or None if it does not take part.

        Args:
            param, group: the parameter and its group.
            number: its stream.
            virtual: whether it is perturbed virtually.
        """
        return Noise(NoiseKey(group["seed"], number, distribution=group["distribution"]))

    def _block_due(self) -> int | None:
        """The block that this step is about, or None for all parameters."""
        run = self.param_groups[0]
        blocks = run.get("blocks")
        if blocks is None:
            return None
        count = len(self.param_groups) if blocks == "groups" else len(blocks)
        return block_due(count, run["block_order"], run["seed"], run["step"])

    def _check_group(self, group: Group) -> None:
        """Raise unless the group's hyperparameters and parameters can be worked with."""
        super()._check_group(group)
        check_nonnegative_int("step", group["step"], 1 << 53)
        check_nonnegative_int("draw", group["draw"], 1 << 32)
        self._check_options(group)
        for param in group["params"]:
            check_param(param)

    def _check_options(self, group: Group) -> None:
        """Raise unless the group's hyperparameters can be worked with."""
        check_number("lr", group["lr"], low=0.0)
        check_number(self._names.scale, group[self._names.scale], low=0.0, open_low=True)
        check_number("weight_decay", group["weight_decay"], low=0.0)
        check_positive_int(self._names.count, group[self._names.count])
        if group[self._names.count] > _MOST_DIRECTIONS:
            raise ValueError(
                f"{self._names.count} must be at most 2^20, got {group[self._names.count]}: a step "
                f"evaluates the loss for each"
            )
        if group.get("max_projected_grad") is not None:
            check_number("max_projected_grad", group["max_projected_grad"], low=0.0, open_low=True)
        if "estimator" in group:
            check_choice("estimator", group["estimator"], get_args(Estimator))
        if "blocks" in group:
            check_blocks(group["blocks"], group["block_order"])
        check_bool("maximize", group["maximize"])
        if "distribution" in group:
            check_choice("distribution", group["distribution"], get_args(Distribution))
        check_choice("perturbation", group["perturbation"], get_args(PerturbationMode))
        check_choice("rounding", group["rounding"], get_args(RoundingMode))

    def _check_run(self, groups: list[Group]) -> None:
        super()._check_run(groups)
        for group_index, group, _, name in named_params(groups):
            block_of(group.get("blocks"), group_index, name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every zoopt optimizer; drops probes that are pending.

        Raises:
            ValueError: also if the run was recorded with another version of the noise.
        """
        super().load_state_dict(state_dict)
        self._pending = self._unfinished = None

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
