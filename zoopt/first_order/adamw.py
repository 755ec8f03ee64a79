"""AdamW: the identity projector."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoopt.checks import check_number
from zoopt.dtypes import RoundingMode
from zoopt.first_order.base import check_betas
from zoopt.first_order.projected.core import ProjectedOptimizer
from zoopt.kernels.adam.moments import Format
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import Variant, register

StateRounding = Literal["stochastic", "nearest"]


class AdamFamily(ProjectedOptimizer):
    """Projected optimizers whose rule is Adam."""

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(group)
        check_number("eps", group["eps"], low=0.0)


@register(
    "adamw",
    "compact",
    Variant(),
    Variant("bfloat16 state", {"state_dtype": "bfloat16"}),
    Variant("int8 state", {"state_dtype": "int8"}, fused=True),
    Variant("int4 state", {"state_dtype": "int4"}),
)
class AdamW(AdamFamily):
    r"""AdamW (Loshchilov & Hutter, 2019), with moments in as few bytes as asked for.

    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
    theta <- (1 - lr weight_decay) theta - lr mhat / (sqrt(vhat) + eps)

    State, in bytes a parameter element: 8 for float32 moments (16 for float64 parameters), bfloat16
    4, int8 2.03, int4 1.06; and 8 a parameter (`step`). In codes of 8 or 4 bits only moments of
    4096 elements or more are kept; smaller ones stay float32.

    Args:
        params: parameters, named parameters, or param groups.
        lr: learning rate; default 1e-3 (torch).
        betas: decay of the moments; default (0.9, 0.999) (torch).
        eps: added to the denominator; default 1e-8 (torch).
        weight_decay: decoupled; default 1e-2 (torch).
        state_dtype: how moments are stored: `"float32"` (default), `"bfloat16"`, or codes `"int8"`
            (a scale for 256 elements) and `"int4"` (for 128).
        state_rounding: how they are rounded to that: `"stochastic"` (default), under which averages
            that move by less than a level a step still move, or `"nearest"`.
        rounding: how weights are rounded: `"auto"` (default) is stochastic for bfloat16 and
            float16; `"nearest"`, or `"stochastic"`.
        maximize: ascend; default False.
        seed: of the rounding's noise; default torch's initial seed.

    Raises:
        TypeError, ValueError: an argument out of range.
        RuntimeError: in `step`, a sparse gradient. Nothing has changed then.

    Differs from torch's: its own, to rounding, in float32 and float64; bfloat16 and float16 weights
    are computed with in float32 and rounded stochastically. A gradient's NaN makes its weight NaN,
    as there; in codes, whose scale is that of a block, the block's 256 (128) weights: skip a step
    whose gradients are not finite. Complex and sparse gradients,
    `amsgrad`, `capturable` and `differentiable` are left out.

    Example:
        >>> opt = zoopt.AdamW(model.named_parameters(), lr=1e-3, state_dtype="int8")
        >>> model(**batch).loss.backward()
        >>> opt.step()
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
