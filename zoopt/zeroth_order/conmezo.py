"""ConMeZO: directions from a cone around the momentum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from zoopt.checks import check_nonnegative_int, check_number
from zoopt.distributed.exchange import Job, Parallel
from zoopt.distributed.sharding import is_sharded, layout, local, sum_
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch
from zoopt.kernels.descent.op import energies
from zoopt.kernels.descent.rule import Shape
from zoopt.kernels.dispatch import known
from zoopt.kernels.noise.key import NoiseKey
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.parameters import named_params
from zoopt.registry import register
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.chunks import chunks
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.noise import Elementwise
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator, PendingProbe
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Site, Sites


def cone(m_norm: float, d: int, t: float) -> tuple[float, float]:
    """The coefficients of m and of u in z = cos(t) sqrt(d) m / ||m|| + sin(t) u.

    Args:
        m_norm: ||m||, over all of m; where it is 0, z = u.
        d: how many elements m has.
        t: the angle between z and m, in radians.
    """
    if not m_norm:
        return 0.0, 1.0
    return math.cos(t) * math.sqrt(d) / m_norm, math.sin(t)


def averaged(m: Tensor, ghat: Tensor, b: float) -> Tensor:
    """m <- b m + (1 - b) ghat, both (d,); ghat = mean_j(g_j z_j) is overwritten."""
    return (m * b).add_(ghat.mul_(1.0 - b))


def warmed(step: int, warmup: int, start: float, end: float) -> float:
    """b of a step, from 0: linear from start to end over `warmup` steps."""
    return start + (end - start) * (min(1.0, step / warmup) if warmup else 1.0)


@dataclasses.dataclass
class Angles:
    """The coefficients of z = radial m + lateral u in a step, see `cone`."""

    radial: float = 0.0
    lateral: float = 1.0


class Cone(Elementwise):
    """z = radial m + lateral u with u independent normals: a cone around m.

    Args:
        key: the noise of u.
        momentum: m, of the parameter's shape.
        angles: the two coefficients, the same for all of a param group.
    """

    def __init__(self, key: NoiseKey, momentum: Tensor, angles: Angles) -> None:
        super().__init__(key)
        self.momentum = momentum.view(-1)
        self.angles = angles

    def combine(self, theta: Tensor, coefficients: Coefficients, start: int) -> Tensor:
        """As in `Chunkwise`."""
        total = super().combine(theta, self.sums(coefficients), start)
        return total.add_(
            self.momentum[start : start + theta.numel()] * self.along_momentum(coefficients)
        )

    def sums(self, coefficients: Coefficients) -> dict[int, float]:
        """As in `Elementwise`."""
        return {draw: self.angles.lateral * c for draw, c in coefficients.items()}

    def along_momentum(self, coefficients: Coefficients) -> float:
        """What multiplies m in sum_d coefficients[d] z(d)."""
        return self.angles.radial * sum(coefficients.values())

    def shaping(
        self, coefficients: Coefficients, gradient: Coefficients
    ) -> tuple[Shape, Tensor | None]:
        """As in `Elementwise`."""
        radials = self.along_momentum(coefficients), self.along_momentum(gradient)
        return Shape("cone", *radials), self.momentum


@register("conmezo", "zeroth-order")
class ConMeZO(ZerothOrderOptimizer):
    r"""MeZO with directions near the momentum (2025).

    With d elements in all, ||.|| over all of them, u_j ~ N(0, I), and z_j = u_j while m = 0,

        z_j    = cos(t) sqrt(d) m / ||m|| + sin(t) u_j
        theta <- (1 - lr weight_decay) theta - lr mean_j(g_j z_j)
        m     <- b m + (1 - b) mean_j(g_j z_j)

    b rises from beta_start to beta over the first warmup_steps, so that m quickly forgets its
    first, uninformed directions. A step costs 2 num_probes forward passes (one-sided: 1 +
    num_probes).

    State, in bytes a parameter element: 4 (8 for float64): `momentum_buffer`.

    Args:
        params, lr, zo_eps, weight_decay, num_probes, estimator, perturbation, rounding,
            max_projected_grad, maximize, seed, process_group, parallel, record: as for `MeZO`.
        cone_angle: t in radians, in (0, pi/2]; default 1.35 (paper). pi/2 is MeZO.
        beta: decay of m; default 0.95 (paper).
        beta_start: the first b; default 0.1 (paper).
        warmup_steps: steps until b is beta; default 1000. 0 for none.

    Raises:
        TypeError, ValueError: as for `MeZO`.

    Directions depend on the whole of m, so masks and blocks are not offered, and u is normal.

    Example:
        >>> opt = zoopt.ConMeZO(model.parameters(), lr=1e-6)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    alike = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-6,
        *,
        cone_angle: float = 1.35,
        beta: float = 0.95,
        beta_start: float = 0.1,
        warmup_steps: int = 1000,
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        num_probes: int = 1,
        estimator: Estimator = "two-sided",
        perturbation: PerturbationMode = "auto",
        rounding: RoundingMode = "auto",
        max_projected_grad: float | None = None,
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
        """`momentum_buffer`, in the accumulator's dtype."""
        return {"momentum_buffer": TensorSpec(tuple(param.shape), accumulator_dtype(param.dtype))}

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_number("cone_angle", group["cone_angle"], low=0.0, high=math.pi / 2, open_low=True)
        for name in ("beta", "beta_start"):
            check_number(name, group[name], low=0.0, high=1.0, open_high=True)
        check_nonnegative_int("warmup_steps", group["warmup_steps"])

    def _survey(self, known: Sites | None) -> None:
        if known is None:
            taking_part = [
                (param, self._state(param, group)["momentum_buffer"])
                for _, group, param, _ in named_params(self.param_groups)
                if param.requires_grad
            ]
            self._squares = Squares([m for _, m in taking_part if not is_sharded(m)])
            self._sharded = [m for _, m in taking_part if is_sharded(m)]
            self._numel = sum(param.numel() for param, _ in taking_part)
            self._angles = {id(group): Angles() for group in self.param_groups}
        squares = self._squares.found() + _sharded_squares(self._sharded)
        # math.fsum is exactly rounded, so the order of the parameters does not matter.
        norm = math.sqrt(math.fsum(squares))
        for group in self.param_groups:
            angles = self._angles[id(group)]
            angles.radial, angles.lateral = cone(norm, self._numel, float(group["cone_angle"]))

    def _direction(self, param: Tensor, group: Group, number: int, *, virtual: bool) -> Direction:
        momentum = self._state(param, group)["momentum_buffer"]
        return Cone(NoiseKey(group["seed"], number), momentum, self._angles[id(group)])

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        group, direction = site.group, site.direction
        weights = self._weights(group, pending)
        self._descend(site, pending, offset, weights, progress)
        if not pending.kept:
            return
        assert isinstance(direction, Cone)
        start, end = float(group["beta_start"]), float(group["beta"])
        beta = warmed(group["step"], group["warmup_steps"], start, end)
        sums = direction.sums(weights)
        if direction.queued(
            "turn",
            direction.momentum,
            progress.next,
            draws=list(sums),
            coefficients=list(sums.values()),
            radial=direction.along_momentum(weights),
            keep=beta,
            grow=1.0 - beta,
        ):
            return
        for chunk in chunks(direction.momentum, progress.next):
            momentum = direction.momentum[chunk]
            estimate = direction.combine(momentum, weights, chunk.start)
            momentum.copy_(averaged(momentum, estimate, beta))


class Squares:
    """Sums of squares of buffers: one launch, and one wait, for those of a device."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._alone = [buffer for buffer in buffers if not dispatch.launches(buffer)]
        together: dict[torch.device, list[Tensor]] = {}
        for buffer in buffers:
            if dispatch.launches(buffer):
                together.setdefault(buffer.device, []).append(buffer)
        noise = NoiseKey(0, 0)
        self._batches = [Batch(own, [noise] * len(own), reads=True) for own in together.values()]

    def found(self) -> list[float]:
        """The sums of what the buffers hold now."""
        found = [known(buffer.double().square().sum(), 1.0) for buffer in self._alone]
        return found + [value for batch in self._batches for value in energies(batch).tolist()]


def _sharded_squares(buffers: Sequence[Tensor]) -> list[float]:
    """The sums of squares of sharded buffers: one exchange for those that are divided alike."""
    alike: dict[Hashable, list[Tensor]] = {}
    for buffer in buffers:
        alike.setdefault(layout(buffer), []).append(buffer)
    found = []
    for own in alike.values():
        here = math.fsum(Squares([local(buffer) for buffer in own]).found())
        total = torch.tensor(here, dtype=torch.float64, device=own[0].device)
        sum_(total, own[0])
        found.append(float(total))
    return found
