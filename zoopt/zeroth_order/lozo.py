"""LOZO: zeroth-order descent along low-rank directions with a right factor that rarely changes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zoopt.checks import check_number
from zoopt.distributed.exchange import Job, Parallel
from zoopt.distributed.sharding import local
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.kernels.batch import Batch
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op_batch import add_products_
from zoopt.lasting import prepared
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.registry import Variant, register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.chunks import whole
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.factors import Maker, Normals, Terms
from zoopt.zeroth_order.engine.low_rank import LowRank, LowRankZerothOrder, matrix_shape
from zoopt.zeroth_order.engine.noise import Noise
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator, PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Site
from zoopt.zeroth_order.engine.updates import withdrawn


def averaged(N: Tensor, gU: Tensor, b: float) -> Tensor:
    """N <- b N + (1 - b) gU: the momentum's factor and mean_j(g_j U_j), (m, r) both."""
    return (N * b).add_(gU * (1.0 - b))


def carried_over(N: Tensor, V_old: Tensor, V_new: Tensor) -> Tensor:
    """N <- N V_old^T V_new / n, so that N V_new^T is close to N V_old^T.

    Args:
        N: (m, r).
        V_old, V_new: (n, r); V_new^T V_new is about n I.
    """
    return N @ (V_old.T @ V_new) / V_old.shape[0]


class LazyPair(LowRank):
    """z(d) = U(d) V^T, with V of the draw `basis_draw`."""

    def __init__(self, key: NoiseKey, param: Tensor, rank: int, basis_draw: int) -> None:
        super().__init__(key, param, rank)
        self.basis_draw = basis_draw

    @functools.cached_property
    def right(self) -> Tensor:
        """V: (n, r)."""
        return self.basis(self.basis_draw)

    def basis(self, draw: int) -> Tensor:
        """V of a draw: (n, r), from the numbers that follow that draw's U."""
        return self.normals(draw, self.rows * self.rank, (self.columns, self.rank))

    def left(self, coefficients: Coefficients) -> Tensor:
        """sum_d coefficients[d] U(d): (m, r), the rows that are here."""
        return self.combined(coefficients, self.left_shape, self.left_start)

    def normals_of(self, coefficients: Terms) -> Normals:
        """What `left` is made of."""
        return Normals(self.key.shifted(self.left_start), self.left_shape, (coefficients,))

    @property
    def basis_normals(self) -> Normals:
        """What `right` is made of."""
        behind = self.key.shifted(self.rows * self.rank)
        return Normals(behind, (self.columns, self.rank), (((self.basis_draw, 1.0),),))

    @classmethod
    def pairs_together(
        cls, directions: Sequence[LowRank], coefficients: Coefficients, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """As in `Direction`: two launches."""
        count, terms = len(directions), tuple(coefficients.items())
        maker, bases, of = prepared(directions, ("pairs", dtype), lambda: _maker(directions, dtype))
        made = maker.make([(terms,), *bases], of)
        return made.part(0, count), made.part(count, 2 * count)

    def factors(self, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
        """As in `LowRank`; all draws share V."""
        return self.left(coefficients), self.right


def _maker(
    directions: Sequence[LowRank], dtype: torch.dtype, lefts: int = 1
) -> tuple[Maker, list[tuple[Terms, ...]], list[int]]:
    """What makes so many U of each, kind by kind, and then V of each; the terms of the V; and of
    which kind each U and V is."""
    own = [direction for direction in directions if isinstance(direction, LazyPair)]
    wanted = [each.normals_of(()) for each in own] * lefts
    behind = [each.basis_normals for each in own]
    maker = Maker([(each.key, each.shape) for each in wanted + behind], dtype, own[0].device)
    bases: dict[tuple[Terms, ...], int] = {}
    of = [kind for kind in range(lefts) for _ in own]
    of += [bases.setdefault(each.sums, len(bases) + lefts) for each in behind]
    return maker, list(bases), of


def momentum_together(
    matrices: Batch,
    *,
    directions: Sequence[LazyPair],
    buffers: Sequence[Tensor],
    weights: Terms,
    back: Terms,
    beta: float,
    lr: float,
    decay: float,
    rounding_draw: int | None,
) -> None:
    """N <- b N + (1 - b) gU and theta <- round(decay theta + U(back) V^T - lr N V^T / r), for all
    matrices."""
    count, dtype = len(directions), buffers[0].dtype
    maker, bases, of = prepared(
        directions, ("momentum", dtype), lambda: _maker(directions, dtype, lefts=2)
    )
    made = maker.make([(weights,), (back,), *bases], of)
    estimates, left = made.part(0, count), made.part(count, 2 * count)
    states = [buffer.unsqueeze(0) for buffer in buffers]
    torch._foreach_mul_(states, beta)
    torch._foreach_mul_(estimates, 1.0 - beta)
    torch._foreach_add_(states, estimates)
    scales = [-lr / direction.rank for direction in directions]
    torch._foreach_add_(left, torch._foreach_mul(states, scales))
    right = made.part(2 * count, 3 * count)
    add_products_(matrices, left, right, decay=decay, rounding_draw=rounding_draw)


@register("lozo", "zeroth-order", Variant(), Variant("momentum", {"momentum": 0.7}, planned=False))
class LOZO(LowRankZerothOrder):
    r"""Low-rank zeroth-order SGD (Chen et al., 2024, arXiv:2410.07698), with or without momentum.

    A parameter of two or more dimensions, seen as (m, n), is perturbed along Z_j = U_j V^T, with
    U_j (m, r) normal and new in every probe, V (n, r) normal and new every basis_update_gap steps;
    others along normals z_j.

        theta <- (1 - lr weight_decay) theta - lr mean_j(g_j U_j) V^T / r        matrices
        theta <- (1 - lr weight_decay) theta - lr mean_j(g_j z_j)                others

    With `momentum` b (LOZO-M), in the factor's r dimensions,

        N     <- b N + (1 - b) mean_j(g_j U_j),   theta <- ... - lr N V^T / r
        N     <- N V_old^T V_new / n              when V changes

    and for the others buf <- b buf + (1 - b) mean_j(g_j z_j), theta <- ... - lr buf.

    A step costs 2 num_probes forward passes (one-sided: 1 + num_probes). Perturbed virtually, a
    matrix's part is added to its operator's output, x W^T + zo_eps (x V) U^T, so that probing
    costs no pass over the weights.

    State, in bytes: 0; with momentum 4 m min(r, m, n) a matrix and 4 an element of the others
    (8 for float64): `momentum_buffer`.

    Args:
        params, lr, zo_eps, weight_decay, num_probes, estimator, rounding, max_projected_grad,
            blocks, block_order, maximize, seed, process_group, parallel, record: as for `MeZO`.
        rank: r; default 2 (paper: 1 or 2 for OPT, 4 for RoBERTa).
        basis_update_gap: steps between new V; default 50 (paper: 50 or 100).
        momentum: b; default 0 (paper's LOZO-M: 0.7).
        perturbation: as for `MeZO`, but `"auto"` is virtual for all dtypes.

    Raises:
        TypeError, ValueError: as for `MeZO`; momentum with blocks.

    Differs from the authors' code, which in a step with a new V updates along a U that it did not
    probe.

    Example:
        >>> opt = zoopt.LOZO(model.parameters(), lr=1e-6, rank=2)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    alike = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-6,
        *,
        rank: int = 2,
        basis_update_gap: int = 50,
        momentum: float = 0.0,
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
        """With momentum: `momentum_buffer`, (m, r) for a matrix, in the accumulator's dtype."""
        if not group["momentum"]:
            return {}
        shape = tuple(param.shape)
        if param.dim() > 1:
            rows, columns = matrix_shape(param)
            shape = (rows, min(group["rank"], rows, columns))
        return {"momentum_buffer": TensorSpec(shape, accumulator_dtype(param.dtype))}

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_number("momentum", group["momentum"], low=0.0, high=1.0, open_high=True)
        if group["momentum"] and group["blocks"] is not None:
            raise ValueError(
                f"blocks must be None with momentum, got {group['blocks']!r}: the factors of "
                f"resting blocks would outlive their basis; set momentum to 0"
            )

    def _matrix_direction(self, param: Tensor, group: Group, key: NoiseKey) -> LazyPair:
        return LazyPair(key, param, group["rank"], group["basis_draw"])

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group, direction = site.group, site.direction
        weights = self._weights(group, pending)
        if not group["momentum"] or not pending.kept:
            scale = 1.0 / direction.rank if isinstance(direction, LazyPair) else 1.0
            self._descend(
                site, pending, offset, {d: scale * w for d, w in weights.items()}, progress
            )
            return
        beta, lr = float(group["momentum"]), float(group["lr"])
        decay = self._decay(group, pending)
        back = withdrawn(offset, decay)
        buffer = self._state(site.param, group)["momentum_buffer"]
        if isinstance(direction, LazyPair):
            if direction.queued(
                momentum_together,
                site.param,
                progress,
                {"buffers": buffer},
                weights=tuple(weights.items()),
                back=tuple(back.items()),
                beta=beta,
                lr=lr,
                decay=decay,
                rounding_draw=pending.draws[-1] if site.rounding == "stochastic" else None,
            ):
                return
            factor = averaged(buffer, direction.left(weights), beta)
            progress.hold((buffer, factor))
            left = direction.left(back) - factor * (lr / direction.rank)
            direction.add_product_(
                site.param,
                left,
                direction.right,
                decay=decay,
                rounding=site.rounding,
                rounding_draw=pending.draws[-1],
                progress=progress,
            )
            return
        assert isinstance(direction, Noise)
        direction.momentum_(
            site.param,
            buffer,
            back,
            {draw: (1.0 - beta) * weight for draw, weight in weights.items()},
            momentum=beta,
            step_size=-lr,
            decay=decay,
            rounding=site.rounding,
            progress=progress,
        )

    def _change_basis(
        self, param: Tensor, group: Group, number: int, new: int, progress: Progress
    ) -> None:
        if "momentum_buffer" not in self.state[param] or param.dim() == 1:
            return
        old = self._matrix_direction(param, group, NoiseKey(group["seed"], number))
        buffer = local(self.state[param]["momentum_buffer"])
        for _ in whole(buffer, progress):
            buffer.copy_(carried_over(buffer, old.right, old.basis(new)))
