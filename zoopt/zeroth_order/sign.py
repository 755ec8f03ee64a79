"""Sign descent on a zeroth-order estimate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from zoopt.checks import check_choice
from zoopt.distributed.exchange import Job, Parallel
from zoopt.dtypes import RoundingMode
from zoopt.kernels.descent.rule import Rule
from zoopt.kernels.noise.key import Distribution
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.mask import Mask
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator, PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Site
from zoopt.zeroth_order.engine.sparse import SparseZerothOrder

SignForm = Literal["elementwise", "projected"]


def elementwise(ghat: Tensor, lr: float) -> Tensor:
    """-lr sign(ghat), of the shape of ghat = mean_j(g_j z_j)."""
    return torch.sign(ghat).mul_(-lr)


def projected(g: Mapping[int, float]) -> dict[int, float]:
    """The coefficients of z_j in mean_j(sign(g_j) z_j)."""
    return {j: (g_j > 0) / len(g) - (g_j < 0) / len(g) for j, g_j in g.items()}


@register("zo-sign-sgd", "zeroth-order")
class ZOSignSGD(SparseZerothOrder):
    r"""Steps of one length along signs (Liu et al., 2019, "signSGD via zeroth-order oracle").

        form="elementwise"   theta <- (1 - lr weight_decay) theta - lr sign(mean_j g_j z_j)
        form="projected"     theta <- (1 - lr weight_decay) theta - lr mean_j sign(g_j) z_j

    The first is the paper's: every element moves by lr. The second is that of the code of the
    zeroth-order benchmark (Zhang et al., 2024): it drops the size of the projected gradient and
    keeps the direction.

    State, in bytes a parameter element: 0; with `mask="magnitude"`, 4 a parameter.

    Args:
        params, zo_eps, weight_decay, num_probes, estimator, distribution, perturbation, rounding,
            max_projected_grad, mask, density, blocks, block_order, maximize, seed, process_group,
            parallel, record: as for `MeZO`.
        lr: learning rate, the distance that each element moves in a step; default 1e-6 (as for
            `MeZO`).
        form: `"elementwise"` or `"projected"`.

    Raises:
        TypeError, ValueError: as for `MeZO`.

    Example:
        >>> opt = zoopt.ZOSignSGD(model.parameters(), lr=1e-6)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    scripted = True
    alike = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-6,
        *,
        form: SignForm = "elementwise",
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
        super().__init__(
            params,
            hyperparameters(locals()),
            seed=seed,
            process_group=process_group,
            parallel=parallel,
            record=record,
        )

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_choice("form", group["form"], get_args(SignForm))

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group = site.group
        if group["form"] == "projected" or not pending.kept:
            signs = projected(self._weights(group, pending))
            self._descend(site, pending, offset, signs, progress)
            return
        lr = float(group["lr"])

        def rule(gradient: Tensor, chunk: slice) -> Tensor:
            return elementwise(gradient, lr)

        self._update_elements(site, pending, offset, progress, rule, Rule("sign", (-lr,)))
