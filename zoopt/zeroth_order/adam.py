"""Adam on a zeroth-order estimate: with stored moments, with none, or with one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zoopt.checks import (
    check_betas,
    check_choice,
    check_nonnegative_int,
    check_number,
    check_positive_int,
)
from zoopt.distributed.exchange import Job, Parallel
from zoopt.dtypes import RoundingMode
from zoopt.kernels import adam_window_
from zoopt.kernels.batch import Batch
from zoopt.kernels.descent.rule import Rule
from zoopt.kernels.noise.key import Distribution
from zoopt.optimizer import STEP, Group, Params, TensorSpec, hyperparameters
from zoopt.registry import Variant, register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.chunks import whole
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.mask import Mask
from zoopt.zeroth_order.engine.noise import Elementwise, Noise
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator, PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Bucket, Site
from zoopt.zeroth_order.engine.sparse import SparseZerothOrder
from zoopt.zeroth_order.engine.window import check_past, check_window, extended, window_steps

AdamState = Literal["dense", "window", "scalar"]


def adam(
    ghat: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam on the estimate ghat = mean_j(g_j z_j): m, v and what theta receives.

    m <- b1 m + (1 - b1) ghat,   v <- b2 v + (1 - b2) ghat^2
    theta <- theta - lr mhat / (sqrt(vhat) + eps),   mhat = m / (1 - b1^t),   vhat = v / (1 - b2^t)

    Args:
        ghat, m, v: of one shape.
        t: number of the step, from 1.
    """
    b1, b2 = betas
    m = (m * b1).add_(ghat * (1.0 - b1))
    v = (v * b2).add_((ghat * ghat).mul_(1.0 - b2))
    root = v.div(1.0 - b2**t).sqrt_().add_(eps)
    return m, v, m.mul(-lr / (1.0 - b1**t)).div_(root)


def scalar(
    ghat: Mapping[int, float], v: float, *, t: int, b2: float, eps: float
) -> dict[int, float]:
    """MEAZO, Adam with one second moment for all elements. theta descends along

        ghat / (sqrt(vhat) + eps),   v <- b2 v + (1 - b2) mean_j(g_j^2),   vhat = v / (1 - b2^t)

    Args:
        ghat: j -> coefficient of z_j in the estimate; the result has the same form.
        v: including the present step.
        t: number of the step, from 1.
    """
    rms = (v / (1.0 - b2**t)) ** 0.5
    scale = 1.0 / (rms + eps) if rms or eps else 0.0
    return {j: scale * g for j, g in ghat.items()}


@register(
    "zo-adam",
    "zeroth-order",
    Variant(),
    Variant("window", {"state": "window"}),
    Variant("scalar", {"state": "scalar"}),
)
class ZOAdam(SparseZerothOrder):
    r"""Adam (Kingma & Ba, 2015) on the estimate ghat = mean_j(g_j z_j), with decoupled decay.

    `state="dense"`: torch's AdamW with ghat instead of the gradient,

        m <- b1 m + (1 - b1) ghat,  v <- b2 v + (1 - b2) ghat^2
        theta <- (1 - lr weight_decay) theta - lr mhat / (sqrt(vhat) + eps)

    `state="window"`: both moments rebuilt from the last h steps' directions in the one pass over
    the weights that updates them, nothing stored (proposed by Malladi et al., 2023, appendix B.2):

        m = sum_{i<h} (1 - b1) b1^i ghat_{t-i} / (1 - b1^min(t,h)),   v alike with b2 and ghat^2
        theta <- (1 - lr weight_decay) theta - lr m / (sqrt(v) + eps)

    `state="scalar"`: one number a param group (MEAZO), no first moment,

        v <- b2 v + (1 - b2) mean_j(g_j^2)
        theta <- (1 - lr weight_decay) theta - lr ghat / (sqrt(vhat) + eps)

    State, in bytes a parameter element: dense 8 (16 for float64) and 8 a parameter (`step`);
    window and scalar 0; with `mask="magnitude"`, 4 a parameter.

    Args:
        params, zo_eps, weight_decay, num_probes, estimator, distribution, perturbation, rounding,
            max_projected_grad, mask, density, blocks, block_order, maximize, seed, process_group,
            parallel, record: as for `MeZO`.
        lr: learning rate; default 1e-5 (a hundredth of Adam's own: because of the estimate's noise,
            a step is as long as Adam's but nearly random in direction). Scalar: as for `MeZO`.
        betas: decay of the moments; default by state, (0.9, 0.999), or (0.7, 0.9) for a window,
            whose averages cannot be longer than the window.
        eps: added to the denominator; default 1e-8 (Adam).
        state: `"dense"`, `"window"` or `"scalar"`.
        window: the h of `state="window"`; default 10. A step generates the noise of h directions.

    Raises:
        TypeError, ValueError: as for `MeZO`; a window with `mask="magnitude"`.

    Example:
        >>> opt = zoopt.ZOAdam(model.parameters(), lr=1e-5, state="window")
        >>> for batch in loader:
        ...     loss = opt.step(lambda: model(**batch).loss)
    """

    #: g^2 and z^2 are multiplied.
    _largest_grad = 2.0**50

    scripted = True
    alike = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-5,
        *,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        state: AdamState = "dense",
        window: int = 10,
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_probes: int = 1,
        estimator: Estimator = "two-sided",
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
        check_choice("state", state, get_args(AdamState))
        if betas is None:
            defaults["betas"] = (0.7, 0.9) if state == "window" else (0.9, 0.999)
        defaults |= {"past": (), "updates": 0, "exp_avg_sq": 0.0}
        super().__init__(
            params,
            defaults,
            seed=seed,
            process_group=process_group,
            parallel=parallel,
            record=record,
        )

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """Dense: `exp_avg` and `exp_avg_sq` in the accumulator's dtype, and `step`."""
        declared = super().declared_state(param, group)
        moving = self._moving(param, group)
        if group["state"] == "dense" and moving is not None:
            declared |= {"exp_avg": moving, "exp_avg_sq": moving, "step": STEP}
        return declared

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_past("past", group["past"])
        check_nonnegative_int("updates", group["updates"])
        check_number("exp_avg_sq", group["exp_avg_sq"], low=0.0)

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_betas(group["betas"])
        check_number("eps", group["eps"], low=0.0)
        check_choice("state", group["state"], get_args(AdamState))
        check_positive_int("window", group["window"])
        if group["state"] == "window":
            check_window("window", group)

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group = site.group
        if not pending.kept:
            self._descend(site, pending, offset, {}, progress)
        elif group["state"] == "dense":
            self._update_dense(site, pending, offset, progress)
        elif group["state"] == "window":
            self._update_window(site, pending, offset, progress)
        else:
            coefficients = scalar(
                self._weights(group, pending),
                self._mean_square(group, pending),
                t=group["updates"] + 1,
                b2=float(group["betas"][1]),
                eps=float(group["eps"]),
            )
            self._descend(site, pending, offset, coefficients, progress)

    def _update_dense(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group, direction = site.group, site.direction
        state = self._state(site.param, group)
        exp_avg, exp_avg_sq = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        step, lr, eps = int(state["step"]) + 1, float(group["lr"]), float(group["eps"])
        b1, b2 = map(float, group["betas"])

        def rule(gradient: Tensor, chunk: slice) -> Tensor:
            moments = exp_avg[chunk], exp_avg_sq[chunk]
            first, second, update = adam(gradient, *moments, t=step, lr=lr, betas=(b1, b2), eps=eps)
            progress.hold((exp_avg[chunk], first), (exp_avg_sq[chunk], second))
            return update

        in_registers = Rule(
            "adam", (b1, 1.0 - b1, b2, 1.0 - b2, 1.0 - b2**step, -lr / (1.0 - b1**step), eps)
        )
        moments = {"first": exp_avg, "second": exp_avg_sq}
        self._update_elements(site, pending, offset, progress, rule, in_registers, moments)
        counter = {"steps": state["step"]}
        assert isinstance(direction, Elementwise)
        if not direction.queued(_count, site.param, progress.next, beside=counter):
            for _ in whole(state["step"], progress.next):
                state["step"] += 1

    def _alike(self, bucket: Bucket) -> bool:
        """As in `ZerothOrderUpdates`: not where parameters have taken other numbers of steps."""
        group = bucket.first.group
        if len(bucket.sites) == 1 or group["state"] != "dense":
            return True
        steps = bucket.kept.get("steps")
        if steps is None:
            states = [self._state(param, group) for param in bucket.params]
            steps = bucket.kept["steps"] = [state["step"] for state in states]
        return len(set(map(Tensor.item, steps))) == 1

    def _update_window(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group, direction = site.group, site.direction
        assert isinstance(direction, Noise)
        decay = self._decay(group, pending)
        steps = window_steps(
            group["past"], pending.block, self._weights(group, pending), group["window"]
        )
        first, second = (_window_weights(float(beta), len(steps)) for beta in group["betas"])
        draws = [draw for step in steps for draw, _ in step]
        last = [i == len(step) - 1 for step in steps for i in range(len(step))]
        # Directions that were evaluated but left out are still in the offset: a step of weight 0.
        absent = [draw for draw in offset if draw not in draws]
        none = [0.0] * len(absent)
        options: dict[str, Any] = {
            "coefficients": [-decay * offset.get(draw, 0.0) for draw in absent + draws],
            "gradients": none + [weight for step in steps for _, weight in step],
            "first": none + [first[i] for i, step in enumerate(steps) for _ in step],
            "second": none + [second[i] for i, step in enumerate(steps) for _ in step],
            "closes": [False] * len(absent) + last,
            "eps": float(group["eps"]),
            "step_size": -float(group["lr"]),
            "draws": absent + draws,
            "decay": decay,
            "rounding": site.rounding,
        }
        if direction.queued("adam_window", site.param, progress, **options):
            return
        with direction.elements(site.param, progress) as elements:
            for _ in whole(elements, progress):
                adam_window_(elements, key=direction.key, **options)

    def _closing(self, group: Group, pending: PendingProbe) -> dict[str, Any]:
        if group["state"] == "window":
            weights = self._weights(group, pending)
            return {"past": extended(group["past"], pending.block, weights, group["window"])}
        if group["state"] == "scalar":
            mean_square = self._mean_square(group, pending)
            return {"exp_avg_sq": mean_square, "updates": group["updates"] + 1}
        return {}

    def _mean_square(self, group: Group, pending: PendingProbe) -> float:
        """The group's v, including the present step."""
        grads = self._projected_grads(pending, group)
        beta2 = float(group["betas"][1])
        present = sum(g * g for g in grads) / len(grads)
        return beta2 * float(group["exp_avg_sq"]) + (1.0 - beta2) * present


def _count(params: Batch, *, steps: Sequence[Tensor]) -> None:
    """Count a step of each parameter."""
    torch._foreach_add_(list(steps), 1)


def _window_weights(beta: float, steps: int) -> list[float]:
    """(1 - beta) beta^age / (1 - beta^steps), oldest first."""
    total = 1.0 - beta**steps
    return [(1.0 - beta) * beta**age / total for age in reversed(range(steps))]
