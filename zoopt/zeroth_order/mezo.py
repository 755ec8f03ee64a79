"""MeZO: in-place zeroth-order SGD (Malladi et al., 2023, arXiv:2305.17333)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoopt.checks import check_bool, check_number, check_positive_int
from zoopt.kernels import apply_, momentum_
from zoopt.kernels.key import Distribution
from zoopt.kernels.ops import accumulator_dtype
from zoopt.optimizer import Group, Params, TensorSpec
from zoopt.zeroth_order.base import ZerothOrderOptimizer
from zoopt.zeroth_order.perturbation import PerturbationMode, RoundingMode, Slot
from zoopt.zeroth_order.probe import Estimator, PendingProbe

#: Past steps of a group, oldest first; each the (draw, weight) pairs of its directions.
Window = tuple[tuple[tuple[int, float], ...], ...]


class MeZO(ZerothOrderOptimizer):
    r"""SGD on a gradient estimated from forward passes; its directions are never stored.

    With a direction z ~ N(0, I) that is regenerated from the seed wherever it is needed,

        g      = [L(theta + zo_eps z) - L(theta - zo_eps z)] / (2 zo_eps)     (two-sided)
        g      = [L(theta + zo_eps z) - L(theta)] / zo_eps                    (one-sided)
        theta <- (1 - lr weight_decay) theta - lr mean_j(g_j z_j)             over num_probes

    A step costs 2 num_probes forward passes (one-sided: 1 + num_probes) and, in place, as many
    passes over the weights and one more. It needs the memory of inference: the closure runs
    without autograd.

    State, in bytes a parameter element: 0; with `momentum` and no `momentum_window`, 4 (8 for
    float64). The run's position (seed, step, draw, and the window's pairs) is in the param groups.

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
            theta + zo_eps z, which dies with the operator (an LSTM, which takes all of its weights
            at once, has temporaries of all of them). `"auto"`: in place for float32 and
            float64; virtual for bfloat16 and float16, where +zo_eps, -2 zo_eps, +zo_eps would
            change two fifths of the weights with nothing learned.
        rounding: of the update; `"nearest"`, `"stochastic"`, or `"auto"`: stochastic for bfloat16
            and float16, where rounding to nearest loses most of a small update.
        max_projected_grad: clip each g to this magnitude; default None (paper).
        maximize: ascend instead of descend.
        seed: 64 bits; default, that of torch (`torch.initial_seed()`, which is read, not changed).

    lr, zo_eps, weight_decay, momentum, max_projected_grad, distribution, perturbation and rounding
    can differ between param groups. With different zo_eps, each group's g is in its own.

    Raises:
        TypeError, ValueError: an argument out of range; a parameter that is complex, integer,
            sparse or a tensor subclass; two parameter names with the same noise.

    Non-finite losses are skipped, counted in `skipped_probes` and warned of once; a step whose
    probes were all skipped changes nothing but the counters. `last_step` is a `StepRecord`.
    A parameter unfrozen while a window is in use joins with the window's directions.

    The result depends on the seed, the closure and the parameters' names (or order), not on
    chunking, on the number of threads or on torch's generators; all of a step's evaluations see
    the same torch RNG state, which afterwards stands where one evaluation would have left it.

    Differs from the authors' code: directions do not come from torch's generator, all equal shapes
    have different ones, restoring and updating are one pass (one rounding), gradient accumulation
    works (`probe`), and the model's training mode is the user's own.

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
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "zo_eps": zo_eps,
            "momentum": momentum,
            "momentum_window": momentum_window,
            "weight_decay": weight_decay,
            "num_probes": num_probes,
            "estimator": estimator,
            "distribution": distribution,
            "perturbation": perturbation,
            "rounding": rounding,
            "max_projected_grad": max_projected_grad,
            "maximize": maximize,
            "window": (),
        }
        super().__init__(params, defaults, seed=seed)

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """`momentum_buffer` if it is stored, in the accumulator's dtype."""
        if not _stores_buffer(group):
            return {}
        return {"momentum_buffer": TensorSpec(tuple(param.shape), accumulator_dtype(param.dtype))}

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("momentum", group["momentum"], low=0.0, high=1.0, open_high=True)
        check_bool("maximize", group["maximize"])
        if group["momentum_window"] is not None:
            check_positive_int("momentum_window", group["momentum_window"])
            if not group["momentum"]:
                raise ValueError(
                    f"momentum_window must be None without momentum, got "
                    f"{group['momentum_window']!r}; set momentum, 0.9 say"
                )

    def _update(self, slot: Slot, pending: PendingProbe, offset: Mapping[int, float]) -> None:
        group = slot.group
        lr = float(group["lr"])
        present = self._weights(group, pending)
        decay = 1.0 - lr * float(group["weight_decay"]) if present else 1.0
        # draw -> what theta receives along it; the last draw's bits round.
        along = {draw: -decay * scale * slot.zo_eps for draw, scale in offset.items()}
        if present and _stores_buffer(group):
            weights = dict(present)
            draws = sorted(along.keys() | weights.keys())
            momentum_(
                slot.param,
                self._state(slot.param, group)["momentum_buffer"],
                [along.get(draw, 0.0) for draw in draws],
                [weights.get(draw, 0.0) for draw in draws],
                momentum=float(group["momentum"]),
                step_size=-lr,
                draws=draws,
                decay=decay,
                rounding=slot.rounding,
                **slot.key.arguments,
            )
            return
        if present:
            window = self._window(group, pending)
            for draw, weight in _windowed(window, float(group["momentum"])).items():
                along[draw] = along.get(draw, 0.0) - lr * weight
        draws = sorted(draw for draw, coefficient in along.items() if coefficient)
        if draws or decay != 1.0:
            apply_(
                slot.param,
                [along[draw] for draw in draws],
                draws=draws,
                decay=decay,
                rounding=slot.rounding if draws else "nearest",
                **slot.key.arguments,
            )

    def _close_group(self, group: Group, pending: PendingProbe) -> None:
        if group["momentum_window"] is not None:
            group["window"] = self._window(group, pending)

    def _weights(self, group: Group, pending: PendingProbe) -> list[tuple[int, float]]:
        """(draw, weight) of the present gradient estimate, sum_j weight_j z_j."""
        grads = self._projected_grads(pending, group)
        sign = -1.0 if group["maximize"] else 1.0
        return [
            (pending.draws[j], sign * g / len(grads))
            for j, g in zip(pending.kept, grads, strict=True)
        ]

    def _window(self, group: Group, pending: PendingProbe) -> Window:
        """The group's window with the present step in it."""
        window: Window = (*group["window"], tuple(self._weights(group, pending)))
        return window[-(group["momentum_window"] or 1) :]


def _windowed(window: Window, momentum: float) -> dict[int, float]:
    """draw -> weight of the momentum that a window spans, oldest first."""
    return {
        draw: momentum**age * weight
        for age, step in reversed(list(enumerate(reversed(window))))
        for draw, weight in step
    }


def _stores_buffer(group: Group) -> bool:
    return bool(group["momentum"]) and group["momentum_window"] is None
