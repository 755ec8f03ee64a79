"""AdamW: the identity projector."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoopt.checks import check_number
from zoopt.first_order import RoundingMode, check_betas
from zoopt.kernels.moments import Format
from zoopt.lowrank.core import ProjectedOptimizer
from zoopt.optimizer import Group, Params, hyperparameters

StateRounding = Literal["stochastic", "nearest"]


class AdamFamily(ProjectedOptimizer):
    """Projected optimizers whose rule is Adam."""

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(group)
        check_number("eps", group["eps"], low=0.0)


class AdamW(AdamFamily):
    r"""AdamW (Loshchilov & Hutter, 2019), with moments in as few bytes as asked for.

    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
    theta <- (1 - lr weight_decay) theta - lr mhat / (sqrt(vhat) + eps)
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)
