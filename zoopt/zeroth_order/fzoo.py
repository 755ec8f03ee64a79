"""FZOO: many one-sided probes, and a step normalised by the spread of their losses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from zoopt.distributed.exchange import Job, Parallel
from zoopt.dtypes import RoundingMode
from zoopt.kernels.noise.key import Distribution
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.mask import Mask
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import PendingProbe
from zoopt.zeroth_order.mezo import MomentumSGD


def normalised(deltas: Mapping[int, float]) -> dict[int, float]:
    """The coefficients of u_i in sum_i (L_i - L_0) u_i / (N std_i(L_i)); 0 where losses are equal.

    Args:
        deltas: L_i - L_0, N of them; their standard deviation is that of the L_i.
    """
    N = len(deltas)
    std = statistics.stdev(deltas.values()) if N > 1 else 0.0
    return {i: delta / (N * std) if std else 0.0 for i, delta in deltas.items()}


@register("fzoo", "zeroth-order")
class FZOO(MomentumSGD):
    r"""Normalised SGD from N one-sided probes along signs (Dang et al., 2025, arXiv:2506.09034).

        L_i   = L(theta + zo_eps u_i),  L_0 = L(theta),  u_i Rademacher
        theta <- (1 - lr weight_decay) theta - lr sum_i (L_i - L_0) u_i / (N std_i(L_i))

    std (with N - 1) estimates zo_eps times the gradient's norm, so that steps have about the same
    length for every scale of the loss. If all losses of a step are equal, only the decay is
    applied. A step costs N + 1 forward passes.

    State, in bytes a parameter element: 0; with `momentum` and no `momentum_window`, 4 (8 for
    float64); with `mask="magnitude"`, 4 a parameter.

    Args:
        params, weight_decay, momentum, momentum_window, perturbation, rounding, mask, density,
            blocks, block_order, maximize, seed, process_group, parallel, record: as for `MeZO`.
        lr: learning rate; default 5e-5 (paper).
        zo_eps: perturbation scale; default 1e-4 (paper).
        num_probes: the N, at least 2; default 8 (paper).
        distribution: default `"rademacher"` (paper).

    Raises:
        TypeError, ValueError: as for `MeZO`; fewer than two probes.

    Differs from the paper: its batched forward, which evaluates the N signs in one pass, is not
    used; `zoopt.EvolutionStrategy` has one for low-rank directions.

    Example:
        >>> opt = zoopt.FZOO(model.parameters(), lr=5e-5)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 5e-5,
        *,
        zo_eps: float = 1e-4,
        momentum: float = 0.0,
        momentum_window: int | None = None,
        weight_decay: float = 0.0,
        num_probes: int = 8,
        distribution: Distribution = "rademacher",
        perturbation: PerturbationMode = "auto",
        rounding: RoundingMode = "auto",
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
        defaults = {**hyperparameters(locals()), "estimator": "one-sided", "window": ()}
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
        if group["num_probes"] < 2:
            raise ValueError(
                f"num_probes must be at least 2, got {group['num_probes']}: one loss has no spread"
            )

    def _weights(self, group: Group, pending: PendingProbe) -> dict[int, float]:
        sign = -1.0 if group["maximize"] else 1.0
        return normalised({pending.draws[j]: sign * pending.deltas[j] for j in pending.kept})
