"""MeZO: in-place zeroth-order SGD (Malladi et al., 2023, arXiv:2305.17333)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoopt.checks import check_number
from zoopt.distributed.exchange import Job, Parallel
from zoopt.dtypes import RoundingMode
from zoopt.kernels.noise.key import Distribution
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.registry import Variant, register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.mask import Mask
from zoopt.zeroth_order.engine.noise import Elementwise
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator, PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Site
from zoopt.zeroth_order.engine.sparse import SparseZerothOrder
from zoopt.zeroth_order.engine.updates import descent, withdrawn
from zoopt.zeroth_order.engine.window import check_past, check_window, extended, window_steps


def mezo(
    steps: Sequence[Sequence[tuple[int, float]]],
    offset: Coefficients,
    *,
    mu: float,
    lr: float,
    decay: float,
) -> dict[int, float]:
    """MeZO once the losses are known, as the one sum of directions that it adds to theta.

        g_j    = [L(theta + eps z_j) - L(theta - eps z_j)] / (2 eps)     see `engine.probe`
        buf    = sum_{i<h} mu^i mean_j(g_j z_j)_{t-i}                    h = 1: this step's
        theta <- decay theta - lr buf

    Args:
        steps: the last h steps, oldest first, each the pairs (j, g_j / n) of its n directions.
        offset: theta is displaced by sum_j offset[j] z_j; the same pass removes that.

    Returns:
        j -> c_j, for theta <- decay theta + sum_j c_j z_j.
    """
    buf: dict[int, float] = {}
    for i, step in enumerate(reversed(steps)):
        buf |= {j: mu**i * g for j, g in step}
    return descent(offset, buf, lr=lr, decay=decay)


class MomentumSGD(SparseZerothOrder):
    """theta <- decay theta - lr buf, buf <- momentum buf + sum_j weight_j z_j.

    Group keys: `momentum` and `momentum_window` (None: buf is stored; h: rebuilt from the last h
    steps' directions).
    """

    scripted = True
    alike = True

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """`momentum_buffer` if it is stored, in the accumulator's dtype; a mask's `threshold`."""
        declared = super().declared_state(param, group)
        if _stores_buffer(group):
            moving = self._moving(param, group)
            if moving is not None:
                declared["momentum_buffer"] = moving
        return declared

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_past("window", group["window"])

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_number("momentum", group["momentum"], low=0.0, high=1.0, open_high=True)
        check_window("momentum_window", group)
        if group["momentum_window"] is not None and not group["momentum"]:
            raise ValueError(
                f"momentum_window must be None without momentum, got "
                f"{group['momentum_window']!r}; set momentum, 0.9 say"
            )

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group, direction = site.group, site.direction
        if not pending.kept:
            self._descend(site, pending, offset, {}, progress)
        elif _stores_buffer(group):
            assert isinstance(direction, Elementwise)
            decay = self._decay(group, pending)
            direction.momentum_(
                site.param,
                self._state(site.param, group)["momentum_buffer"],
                withdrawn(offset, decay),
                self._weights(group, pending),
                momentum=float(group["momentum"]),
                step_size=-float(group["lr"]),
                decay=decay,
                rounding=site.rounding,
                progress=progress,
            )
        else:
            present = self._weights(group, pending)
            coefficients = mezo(
                window_steps(group["window"], pending.block, present, _length(group)),
                offset,
                mu=float(group["momentum"]),
                lr=float(group["lr"]),
                decay=self._decay(group, pending),
            )
            self._add(site, pending, coefficients, progress)

    def _closing(self, group: Group, pending: PendingProbe) -> dict[str, Any]:
        if group["momentum_window"] is None:
            return {}
        weights = self._weights(group, pending)
        return {"window": extended(group["window"], pending.block, weights, _length(group))}


@register(
    "mezo",
    "zeroth-order",
    Variant(),
    Variant("in place", {"perturbation": "inplace"}),
    Variant("momentum window", {"momentum": 0.9, "momentum_window": 10}),
    Variant("virtual", {"perturbation": "virtual"}, planned=False),
)
class MeZO(MomentumSGD):
    r"""SGD on a gradient estimated from forward passes; its directions are never stored.

    With a direction z ~ N(0, I) that is regenerated from the seed wherever it is needed,

        g      = [L(theta + zo_eps z) - L(theta - zo_eps z)] / (2 zo_eps)     (two-sided)
        g      = [L(theta + zo_eps z) - L(theta)] / zo_eps                    (one-sided)
        theta <- (1 - lr weight_decay) theta - lr mean_j(g_j z_j)             over num_probes

    A step costs 2 num_probes forward passes (one-sided: 1 + num_probes) and, in place, one more
    pass over the weights than that. It needs the memory of inference: the closure runs without
    autograd.

    State, in bytes a parameter element: 0; with `momentum` and no `momentum_window`, 4 (8 for
    float64); with `mask="magnitude"`, 4 a parameter. The run's position (seed, step, draw, and the
    window's pairs) is in the param groups.

    Args:
        params: parameters, param groups, or `model.named_parameters()`. With names, a parameter's
            directions belong to its name, otherwise to its position.
        lr: learning rate; default 1e-6 (paper, full fine-tuning of OPT; LoRA 1e-4, prefix 1e-2).
        zo_eps: perturbation scale; default 1e-3 (paper; LoRA 1e-2, prefix 1e-1).
        momentum: mu in buf <- mu buf + mean_j(g_j z_j), theta <- ... - lr buf; default 0 (paper).
        momentum_window: None for a stored buffer, or the number h of steps, the present one
            included, whose directions are regenerated: buf = sum_{i<h} mu^i mean_j(g_j z_j)_{t-i}.
        weight_decay: decoupled, as in AdamW; default 0 (paper).
        num_probes: the n of n-SPSA (paper, algorithm 2); default 1.
        estimator: `"two-sided"` (paper) or `"one-sided"`.
        distribution: `"normal"` (paper) or `"rademacher"`.
        perturbation: `"inplace"` (paper): three passes over the weights a step, restored and
            updated in one. `"virtual"`: weights are never written; each operator reads a temporary
            theta + zo_eps z, which is freed after it (an LSTM takes all of its weights at once, so
            it has temporaries of all of them). `"auto"`: in place for float32 and float64; virtual
            for bfloat16 and float16, where +zo_eps, -2 zo_eps, +zo_eps would change two fifths of
            the weights with nothing learned.
        rounding: of the update; `"nearest"`, `"stochastic"`, or `"auto"`: stochastic for bfloat16
            and float16, where rounding to nearest loses most of a small update.
        max_projected_grad: clip each g to this magnitude; default None (paper).
        mask: which elements move. None: all (paper). `"random"`: each with probability `density`,
            drawn again for each direction; never stored. `"magnitude"`: those with |theta| at or
            below the parameter's `density` quantile when the run began (Sparse MeZO,
            arXiv:2402.15751); in place, a step needs a temporary bool for each element. A dict of
            flat int64 indices by parameter name (without names, by position in the group): those;
            other parameters rest, and state has the indices' shape.
        density: the fraction of elements that move, with `"random"` (a multiple of 2^-16) and
            `"magnitude"`; default 1.
        blocks: block-wise descent: a step perturbs and updates one block, and the others cost
            nothing. `"groups"`: each param group is a block; a list of shell patterns of names
            (`"model.layers.0.*"`): the first one that matches decides a parameter's block.
        block_order: `"cyclic"`, `"random"` (from the seed), or `"all"` at once; default cyclic.
        maximize: ascend instead of descend.
        seed: 64 bits; default, that of torch (`torch.initial_seed()`, which is read, not changed);
            in a process group rank 0's, and processes whose seeds differ are refused.
        process_group: the ranks that take steps together: a group such as
            `torch.distributed.group.WORLD`, a DeviceMesh of one dimension, or a DeviceMesh of two
            dimensions named "data" and "probes". Ranks exchange only numbers, and have bit for bit
            equal weights. Default None: this process steps alone.
        parallel: `"data"`: each rank has its own micro-batch, evaluated along the same directions;
            the loss is the mean of the ranks' losses by `step(closure, weight=...)`. `"probes"`:
            all ranks have the same micro-batch, and the evaluations are divided over them.
        record: a new file to which the run is recorded, as by `self.record(path)`: parameters need
            names.

    lr, zo_eps, weight_decay, momentum, max_projected_grad, distribution, perturbation, rounding,
    mask and density can differ between param groups. With different zo_eps, each group's g is
    divided by its own.

    Raises:
        TypeError, ValueError: an argument out of range; a parameter that is complex, integer,
            sparse or a tensor subclass; two parameter names with the same noise.

    Non-finite losses are skipped, counted in `skipped_probes` and warned of once; a step whose
    probes were all skipped changes nothing but the counters. `last_step` is a `StepRecord`.
    A parameter that is unfrozen while a window is in use also moves along the window's directions.

    The result depends on the seed, the closure and the parameters' names (or order), not on
    chunking, on the number of threads or on torch's generators; all of a step's evaluations see
    the same torch RNG state, which is afterwards as after a single evaluation.

    Differs from the authors' code: directions do not come from torch's generator, parameters of
    equal shape have different ones, restoring and updating are one pass (one rounding), gradient
    accumulation works (`probe`), and the model's training mode is the user's own.

    Example:
        >>> opt = zoopt.MeZO(model.parameters(), lr=1e-6)
        >>> for batch in loader:
        ...     loss = opt.step(lambda: model(**batch).loss)
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-6,
        *,
        zo_eps: float = 1e-3,
        momentum: float = 0.0,
        momentum_window: int | None = None,
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
        super().__init__(
            params,
            {**hyperparameters(locals()), "window": ()},
            seed=seed,
            process_group=process_group,
            parallel=parallel,
            record=record,
        )


def _length(group: Group) -> int:
    return group["momentum_window"] or 1


def _stores_buffer(group: Group) -> bool:
    return bool(group["momentum"]) and group["momentum_window"] is None
