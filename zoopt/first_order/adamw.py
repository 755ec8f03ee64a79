"""AdamW: the identity projector."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from zoopt.checks import check_betas, check_number
from zoopt.dtypes import RoundingMode
from zoopt.first_order.projected.core import ProjectedOptimizer
from zoopt.first_order.torch_state import from_torch, is_torchs, to_torch, without_torchs_options
from zoopt.kernels.adam.moments import Format
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import Variant, register

StateRounding = Literal["stochastic", "nearest"]


class AdamFamily(ProjectedOptimizer):
    """Projected optimizers whose rule is Adam."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of the same class, bit for bit, or one of torch.optim.AdamW.

        From torch's, lr, betas, eps, weight_decay, maximize and all steps are taken over, and
        moments are rounded to nearest in the format of this optimizer. Parameters that are
        projected here cannot use them: their moments start from zero, and a warning says how many
        there are.

        Raises:
            ValueError: the dict belongs to another optimizer, or to parameters of other shapes.
                Nothing has changed then.
        """
        super().load_state_dict(state_dict)

    def _adopted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not is_torchs(state_dict) or [len(g["params"]) for g in state_dict["param_groups"]] != [
            len(group["params"]) for group in self.param_groups
        ]:
            return state_dict
        specs = [
            [
                None if self._geometry(param, group) else self.declared_state(param, group)
                for param in group["params"]
            ]
            for group in self.param_groups
        ]
        adopted, dropped = from_torch(state_dict, self.param_groups, specs)
        if dropped:
            warnings.warn(
                f"{dropped} parameters are projected here: their moments in torch's checkpoint are "
                f"of whole gradients, and they begin anew",
                stacklevel=4,
            )
        return adopted

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(group["betas"])
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
    r"""AdamW (Loshchilov & Hutter, 2019), with moments in 32, 16, 8 or 4 bits.

    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
    theta <- (1 - lr weight_decay) theta - lr mhat / (sqrt(vhat) + eps)

    State, in bytes a parameter element: 8 for float32 moments (16 for float64 parameters), bfloat16
    4, int8 2.03, int4 1.06; and 8 a parameter (`step`). Moments of fewer than 4096 elements are not
    stored in 8 or 4 bits; they stay float32.

    Args:
        params: parameters, named parameters, or param groups.
        lr: learning rate; default 1e-3 (torch).
        betas: decay of the moments; default (0.9, 0.999) (torch).
        eps: added to the denominator; default 1e-8 (torch).
        weight_decay: decoupled; default 1e-2 (torch).
        state_dtype: how moments are stored: `"float32"` (default), `"bfloat16"`, or codes `"int8"`
            (a scale for 256 elements) and `"int4"` (for 128).
        state_rounding: how moments are rounded: `"stochastic"` (default), so that averages that
            change by less than a level in a step still change, or `"nearest"`.
        rounding: how weights are rounded: `"auto"` (default) is stochastic for bfloat16 and
            float16; `"nearest"`, or `"stochastic"`.
        amsgrad, capturable, differentiable: torch's, which must be False (default).
        foreach, fused: torch's, without effect, since every step is fused.
        maximize: ascend; default False.
        seed: of the rounding's noise; default torch's initial seed.

    Raises:
        TypeError, ValueError: an argument out of range.
        RuntimeError: in `step`, a sparse gradient. Nothing has changed then.

    Differs from torch's: in float32 and float64 only by rounding; bfloat16 and float16 weights are
    updated in float32 and rounded stochastically. A NaN in a gradient makes its weight NaN, as in
    torch; with codes it makes all weights of the block NaN (256, or 128 in 4 bits), since they
    share a scale. Skip steps whose gradients are not finite. Complex and sparse gradients,
    `amsgrad`, `capturable` and `differentiable` are left out. A state_dict of torch's can be
    loaded, in any state_dtype, and `torch_state_dict` makes one for torch.

    Example:
        >>> opt = zoopt.AdamW(model.named_parameters(), lr=1e-3, state_dtype="int8")
        >>> model(**batch).loss.backward()
        >>> opt.step()
    """

    _remedies: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("rank", "update_proj_gap", "scale", "proj_type", "projector"),
        "AdamW projects nothing: use zoopt.GaLoreAdamW, or leave it out",
    )

    shards = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        defaults = without_torchs_options(hyperparameters(locals()))
        super().__init__(params, defaults, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch; options of torch.optim.AdamW's are as in `__init__`."""
        if isinstance(param_group, dict):
            param_group = without_torchs_options(param_group)
        super().add_param_group(param_group)

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as a state_dict of torch.optim.AdamW, with moments decoded to float32
        (float64).

        torch casts them to the weights' dtype when it loads them.

        Raises:
            ValueError: a group is projected: torch's AdamW has no moments of that kind.
        """
        return to_torch(self.state_dict(), self.defaults)
