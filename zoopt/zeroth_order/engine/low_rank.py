"""Low-rank directions: z of a matrix is a product of thin factors, made from the seed.

A parameter of two or more dimensions is seen as an (m, n) matrix, m its first dimension. At an
operator that takes the matrix, its displacement L R^T need not be added to it: x (W + L R^T)^T is
x W^T + (x R) L^T, so a perturbed forward pass costs no pass over the weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.checks import check_nonnegative_int, check_positive_int
from zoopt.distributed.sharding import rows_here
from zoopt.dtypes import Rounding, accumulator_dtype
from zoopt.kernels import add_, apply_
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import is_fake, launches
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op_batch import add_products_
from zoopt.lasting import prepared
from zoopt.linalg import sign_fixed_qr
from zoopt.noise import normal, stream
from zoopt.optimizer import Group, Params, TensorSpec
from zoopt.parameters import named_params
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.chunks import whole
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.factors import Maker, Terms
from zoopt.zeroth_order.engine.groups import ProbeNames
from zoopt.zeroth_order.engine.noise import Noise
from zoopt.zeroth_order.engine.progress import Progress

#: Rows of a narrow matrix are updated some at a time, so that their float32 sum stays small.
_ROW_CHUNK_ELEMENTS = 1 << 20


class LowRank(Direction):
    """z(d) = left(d) right(d)^T; subclasses say what the factors are.

    Args:
        key: the parameter's noise.
        param: the parameter; the whole one, if it is sharded.
        rank: the most columns that a factor may have.

    Attributes:
        rows, columns: m and n.
        here: the rows that lie in this process. What is added to them, and the left factors that
            are made for that, are theirs alone.
    """

    thin = True

    def __init__(self, key: NoiseKey, param: Tensor, rank: int) -> None:
        self.key = key
        self.device = param.device
        self.dtype = accumulator_dtype(param.dtype)
        self.rows, self.columns = matrix_shape(param)
        self.here = rows_here(param)
        # On a CPU, factors that a step has made would outlive it.
        self.lasting = launches(param)
        self.rank = self.kin = min(rank, self.rows, self.columns)

    def pair(self, draw: int) -> tuple[Tensor, Tensor]:
        """left (m, r), its rows that are here, and right (n, r) of a draw, in the accumulator's
        dtype."""
        raise NotImplementedError

    def normals(self, draw: int, start: int, shape: tuple[int, int]) -> Tensor:
        """Normals start ... of the draw's sequence, in rows of `shape`."""
        count = math.prod(shape)
        z = normal(
            count,
            seed=self.key.seed,
            stream=self.key.stream,
            draw=draw,
            offset=start,
            device=self.device,
        )
        return z.to(self.dtype).view(shape)

    def combined(
        self, coefficients: Coefficients, shape: tuple[int, int], start: int = 0
    ) -> Tensor:
        """sum_d coefficients[d] times the draw's normals `start` ..., in rows of `shape`."""
        total = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for draw, coefficient in coefficients.items():
            total += coefficient * self.normals(draw, start, shape)
        return total

    @property
    def left_start(self) -> int:
        """The place of a left factor's first row here, among a draw's normals in rows of r."""
        return self.here.start * self.rank

    @property
    def left_shape(self) -> tuple[int, int]:
        """The shape of a left factor's rows that are here."""
        return len(self.here), self.rank

    def here_of(self, left: Tensor) -> Tensor:
        """The rows that are here of a whole left factor."""
        return left[self.here.start : self.here.stop]

    @property
    def rounding_key(self) -> NoiseKey:
        """The key of the rows' rounding: that of their place in the whole."""
        return self.key.shifted(self.here.start * self.columns)

    def haar(self, draw: int, start: int, shape: tuple[int, int]) -> Tensor:
        """Orthonormal columns, uniformly distributed, of normals start ... of the draw."""
        return sign_fixed_qr(self.normals(draw, start, shape))

    def factors(self, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
        """L (m, k) and R (n, k), whose product L R^T is sum_d coefficients[d] z(d)."""
        pairs = [(*self.pair(draw), c) for draw, c in coefficients.items()]
        left = torch.cat([left * c for left, _, c in pairs], dim=1)
        return left, torch.cat([right for _, right, _ in pairs], dim=1)

    def add_(
        self,
        param: Tensor,
        coefficients: Coefficients,
        *,
        decay: float = 1.0,
        rounding: Rounding = "nearest",
        progress: Progress | None = None,
    ) -> None:
        """As in `Direction`, by one matrix product that accumulates into the parameter."""
        last = max(coefficients, default=None)
        options: dict[str, Any] = {
            "coefficients": tuple(coefficients.items()),
            "decay": decay,
            "rounding_draw": last if rounding == "stochastic" else None,
        }
        if self.queued(add_together, param, progress, **options):
            return
        if coefficients:
            left, right = self.factors(coefficients)
        else:
            left, right = (
                torch.zeros(size, 1, dtype=self.dtype, device=self.device)
                for size in (len(self.here), self.columns)
            )
        self.add_product_(
            *(param, left, right),
            decay=decay,
            rounding=rounding,
            rounding_draw=last,
            progress=progress,
        )

    def queued(
        self,
        operation: Callable[..., Any],
        param: Tensor,
        progress: Progress | None,
        beside: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> bool:
        """Whether an operation on a batch of matrices and their `directions` is made later,
        together with others (see `Passes.put`)."""
        if progress is None or progress.passes is None or not param.is_contiguous():
            return False
        if not progress.passes.takes(param):
            return False
        matrix = param.detach().view(len(self.here), self.columns)
        beside = {"directions": self, **(beside or {})}
        return progress.passes.put(
            operation, matrix, self.rounding_key, progress, beside=beside, **options
        )

    def add_product_(
        self,
        param: Tensor,
        left: Tensor,
        right: Tensor,
        *,
        decay: float,
        rounding: Rounding,
        rounding_draw: int | None,
        progress: Progress | None = None,
    ) -> None:
        """param <- round(decay param + left right^T): left (m, k), right (n, k); of the rows that
        are here."""
        progress = progress or Progress()
        with progress.dense(param) as dense:
            matrix = dense.view(len(self.here), self.columns)
            if param.dtype == self.dtype:
                for _ in whole(matrix, progress):
                    matrix.addmm_(left, right.T, beta=decay)
                return
            size = max(1, _ROW_CHUNK_ELEMENTS // max(1, self.columns))
            # Without values only memory is counted: two chunks take what all of them do.
            end = min(2 * size, self.rows) if is_fake(matrix) else len(matrix)
            for number, start in enumerate(range(0, end, size)):
                rows = matrix[start : start + size]
                if not progress.begin(number, rows):
                    progress.end(number)
                    continue
                add_(
                    rows,
                    left[start : start + size] @ right.T,
                    [],
                    draws=[],
                    decay=decay,
                    rounding="nearest" if rounding_draw is None else rounding,
                    rounding_draw=rounding_draw,
                    key=self.rounding_key.shifted(start * self.columns),
                )
                progress.end(number)

    def perturbed_rows(self, weight: Tensor, rows: Tensor, coefficients: Coefficients) -> Tensor:
        """As in `Direction`, without the other rows."""
        left, right = self.factors(coefficients)
        return (weight[rows] + left[rows] @ right.T).to(weight.dtype)


def add_together(
    matrices: Batch,
    *,
    directions: Sequence[LowRank],
    coefficients: Terms,
    decay: float,
    rounding_draw: int | None,
) -> None:
    """matrix <- round(decay matrix + sum_d coefficients[d] z(d)) of each, with directions of one
    class."""
    dtype = accumulator_dtype(matrices.dtype)
    if coefficients:
        left, right = type(directions[0]).pairs_together(directions, dict(coefficients), dtype)
        add_products_(matrices, left, right, decay=decay, rounding_draw=rounding_draw)
    else:
        apply_(matrices, [], draws=[], decay=decay)


class OuterProduct(LowRank):
    """z(d) = A(d) B(d)^T / sqrt(r), A (m, r) and B (n, r) of normals, both new in every draw."""

    def pair(self, draw: int) -> tuple[Tensor, Tensor]:
        """As in `LowRank`."""
        left = self.normals(draw, self.left_start, self.left_shape)
        right = self.normals(draw, self.rows * self.rank, (self.columns, self.rank))
        return left / math.sqrt(self.rank), right

    @classmethod
    def pairs_together(
        cls, directions: Sequence[LowRank], coefficients: Coefficients, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """As in `Direction`: two launches a draw."""

        def maker() -> tuple[Maker, list[int], list[int]]:
            places = [(own.key.shifted(own.left_start), own.left_shape) for own in directions]
            for own in directions:
                behind = own.key.shifted(own.rows * own.rank)
                places.append((behind, (own.columns, own.rank)))
            ranks = sorted({own.rank for own in directions})
            of = [1 + ranks.index(own.rank) for own in directions] + [0] * len(directions)
            return Maker(places, dtype, directions[0].device), ranks, of

        tool, ranks, of = prepared(directions, ("pairs", dtype), maker)
        kinds = [[((draw, 1.0),) for draw in coefficients]]
        for rank in ranks:
            kinds.append([((draw, c / math.sqrt(rank)),) for draw, c in coefficients.items()])
        made, count = tool.make(kinds, of), len(directions)
        return made.part(0, count), made.part(count, 2 * count)

    def split(self, normals: Tensor) -> tuple[Tensor, Tensor]:
        """A / sqrt(r) (..., m, r) and B (..., n, r) of normals (..., m + n, r)."""
        left, right = normals[..., : self.rows, :], normals[..., self.rows :, :]
        return left / math.sqrt(self.rank), right


class LowRankZerothOrder(ZerothOrderOptimizer):
    """Matrices move along low-rank directions, other parameters along independent normals.

    Group keys: `rank` and `basis_update_gap`; run keys: `basis_draw`, the draw that the present
    basis belongs to. A subclass implements `_matrix_direction`.
    """

    _names = ProbeNames(run=("basis_draw", "basis_update_gap"))

    def __init__(self, params: Params, defaults: dict[str, Any], **run: Any) -> None:
        super().__init__(params, {**defaults, "distribution": "normal", "basis_draw": 0}, **run)

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_positive_int("rank", group["rank"])
        check_positive_int("basis_update_gap", group["basis_update_gap"])
        check_nonnegative_int("basis_draw", group["basis_draw"], 1 << 32)

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        return True  # a left factor, or of the parameter's shape

    def _virtual(self, param: Tensor, group: Group) -> bool:
        # At the operators that read them, low-rank directions cost no pass over the weights.
        return bool(group["perturbation"] != "inplace")

    def _direction(
        self, param: Tensor, group: Group, number: int, *, virtual: bool
    ) -> Direction | None:
        key = NoiseKey(group["seed"], number)
        if param.dim() < 2:
            return Noise(key)
        return self._matrix_direction(self._whole(param), group, key)

    def _matrix_direction(self, param: Tensor, group: Group, key: NoiseKey) -> LowRank:
        """The directions of a parameter of two or more dimensions; the whole one, if sharded."""
        raise NotImplementedError

    def _change_run(self, run: dict[str, int]) -> list[Callable[[], None]]:
        tasks = super()._change_run(run)
        if run["step"] % self.param_groups[0]["basis_update_gap"]:
            return tasks
        run["basis_draw"] = run["draw"]
        for _, group, param, name in named_params(self.param_groups):
            if param in self.state and param.dim() > 1 and param.numel():
                change = (param, group, stream(name), run["draw"], Progress())
                tasks.append(functools.partial(self._change_basis, *change))
        return tasks

    def _change_basis(
        self, param: Tensor, group: Group, number: int, new: int, progress: Progress
    ) -> None:
        """Take a matrix's state from the present basis to that of the draw `new`.

        Args:
            param, group: the matrix, which has state, and its group.
            number: its stream.
            new: the draw that the next step begins with.
            progress: of the change, should it break off.
        """


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """(m, n) of a parameter of two or more dimensions, seen as a matrix."""
    return param.shape[0], math.prod(param.shape[1:])
