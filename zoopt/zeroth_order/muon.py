"""ZO-Muon: orthogonalised zeroth-order descent in a random subspace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoopt.distributed.exchange import Job, Parallel
from zoopt.distributed.sharding import local
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch
from zoopt.kernels.descent.op import energies
from zoopt.kernels.dispatch import known
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.places import Kept
from zoopt.kernels.product.op_batch import add_products_
from zoopt.lasting import prepared
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.registry import register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.factors import Maker, Normals, Terms, cast
from zoopt.zeroth_order.engine.low_rank import LowRank, LowRankZerothOrder, matrix_shape
from zoopt.zeroth_order.engine.noise import Noise
from zoopt.zeroth_order.engine.perturbation import Perturbation, PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator, PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Bucket, Site
from zoopt.zeroth_order.engine.updates import withdrawn

#: Elements of matrices that are decomposed together: 64 MiB of float64.
_TOGETHER = 1 << 23


class LeftSubspace(LowRank):
    """z(d) = P u(d), u(d) an (r, n) matrix of normals.

    Args:
        key, param, rank: as for `LowRank`.
        basis: P (m, r), orthonormal columns; the rows that are here.
    """

    def __init__(self, key: NoiseKey, param: Tensor, rank: int, basis: Tensor) -> None:
        super().__init__(key, param, rank)
        self.basis = basis

    def draw_basis(self, draw: int) -> None:
        """Fill P from the numbers of the draw that follow its u."""
        start = self.rank * self.columns
        self.basis.copy_(self.here_of(self.haar(draw, start, (self.rows, self.rank))))

    def inner(self, coefficients: Coefficients) -> Tensor:
        """sum_d coefficients[d] u(d): (r, n)."""
        return self.combined(coefficients, (self.rank, self.columns))

    def normals_of(self, coefficients: Terms) -> Normals:
        """What `inner` is made of."""
        return Normals(self.key, (self.rank, self.columns), (coefficients,))

    @classmethod
    def pairs_together(
        cls, directions: Sequence[LowRank], coefficients: Coefficients, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """As in `Direction`: one launch."""
        maker, bases, of = prepared(directions, ("pairs", dtype), lambda: _tools(directions, dtype))
        inner = maker.make([(tuple(coefficients.items()),)], of)
        return cast(bases, dtype), inner.transposed()

    def factors(self, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
        """As in `LowRank`; all draws share P."""
        return self.basis, self.inner(coefficients).T


def msign(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, by the Gram matrix of its short side.

    Args:
        matrix: (..., r, n) with r <= n; directions whose singular value is zero stay zero.
    """
    wide = matrix.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)  # (..., r), (..., r, r)
    # The Gram matrix squares the singular values: smaller ones are rounding errors.
    rank = values > values[..., -1:] * 1e-14
    inverse_root = torch.where(rank, values.clamp(min=1e-300).rsqrt(), 0.0).unsqueeze(-2)
    sign: Tensor = (vectors * inverse_root) @ (vectors.mT @ wide)
    return sign.to(matrix.dtype)


def _tools(
    directions: Sequence[LowRank], dtype: torch.dtype, inner: int = 1
) -> tuple[Maker, Kept, list[int]]:
    """What makes so many u of each, kind by kind; P (1, m, r) of each; and the kinds of the u."""
    own = [direction for direction in directions if isinstance(direction, LeftSubspace)]
    wanted = [each.normals_of(()) for each in own] * inner
    maker = Maker([(each.key, each.shape) for each in wanted], dtype, own[0].device)
    of = [kind for kind in range(inner) for _ in own]
    return maker, Kept([each.basis.unsqueeze(0) for each in own]), of


def msign_together(
    matrices: Batch,
    *,
    directions: Sequence[LeftSubspace],
    weights: Terms,
    back: Terms,
    lr: float,
    decay: float,
    rounding_draw: int | None,
) -> None:
    """theta <- round(decay theta + P u(back) - lr P msign(u(weights))) for all matrices; those of a
    shape are decomposed together, some at a time."""
    count, dtype = len(directions), directions[0].dtype
    maker, bases, of = prepared(
        directions, ("update", dtype), lambda: _tools(directions, dtype, inner=2)
    )
    made = maker.make([(weights,), (back,)], of)
    estimates, inner = made.part(0, count), made.part(count, 2 * count)
    alike: dict[torch.Size, list[int]] = {}
    for i, estimate in enumerate(estimates):
        alike.setdefault(estimate.shape, []).append(i)
    for shape, places in alike.items():
        some = max(1, _TOGETHER // shape.numel())
        for start in range(0, len(places), some):
            own = places[start : start + some]
            signs = msign(torch.stack([estimates[i] for i in own]))  # (k, 1, r, n)
            torch._foreach_add_([inner[i] for i in own], list(signs.unbind()), alpha=-lr)
    right = inner.transposed()
    add_products_(matrices, bases, right, decay=decay, rounding_draw=rounding_draw)


@register("zo-muon", "zeroth-order")
class ZOMuon(LowRankZerothOrder):
    r"""Muon on a zeroth-order estimate in a random subspace (2026).

    A parameter of two or more dimensions, seen as (m, n), is perturbed along P u_i, with u_i
    (r, n) normal and new in every probe, P (m, r) uniformly distributed with orthonormal columns,
    new every basis_update_gap steps; others along normals z_i.

        ghat   = mean_i(g_i u_i)                                                (r, n)
        theta <- (1 - lr weight_decay) theta - lr P msign(ghat)                 matrices
        theta <- (1 - lr weight_decay) theta - lr mean_i(g_i z_i) / ||mean_i(g_i z_i)||   others

    msign(A) = (A A^T)^(-1/2) A has all singular values 1. For a vector that is division by its
    norm, so the same lr suits vectors and matrices. A step costs 1 + num_probes forward passes
    (two-sided: 2 num_probes); perturbed virtually, a matrix's part is added to its operator's
    output, without a pass over the weights.

    State, in bytes: 4 m min(r, m, n) a matrix (8 for float64): `basis`.

    Args:
        params, zo_eps, weight_decay, rounding, max_projected_grad, blocks, block_order, maximize,
            seed, process_group, parallel, record: as for `MeZO`.
        lr: learning rate, the spectral norm of a step; default 1e-2 (paper).
        rank: r; default 64 (paper).
        basis_update_gap: steps between new P; default 100 (paper).
        num_probes: default 4 (paper).
        estimator: default `"one-sided"` (paper).
        perturbation: as for `MeZO`, but `"auto"` is virtual for all dtypes.

    Raises:
        TypeError, ValueError: as for `MeZO`.

    Differs from the authors' code, which draws another P for each probe and moves vectors at a
    separate, fixed learning rate. For such a rate, put vectors in a param group of their own.

    Example:
        >>> opt = zoopt.ZOMuon(model.parameters(), lr=1e-2)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        rank: int = 64,
        basis_update_gap: int = 100,
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_probes: int = 4,
        estimator: Estimator = "one-sided",
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
        """`basis` (m, r) of a matrix, in the accumulator's dtype."""
        if param.dim() < 2:
            return {}
        rows, columns = matrix_shape(param)
        shape = (rows, min(group["rank"], rows, columns))
        return {"basis": TensorSpec(shape, accumulator_dtype(param.dtype))}

    def _matrix_direction(self, param: Tensor, group: Group, key: NoiseKey) -> LeftSubspace:
        return LeftSubspace(key, param, group["rank"], local(self._state(param, group)["basis"]))

    def _initialise(self, param: Tensor, group: Group, number: int) -> None:
        if param.dim() > 1:
            key = NoiseKey(group["seed"], number)
            self._matrix_direction(param, group, key).draw_basis(group["basis_draw"])

    def _change_basis(
        self, param: Tensor, group: Group, number: int, new: int, progress: Progress
    ) -> None:
        self._matrix_direction(param, group, NoiseKey(group["seed"], number)).draw_basis(new)

    def _tasks(
        self, pending: PendingProbe, perturbation: Perturbation | None, *rest: Any
    ) -> list[Callable[[], None]]:
        vectors = [site for site in pending.sites if not isinstance(site.direction, LeftSubspace)]
        self._norms = self._estimate_norms(vectors, pending) if pending.kept else {}
        return super()._tasks(pending, perturbation, *rest)

    def _estimate_norms(self, sites: Sequence[Site], pending: PendingProbe) -> dict[Tensor, float]:
        """||mean_i(g_i z_i)|| of each parameter; where operations are launches, one launch for
        all that are alike."""
        norms: dict[Tensor, float] = {}
        together: dict[Any, list[Site]] = {}
        for site in sites:
            param, weights = site.param, self._weights(site.group, pending)
            whole = self._whole(param)
            if dispatch.launches(param) and whole is param:
                alike = (param.dtype, param.device, tuple(weights.items()))
                together.setdefault(alike, []).append(site)
                continue
            assert isinstance(site.direction, Noise)
            # The norm of a sharded vector is that of the whole: its noise is made here, without
            # the other parts.
            sharded = whole is not param
            values = param.new_empty(whole.numel()) if sharded else param.detach().flatten()
            noise = Noise(dataclasses.replace(site.direction.key, offset=0))
            estimate = noise.combine(values, weights, 0)
            norms[param] = known(estimate.double().square().sum().sqrt(), 1.0)
        for (*_, weights), own in together.items():
            draws, coefficients = zip(*weights, strict=True)
            keys = [site.direction.key for site in own if isinstance(site.direction, Noise)]
            batch = Batch([site.param for site in own], keys, reads=True)
            squares = energies(batch, coefficients, draws=draws).tolist()
            norms |= {s.param: math.sqrt(e) for s, e in zip(own, squares, strict=True)}
        return norms

    def _alike(self, bucket: Bucket) -> bool:
        """As in `ZerothOrderUpdates`: each vector is divided by its own norm."""
        return isinstance(bucket.first.direction, LeftSubspace)

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group, direction = site.group, site.direction
        weights = self._weights(group, pending)
        if not weights:
            self._descend(site, pending, offset, {}, progress)
        elif isinstance(direction, LeftSubspace):
            lr, decay = float(group["lr"]), self._decay(group, pending)
            if direction.queued(
                msign_together,
                site.param,
                progress,
                weights=tuple(weights.items()),
                back=tuple(withdrawn(offset, decay).items()),
                lr=lr,
                decay=decay,
                rounding_draw=pending.draws[-1] if site.rounding == "stochastic" else None,
            ):
                return
            Ghat = direction.inner(weights)  # P Ghat is the estimate
            inner = direction.inner(withdrawn(offset, decay))
            inner -= lr * msign(Ghat)
            direction.add_product_(
                site.param,
                direction.basis,
                inner.T,
                decay=decay,
                rounding=site.rounding,
                rounding_draw=pending.draws[-1],
                progress=progress,
            )
        else:
            norm = self._norms[site.param]
            scale = 1.0 / norm if norm else 0.0
            self._descend(
                site, pending, offset, {d: scale * w for d, w in weights.items()}, progress
            )
