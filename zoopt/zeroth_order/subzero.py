"""SubZero: zeroth-order descent in random two-sided subspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zoopt.distributed.exchange import Job, Parallel
from zoopt.distributed.sharding import local
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.places import Kept
from zoopt.lasting import prepared
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.registry import register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.factors import Maker, Multiplier, cast
from zoopt.zeroth_order.engine.low_rank import LowRank, LowRankZerothOrder, matrix_shape
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator, PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Site


def subzero(R: Tensor, U: Tensor, V: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """SubZero's direction Z = sqrt(m n) / r U R V^T of an (m, n) matrix, as two thin factors.

        g_j    = [L(theta + eps Z_j) - L(theta - eps Z_j)] / (2 eps)
        theta <- decay theta - lr mean_j(g_j Z_j)

    Z is linear in R: the step's sum of directions is the Z of the sum of their R_j.

    Args:
        R: (r, r), normals, new in every probe; or a weighted sum of such.
        U, V: (m, r) and (n, r), orthonormal columns, new every T steps. Some rows of U give the
            same rows of Z.
        m: how many rows all of U has.

    Returns:
        left (m, r) and right (n, r), with Z = left right^T.
    """
    n, r = V.shape
    return U @ (R * (math.sqrt(m * n) / r)), V


class Subspace(LowRank):
    """z(d) = sqrt(m n) / r U R(d) V^T, R(d) an (r, r) matrix of normals.

    Args:
        key, param, rank: as for `LowRank`.
        left_basis, right_basis: U (m, r), the rows that are here, and V (n, r), orthonormal
            columns.
    """

    def __init__(
        self, key: NoiseKey, param: Tensor, rank: int, left_basis: Tensor, right_basis: Tensor
    ) -> None:
        super().__init__(key, param, rank)
        self.left_basis = left_basis
        self.right_basis = right_basis

    def draw_bases(self, draw: int) -> None:
        """Fill U and V from the numbers of the draw that follow its R."""
        start = self.rank * self.rank
        self.left_basis.copy_(self.here_of(self.haar(draw, start, (self.rows, self.rank))))
        start += self.rows * self.rank
        self.right_basis.copy_(self.haar(draw, start, (self.columns, self.rank)))

    @classmethod
    def pairs_together(
        cls, directions: Sequence[LowRank], coefficients: Coefficients, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """As in `Direction`: R of all in one launch, and U R of all in one."""
        tools = prepared(directions, ("pairs", dtype), lambda: _tools(directions, dtype))
        cores = tools.maker.make([(tuple(coefficients.items()),)], tools.of)
        torch._foreach_mul_(cores, tools.scales)
        return tools.multiplier.multiply(tools.left, cores.transposed()), cast(tools.right, dtype)

    def factors(self, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
        """As in `LowRank`; all draws share U and V."""
        R = self.combined(coefficients, (self.rank, self.rank))
        return subzero(R, self.left_basis, self.right_basis, self.rows)


class _Tools(NamedTuple):
    """What makes the factors of several directions: U (1, m, r) and V (1, n, r) of each, what makes
    their R, of one kind, and the factors of these."""

    left: Kept
    right: Kept
    maker: Maker
    of: list[int]
    scales: list[float]
    multiplier: Multiplier


def _tools(directions: Sequence[LowRank], dtype: torch.dtype) -> _Tools:
    own = [direction for direction in directions if isinstance(direction, Subspace)]
    device = own[0].device
    return _Tools(
        Kept([each.left_basis.unsqueeze(0) for each in own]),
        Kept([each.right_basis.unsqueeze(0) for each in own]),
        Maker([(each.key, (each.rank, each.rank)) for each in own], own[0].dtype, device),
        [0] * len(own),
        [math.sqrt(each.rows * each.columns) / each.rank for each in own],
        Multiplier([(len(each.left_basis), each.rank) for each in own], dtype, device),
    )


@register("subzero", "zeroth-order")
class SubZero(LowRankZerothOrder):
    r"""Zeroth-order SGD in random subspaces (Yu et al., 2024, arXiv:2410.08989).

    A parameter of two or more dimensions, seen as (m, n), is perturbed along

        Z_j = sqrt(m n) / r U R_j V^T,   R_j (r, r) normal and new in every probe,

    U (m, r) and V (n, r) uniformly distributed with orthonormal columns, new every
    basis_update_gap steps; ||Z_j|| is that of independent normals, and the expectation of
    Z <G, Z> over all three is G. Other parameters move along normals.

        theta <- (1 - lr weight_decay) theta - lr mean_j(g_j Z_j)

    A step costs 2 num_probes forward passes (one-sided: 1 + num_probes); perturbed virtually, a
    matrix's part is added to its operator's output, without a pass over the weights.

    State, in bytes: 4 (m + n) min(r, m, n) a matrix (8 for float64): `basis_u`, `basis_v`.

    Args:
        params, lr, zo_eps, weight_decay, num_probes, estimator, rounding, max_projected_grad,
            blocks, block_order, maximize, seed, process_group, parallel, record: as for `MeZO`.
        rank: r; default 24 (paper: 8 to 128).
        basis_update_gap: steps between new U and V; default 1000 (paper: 500 to 2000).
        perturbation: as for `MeZO`, but `"auto"` is virtual for all dtypes.

    Raises:
        TypeError, ValueError: as for `MeZO`.

    Differs from the authors' code: QR's signs are corrected, without which the bases are not
    uniformly distributed, and nothing is reshaped: matrices of every shape have their own bases.

    Example:
        >>> opt = zoopt.SubZero(model.parameters(), lr=1e-6, rank=24)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    alike = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-6,
        *,
        rank: int = 24,
        basis_update_gap: int = 1000,
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_probes: int = 1,
        estimator: Estimator = "two-sided",
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
        """`basis_u` (m, r) and `basis_v` (n, r) of a matrix, in the accumulator's dtype."""
        if param.dim() < 2:
            return {}
        rows, columns = matrix_shape(param)
        rank, dtype = min(group["rank"], rows, columns), accumulator_dtype(param.dtype)
        return {
            "basis_u": TensorSpec((rows, rank), dtype),
            "basis_v": TensorSpec((columns, rank), dtype),
        }

    def _matrix_direction(self, param: Tensor, group: Group, key: NoiseKey) -> Subspace:
        state = self._state(param, group)
        return Subspace(key, param, group["rank"], local(state["basis_u"]), state["basis_v"])

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        return name != "basis_v"

    def _initialise(self, param: Tensor, group: Group, number: int) -> None:
        if param.dim() > 1:
            key = NoiseKey(group["seed"], number)
            self._matrix_direction(param, group, key).draw_bases(group["basis_draw"])

    def _change_basis(
        self, param: Tensor, group: Group, number: int, new: int, progress: Progress
    ) -> None:
        self._matrix_direction(param, group, NoiseKey(group["seed"], number)).draw_bases(new)

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        self._descend(site, pending, offset, self._weights(site.group, pending), progress)
