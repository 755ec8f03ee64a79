"""Conservative zeroth-order SGD: a step is tried, and taken only if the loss agrees."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from zoopt.checks import check_choice
from zoopt.distributed.exchange import Job, Parallel
from zoopt.dtypes import RoundingMode
from zoopt.kernels.noise.key import Distribution
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.closure import Closure
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.mask import Mask
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator, Evaluation, PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Displacement, Site, along
from zoopt.zeroth_order.engine.sparse import SparseZerothOrder

Candidates = Literal["three", "reused"]


def conservative(
    L: Callable[[Sequence[Displacement]], Sequence[float]],
    u: Callable[[float], Displacement],
    base: float | None,
    probed: Sequence[tuple[float, Displacement]] | None,
    *,
    maximize: bool,
) -> Displacement:
    """Conservative SGD's step from theta: the best of theta, theta - u and theta + u.

        u      = lr mean_j(g_j z_j)
        theta <- decay argmin{L(theta), L(theta - u), L(theta + u)}       ties: the first of them

    Args:
        L: displacements from theta -> the losses there.
        u: s -> the displacement s u.
        base: L(theta), if the probe has measured it.
        probed: losses and displacements eps z_j of the probe, to compare instead of theta + u.

    Returns:
        The displacement; none if no loss is finite.
    """
    places: list[Displacement] = [] if base is not None else [_stay]
    places += [u(-1.0)] if probed is not None else [u(-1.0), u(1.0)]
    points: list[tuple[float, Displacement]] = [] if base is None else [(base, _stay)]
    points += [*zip(L(places), places, strict=True), *(probed or ())]
    finite = [point for point in points if math.isfinite(point[0])]
    best = max if maximize else min
    return best(finite, key=_loss)[1] if finite else _stay


@register("zo-conservative-sgd", "zeroth-order")
class ZOConservativeSGD(SparseZerothOrder):
    r"""SGD that keeps the best of several points (Zhang et al., 2024, arXiv:2402.11592).

    With u = lr mean_j(g_j z_j),

        candidates="three"    theta <- the best of theta, theta - u, theta + u
        candidates="reused"   theta <- the best of theta, theta - u and the probed
                              theta + zo_eps z_j, whose losses are already known

    and then theta <- (1 - lr weight_decay) theta. Ties go to the earlier candidate. "three" costs
    3 forward passes besides the probe's (2 if the probe is one-sided, since it has measured the
    loss at theta): 5 in all for one two-sided probe. "reused" costs 1 besides the 2 of a one-sided
    probe: 3.

    The candidates are compared on the closure that the step is given, so the closure must evaluate
    the same function each time, and `probe` is refused: accumulate inside the closure.

    State, in bytes a parameter element: 0; with `mask="magnitude"`, 4 a parameter.

    Args:
        params, lr, zo_eps, weight_decay, num_probes, distribution, rounding, max_projected_grad,
            mask, density, blocks, block_order, maximize, seed, process_group,
            parallel, record: as for `MeZO`.
        candidates: `"three"` or `"reused"`.
        estimator: `"two-sided"` or `"one-sided"`; default by candidates, `"reused"` is one-sided.
        perturbation: as for `MeZO`, but `"auto"` is virtual for all dtypes: a step that is not
            taken then leaves every bit as it was (in place, up to rounding).

    Raises:
        TypeError, ValueError: as for `MeZO`; `"reused"` with two-sided probes.
        RuntimeError: `probe`.

    Differs from the benchmark's code, which by default takes and undoes its steps with AdamW, so
    that undoing does not restore the weights.

    Example:
        >>> opt = zoopt.ZOConservativeSGD(model.parameters(), lr=1e-5)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    _chosen: Displacement | None = None

    scripted = True
    alike = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-6,
        *,
        candidates: Candidates = "three",
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_probes: int = 1,
        estimator: Estimator | None = None,
        distribution: Distribution = "normal",
        perturbation: PerturbationMode = "auto",
        rounding: RoundingMode = "auto",
        max_projected_grad: float | None = None,
        mask: Mask | None = None,
        density: float = 1.0,
        blocks: Blocks = None,
        block_order: BlockOrder = "cyclic",
        maximize: bool = False,
        seed: int | None = None,
        process_group: Job = None,
        parallel: Parallel = "data",
        record: str | Path | None = None,
    ) -> None:
        defaults = hyperparameters(locals())
        if estimator is None:
            defaults["estimator"] = "one-sided" if candidates == "reused" else "two-sided"
        super().__init__(
            params,
            defaults,
            seed=seed,
            process_group=process_group,
            parallel=parallel,
            record=record,
        )

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_choice("candidates", group["candidates"], get_args(Candidates))
        if group["candidates"] == "reused" and group["estimator"] != "one-sided":
            raise ValueError(
                f"estimator must be 'one-sided' with candidates='reused', got "
                f"{group['estimator']!r}: a two-sided probe does not evaluate theta"
            )

    def _check_run(self, groups: list[Group]) -> None:
        super()._check_run(groups)
        values = [(group["candidates"], group["maximize"]) for group in groups]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"candidates and maximize must be the same in every param group, got {values}: "
                f"one loss decides for all of them"
            )

    def _virtual(self, param: Tensor, group: Group) -> bool:
        return bool(group["perturbation"] != "inplace")

    def probe(self, closure: Closure, *, weight: float = 1.0) -> float:
        """Refused: candidates can only be compared on a single closure."""
        raise RuntimeError(
            "ZOConservativeSGD compares candidates on the closure of its step, so it cannot add up "
            "probes of several; call step(closure) with one that loops over the micro-batches"
        )

    def _refine(self, evaluation: Evaluation, pending: PendingProbe) -> None:
        self._chosen = None
        if not pending.kept:
            return
        run = self.param_groups[0]
        probed = None
        if run["candidates"] == "reused":
            probed = [(pending.losses[j][0], along(pending.draws[j], 1.0)) for j in pending.kept]
        self._chosen = conservative(
            evaluation.losses_at,
            functools.partial(self._step_along, pending),
            pending.losses[0][1] if run["estimator"] == "one-sided" else None,
            probed,
            maximize=run["maximize"],
        )

    def _step_along(self, pending: PendingProbe, scale: float) -> Displacement:
        """scale times u, by each group's own lr."""

        def displacement(site: Site) -> Coefficients:
            weights = self._weights(site.group, pending)
            return {draw: scale * float(site.group["lr"]) * w for draw, w in weights.items()}

        return displacement

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        decay = self._decay(site.group, pending)
        target = dict(self._chosen(site)) if self._chosen else {}
        for draw, coefficient in offset.items():
            target[draw] = target.get(draw, 0.0) - coefficient
        target = {draw: decay * target[draw] for draw in sorted(target) if target[draw]}
        self._add(site, pending, target, progress)


def _stay(site: Site) -> Coefficients:
    return {}


def _loss(candidate: tuple[float, Any]) -> float:
    return candidate[0]
