"""HiZOO: zeroth-order descent preconditioned by a diagonal Hessian estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from zoopt.checks import check_number
from zoopt.distributed.exchange import Job, Parallel
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.kernels.descent.rule import Shape
from zoopt.kernels.noise.key import Distribution, NoiseKey
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.registry import register
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.chunks import chunks
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.noise import Elementwise, Noise
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Evaluation, Outcome, PendingProbe, three_point
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Site


def smoothed(
    H: Tensor, z: Iterable[Tensor], D: Sequence[float], alpha: float, eps: float
) -> Tensor:
    """H <- (1 - alpha) H + alpha mean_j(c_j H z_j^2),   c_j = D_j / (2 eps^2).

    Args:
        H: the diagonal of the Hessian, (d,).
        z: n directions, (d,) each, generated one after the other; each is overwritten.
        D: |L(theta + eps d_j) + L(theta - eps d_j) - 2 L(theta)|, n of them; d_j = z_j / sqrt(H).
        alpha: the share of the new estimate.
    """
    growth = H.new_full(H.shape, 1.0 - alpha)
    for z_j, a_j in zip(z, growths(D, alpha, eps), strict=True):
        growth.add_(z_j.square_().mul_(a_j))
    return growth.mul_(H)


def growths(D: Sequence[float], alpha: float, eps: float) -> list[float]:
    """The factors of each z_j^2: alpha c_j / n."""
    scale = alpha / (2.0 * eps**2 * len(D))
    return [scale * D_j for D_j in D]


class Preconditioned(Elementwise):
    """z / sqrt(H), elementwise.

    Args:
        key: the parameter's noise.
        hessian: H, of the parameter's shape, positive.
    """

    def __init__(self, key: NoiseKey, hessian: Tensor) -> None:
        super().__init__(key)
        self.hessian = hessian.view(-1)

    def combine(self, theta: Tensor, coefficients: Coefficients, start: int) -> Tensor:
        """As in `Chunkwise`."""
        noise = super().combine(theta, coefficients, start)
        return noise.div_(self.hessian[start : start + theta.numel()].sqrt())

    def shaping(
        self, coefficients: Coefficients, gradient: Coefficients
    ) -> tuple[Shape, Tensor | None]:
        """As in `Elementwise`."""
        return Shape("scaled"), self.hessian


@register("hizoo", "zeroth-order")
class HiZOO(ZerothOrderOptimizer):
    r"""Zeroth-order SGD with a diagonal Hessian (Zhao et al., 2024, arXiv:2402.15173).

    With d_j = z_j / sqrt(H), H of ones at first, all operations elementwise,

        g_j    = [L(theta + zo_eps d_j) - L(theta - zo_eps d_j)] / (2 zo_eps)
        theta <- (1 - lr weight_decay) theta - lr mean_j(g_j d_j)
        c_j    = |L(theta + zo_eps d_j) + L(theta - zo_eps d_j) - 2 L(theta)| / (2 zo_eps^2)
        H     <- (1 - alpha) H + alpha mean_j(c_j H z_j^2)              alpha = hessian_smooth

    so that E[ghat] is grad L / H. A step costs 2 num_probes + 1 forward passes.

    State, in bytes a parameter element: 4 (8 for float64): `hessian`, float32 for narrow
    parameters too, since in bfloat16 (1 - alpha) H is H.

    Args:
        params, lr, zo_eps, weight_decay, num_probes, distribution, perturbation, rounding,
            max_projected_grad, blocks, block_order, maximize, seed, process_group,
            parallel, record: as for `MeZO`.
        hessian_smooth: alpha; default 1e-8 (paper; 1e-6 for small models).

    Raises:
        TypeError, ValueError: as for `MeZO`.

    Differs from the authors' code: theta descends along the directions that were probed, scaled by
    the same H, and H is kept in float32.

    Example:
        >>> opt = zoopt.HiZOO(model.parameters(), lr=1e-6)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    alike = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-6,
        *,
        hessian_smooth: float = 1e-8,
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_probes: int = 1,
        distribution: Distribution = "normal",
        perturbation: PerturbationMode = "auto",
        rounding: RoundingMode = "auto",
        max_projected_grad: float | None = None,
        blocks: Blocks = None,
        block_order: BlockOrder = "cyclic",
        maximize: bool = False,
        seed: int | None = None,
        process_group: Job = None,
        parallel: Parallel = "data",
        record: str | Path | None = None,
    ) -> None:
        super().__init__(
            params,
            hyperparameters(locals()),
            seed=seed,
            process_group=process_group,
            parallel=parallel,
            record=record,
        )

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """`hessian`, in the accumulator's dtype."""
        return {"hessian": TensorSpec(tuple(param.shape), accumulator_dtype(param.dtype))}

    def _steps_runs(self, group: Group) -> bool:
        return True

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_number("hessian_smooth", group["hessian_smooth"], low=0.0, high=1.0, open_high=True)

    def _initialise(self, param: Tensor, group: Group, number: int) -> None:
        self.state[param]["hessian"].fill_(1.0)

    def _direction(self, param: Tensor, group: Group, number: int, *, virtual: bool) -> Direction:
        hessian: Tensor = self._state(param, group)["hessian"]
        key = NoiseKey(group["seed"], number, distribution=group["distribution"])
        return Preconditioned(key, hessian)

    def _evaluate(self, evaluation: Evaluation, pending: PendingProbe) -> Sequence[Outcome]:
        return three_point(evaluation, pending.draws)

    def _usable(self, outcome: Outcome) -> Outcome:
        outcome = super()._usable(outcome)
        scale = min(float(group["zo_eps"]) for group in self.param_groups)
        if abs(outcome.curvature) / (2.0 * scale**2) > self._largest_grad:
            return dataclasses.replace(outcome, delta=math.nan)
        return outcome

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        self._descend(site, pending, offset, self._weights(site.group, pending), progress)
        if pending.kept:
            self._update_hessian(site, pending, progress.next)

    def _update_hessian(self, site: Site, pending: PendingProbe, progress: Progress) -> None:
        direction = site.direction
        assert isinstance(direction, Preconditioned)
        noise, alpha = Noise(direction.key), float(site.group["hessian_smooth"])
        differences = [abs(pending.curvatures[j]) for j in pending.kept]
        if noise.queued(
            "curve",
            direction.hessian,
            progress,
            draws=[pending.draws[j] for j in pending.kept],
            coefficients=growths(differences, alpha, site.zo_eps),
            base=1.0 - alpha,
        ):
            return
        for chunk in chunks(direction.hessian, progress):
            hessian = direction.hessian[chunk]
            z = (noise.combine(hessian, {pending.draws[j]: 1.0}, chunk.start) for j in pending.kept)
            hessian.copy_(smoothed(hessian, z, differences, alpha, site.zo_eps))
