"""GaLore: Adam inside the leading singular subspace of each gradient."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoopt.checks import check_bool, check_choice
from zoopt.first_order import RoundingMode
from zoopt.kernels.moments import Format
from zoopt.lowrank.adamw import AdamFamily, StateRounding
from zoopt.lowrank.geometry import ProjType
from zoopt.lowrank.subspace import Projector
from zoopt.optimizer import Group, Params, hyperparameters


class GaLoreAdamW(AdamFamily):
    r"""GaLore (Zhao et al., 2024)."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjType = "std",
        projector: Projector = "warm",
        stagger: bool = True,
        decay: Literal["before", "after"] = "before",
        eps_correction: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_bool("stagger", group["stagger"])
        check_bool("eps_correction", group["eps_correction"])
        check_choice("decay", group["decay"], ("before", "after"))
