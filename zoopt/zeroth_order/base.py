"""What all zeroth-order optimizers share: groups, streams, draws, probes, checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zoopt.checks import check_choice, check_number, check_positive_int
from zoopt.kernels.key import Distribution, NoiseKey
from zoopt.kernels.ops import DTYPES
from zoopt.noise import NOISE_VERSION, stream
from zoopt.optimizer import DeclaredStateOptimizer, Group, Params
from zoopt.zeroth_order.closure import Closure, check_closure
from zoopt.zeroth_order.perturbation import Perturbation, PerturbationMode, RoundingMode, Slot
from zoopt.zeroth_order.probe import Estimator, PendingProbe, StepRecord, evaluate

#: Group keys that describe the run, hence are the same in every group.
_RUN_KEYS = ("seed", "step", "draw", "noise_version", "num_probes", "estimator")
_NARROW = (torch.bfloat16, torch.float16)


class ZerothOrderOptimizer(DeclaredStateOptimizer):
    """Probes the loss along directions that are regenerated from the seed.

    A subclass implements `_update`, which receives each parameter's slot and the directions'
    projected gradients. Everything a run needs to go on is in the param groups, as numbers.

    Attributes:
        last_step: what the last step measured, or None before the first.
        skipped_probes: how many probes this optimizer has left out for a non-finite loss.
    """

    # torch copies and pickles an optimizer's state and groups only: a copy starts from these.
    last_step: StepRecord | None = None
    skipped_probes: int = 0
    _pending: PendingProbe | None = None

    def __init__(self, params: Params, defaults: dict[str, Any], *, seed: int | None) -> None:
        if seed is None:
            seed = torch.initial_seed() & 0xFFFFFFFFFFFFFFFF
        NoiseKey(seed, stream=0)
        run = {"seed": seed, "step": 0, "draw": 0, "noise_version": NOISE_VERSION}
        super().__init__(params, {**defaults, **run})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch; it joins the run at its present step and draw.

        Raises:
            TypeError, ValueError: a hyperparameter out of range, a parameter of a kind that cannot
                be perturbed, or two parameters with the same stream. Nothing has changed then.
        """
        if self.param_groups:
            run = {key: self.param_groups[0][key] for key in _RUN_KEYS}
            param_group = {**run, **param_group}
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            self._check_run(self.param_groups)
            self._check_streams()
        except BaseException:
            self.param_groups.pop()
            raise

    def probe(self, closure: Closure) -> float:
        """Evaluate the closure along this step's directions, and leave the parameters alone.

        Call it once a micro-batch: the directions stay the same until `step`, and losses add up.
        With losses scaled as for backward passes, accumulation is exact.

        Args:
            closure: evaluates the loss and returns it: a float, an int or a tensor of one element.
                It runs without autograd, 2 num_probes times (one-sided: 1 + num_probes), each time
                under the same torch RNG state, and must compute the same function each time.

        Returns:
            The mean of the probe's losses.

        Raises:
            TypeError, ValueError: the closure is none, or returns something else.
            RuntimeError: a virtual perturbation did not reach the closure, the closure writes to a
                parameter, or no parameter requires a gradient.
        """
        perturbation, loss = self._probe(closure, "probe")
        perturbation.restore()
        return loss

    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Take one step: from the closure, or from the probes that are pending.

        Args:
            closure: as for `probe`. With one, the step probes it (in addition to what is pending)
                and updates; the restoring pass and the update are one.

        Returns:
            The mean of the closure's losses (without a closure: of all the pending ones), or None
            if there was nothing to do, in which case nothing at all has changed.
        """
        perturbation: Perturbation | None = None
        loss: float | None = None
        if closure is not None:
            perturbation, loss = self._probe(closure, "step")
        pending = self._pending
        if pending is None:
            return None
        if loss is None:
            loss = sum(sum(pair) for pair in pending.losses) / (2 * len(pending.losses))
        self._pending = None
        self._finish(pending, perturbation or Perturbation(pending.slots))
        return loss

    def _probe(self, closure: Closure, caller: str) -> tuple[Perturbation, float]:
        """Evaluate and record; parameters perturbed in place are left at their last point."""
        check_closure(closure, caller)
        pending = self._pending or self._new_pending()
        perturbation = Perturbation(pending.slots)
        estimator = self.param_groups[0]["estimator"]
        pairs = evaluate(closure, perturbation, pending.draws, estimator)
        pending.add(pairs, estimator)
        self._pending = pending
        return perturbation, sum(sum(pair) for pair in pairs) / (2 * len(pairs))

    def _new_pending(self) -> PendingProbe:
        slots = list(self._slots())
        if not slots:
            raise RuntimeError(
                "no parameter of the optimizer requires a gradient, so there is nothing to "
                "perturb; unfreeze one with .requires_grad_()"
            )
        run = self.param_groups[0]
        draws = tuple(range(run["draw"], run["draw"] + run["num_probes"]))
        if draws[-1] >= 1 << 32:
            raise RuntimeError("the run has used all of its 2^32 draws; begin one with a new seed")
        return PendingProbe(slots, draws)

    def _finish(self, pending: PendingProbe, perturbation: Perturbation) -> None:
        """Update every parameter, count the step and record it."""
        if pending.skipped:
            self._report_skipped(pending)
        kept = pending.kept
        with torch.no_grad():
            for slot in pending.slots:
                self._update(slot, pending, {} if slot.virtual else perturbation.offset)
        perturbation.forget()
        for group in self.param_groups:
            group["step"] += 1
            group["draw"] = pending.draws[-1] + 1
            if kept:
                self._close_group(group, pending)
        grads = self._projected_grads(pending, self.param_groups[0])
        by_draw = dict(zip((pending.draws[j] for j in kept), grads, strict=True))
        self.last_step = StepRecord(
            step=self.param_groups[0]["step"],
            draws=pending.draws,
            projected_grads=tuple(by_draw.get(draw, float("nan")) for draw in pending.draws),
            losses=tuple(pending.losses),
            skipped=pending.skipped,
        )

    def _report_skipped(self, pending: PendingProbe) -> None:
        if not self.skipped_probes:
            warnings.warn(
                f"skipped {pending.skipped} of {len(pending.losses)} probes because a loss was "
                f"not finite; if this goes on, lower lr or zo_eps (later ones are only counted, "
                f"in skipped_probes)",
                stacklevel=4,
            )
        self.skipped_probes += pending.skipped

    def _update(self, slot: Slot, pending: PendingProbe, offset: Mapping[int, float]) -> None:
        """Update one parameter from the probe, and take `offset` (draw -> scale) away from it."""
        raise NotImplementedError

    def _close_group(self, group: Group, pending: PendingProbe) -> None:
        """Update what a group keeps besides its parameters' state."""

    def _projected_grads(self, pending: PendingProbe, group: Group) -> list[float]:
        """The projected gradients of the kept directions in the group's zo_eps, clipped."""
        grads = [pending.deltas[j] / float(group["zo_eps"]) for j in pending.kept]
        bound = group["max_projected_grad"]
        return grads if bound is None else [max(-bound, min(bound, g)) for g in grads]

    def _slots(self) -> Iterator[Slot]:
        """The parameters that take part now, with their streams."""
        for group, param, name in self._named_params():
            if param.requires_grad:
                narrow = param.dtype in _NARROW
                mode, rounding = group["perturbation"], group["rounding"]
                yield Slot(
                    param,
                    group,
                    NoiseKey(group["seed"], stream(name), distribution=group["distribution"]),
                    virtual=narrow if mode == "auto" else mode == "virtual",
                    rounding=("stochastic" if narrow else "nearest")
                    if rounding == "auto"
                    else rounding,
                    zo_eps=float(group["zo_eps"]),
                )

    def _named_params(self) -> Iterator[tuple[Group, Tensor, str | int]]:
        """Every parameter with its group and its name, or position where names are not known."""
        position = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                yield group, param, position if names is None else names[i]
                position += 1

    def _check_group(self, group: Group) -> None:
        """Raise unless the group's hyperparameters and parameters can be worked with."""
        check_number("lr", group["lr"], low=0.0)
        check_number("zo_eps", group["zo_eps"], low=0.0, open_low=True)
        check_number("weight_decay", group["weight_decay"], low=0.0)
        check_positive_int("num_probes", group["num_probes"])
        if group["max_projected_grad"] is not None:
            check_number("max_projected_grad", group["max_projected_grad"], low=0.0, open_low=True)
        check_choice("estimator", group["estimator"], get_args(Estimator))
        check_choice("distribution", group["distribution"], get_args(Distribution))
        check_choice("perturbation", group["perturbation"], get_args(PerturbationMode))
        check_choice("rounding", group["rounding"], get_args(RoundingMode))
        for param in group["params"]:
            _check_param(param)

    def _check_run(self, groups: list[Group]) -> None:
        for key in _RUN_KEYS:
            values = [group[key] for group in groups]
            if any(value != values[0] for value in values):
                raise ValueError(f"{key} must be the same in every param group, got {values}")

    def _check_streams(self) -> None:
        seen: dict[int, str | int] = {}
        for _, _, name in self._named_params():
            number = stream(name)
            if number in seen:
                raise ValueError(
                    f"parameters {seen[number]!r} and {name!r} must have different noise streams, "
                    f"got {number} for both; rename one, or pass parameters without names"
                )
            seen[number] = name

    def _check_groups(self, state_dict: Any) -> None:
        super()._check_groups(state_dict)
        for group in state_dict["param_groups"]:
            version = group["noise_version"]
            if version != NOISE_VERSION:
                raise ValueError(
                    f"noise_version must be {NOISE_VERSION}, got {version!r}: the run was recorded "
                    f"with another noise and cannot go on with this one; install the version of "
                    f"zoopt that wrote it"
                )
        self._check_run(state_dict["param_groups"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every zoopt optimizer; drops probes that are pending.

        Raises:
            ValueError: also if the run was recorded with another version of the noise.
        """
        super().load_state_dict(state_dict)
        self._pending = None


def _check_param(param: Tensor) -> None:
    """Raise unless the parameter is a plain dense floating-point tensor."""
    remedy = (
        "pass only parameters to be trained, [p for p in model.parameters() if p.requires_grad]"
    )
    wrapper: bool = is_traceable_wrapper_subclass(param)
    if wrapper:
        raise TypeError(
            f"a parameter must be a plain tensor, got the subclass {type(param).__name__}, whose "
            f"elements zoopt cannot perturb; {remedy}"
        )
    if param.layout != torch.strided:
        raise TypeError(f"a parameter must be dense, got layout {param.layout}; {remedy}")
    if param.dtype not in DTYPES:
        kind = "complex" if param.dtype.is_complex else "of this dtype"
        hint = "use torch.view_as_real" if param.dtype.is_complex else remedy
        raise TypeError(
            f"a parameter must be float32, bfloat16, float16 or float64, got {param.dtype}; "
            f"parameters {kind} have no perturbation: {hint}"
        )
