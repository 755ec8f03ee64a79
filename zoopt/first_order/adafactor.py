"""GaLore with Adafactor: the projected gradient's second moment is a row times a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoopt.checks import check_bool, check_number
from zoopt.distributed.sharding import Rows
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.first_order.adamw import StateRounding
from zoopt.first_order.galore import INSIDE
from zoopt.first_order.projected.codecs import coded_units, moment, moment_specs
from zoopt.first_order.projected.coded_shards import whole_blocks
from zoopt.first_order.projected.core import ProjectedOptimizer
from zoopt.first_order.projected.geometry import ProjType
from zoopt.first_order.projected.residuals import Residual, State
from zoopt.first_order.projected.rules import Rule, moment_draw
from zoopt.first_order.projected.subspace import Projector
from zoopt.first_order.site import Site
from zoopt.kernels.adam.moments import Format
from zoopt.kernels.adam.op_average import lerp_
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import launches
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.registry import register


def root_mean_square(tensor: Tensor, rows: Rows | None = None) -> Tensor:
    """Of all elements: (), in the accumulator's dtype; `rows` of a tensor that has some of them."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=accumulator_dtype(tensor.dtype))
    if rows is None:
        return norm / math.sqrt(max(tensor.numel(), 1))
    return rows.norm(norm) / math.sqrt(max(rows.count * math.prod(tensor.shape[1:]), 1))


def root_mean_squares(tensors: Sequence[Tensor], rows: Rows | None = None) -> Tensor:
    """Of each of k tensors of as many elements: (k,); on a GPU in one pass, with the bits of each
    alone."""
    if rows is not None or (len(tensors) == 1 and not launches(tensors[0])):
        return root_mean_square(tensors[0], rows).unsqueeze(0)
    wide = accumulator_dtype(tensors[0].dtype)
    norms = torch._foreach_norm(list(tensors), 2, dtype=wide)
    return torch.stack(norms).div_(math.sqrt(max(tensors[0].numel(), 1)))


def mean_of_rows(tensor: Tensor, rows: Rows | None) -> Tensor:
    """Of (..., m, n): (..., 1, n); `rows` of an (m, n) that has some of them."""
    if rows is None or tensor.dim() > 2:
        return tensor.mean(-2, keepdim=True)
    return rows.total(tensor.sum(-2, keepdim=True)) / rows.count


def factored_(
    gradient: Tensor,
    row: Tensor,
    column: Tensor,
    *,
    mix: float,
    eps: float,
    rows: Rows | None = None,
) -> Tensor:
    """Update the mean squares of rows and columns in place; return g / sqrt(v) of their v.

        row <- (1 - mix) row + mix mean_columns(g^2),    column alike with mean_rows(g^2)
        v = row column / max(mean(row), eps),    g / sqrt(max(v, eps^2))

    Args:
        gradient: (..., m, n), in the accumulator's dtype.
        row, column: (..., m, 1) and (..., 1, n).
        rows: where the gradient and `row` have some of a tensor's rows (its first axis).
    """
    square = gradient.square()
    row.lerp_(square.mean(-1, keepdim=True), mix)
    column.lerp_(mean_of_rows(square, rows), mix)
    # In the place of the squares: one temporary of the gradient's size.
    torch.mul(row / mean_of_rows(row, rows).clamp_min(eps), column, out=square)
    return square.clamp_min_(eps * eps).rsqrt_().mul_(gradient)


def unfactored_(gradient: Tensor, variance: Tensor, *, mix: float, eps: float) -> Tensor:
    """v <- (1 - mix) v + mix g^2; return g / sqrt(max(v, eps^2)). All of one shape."""
    variance.lerp_(gradient.square(), mix)
    return variance.clamp_min(eps * eps).rsqrt_().mul_(gradient)


def _specs(shape: tuple[int, ...], group: Group, accumulator: torch.dtype) -> dict[str, TensorSpec]:
    if len(shape) < 2:
        specs = {"variance": TensorSpec(shape, accumulator)}
    else:
        specs = {
            "row_var": TensorSpec((*shape[:-1], 1), accumulator),
            "col_var": TensorSpec((*shape[:-2], 1, shape[-1]), accumulator),
        }
    if group["beta1"] is not None:
        specs |= moment_specs(
            "exp_avg", shape, group["state_dtype"], signed=True, accumulator=accumulator
        )
    return specs


def _adafactor(
    gradients: Tensor,
    states: Sequence[State],
    group: Group,
    step: int,
    keys: Sequence[NoiseKey],
    rows: Rows | None = None,
) -> Tensor:
    """u / max(1, RMS(u) / d) with u = g / sqrt(v), or the average of that.

    `rows`, where the only gradient has some rows of a whole one.
    """
    if rows is not None or (len(states) == 1 and not launches(gradients)):
        return _one(gradients[0], states[0], group, step, keys[0], rows).unsqueeze(0)
    update, means = kept(_all_clipped, gradients, states, group, step)
    for name, stack in means.items():
        once(torch._foreach_copy_, [state[name] for state in states], stack.unbind())
    if group["beta1"] is not None:
        _average_(Batch(update.unbind(), keys), states, group, step)
    return update


def _one(
    gradient: Tensor,
    state: State,
    group: Group,
    step: int,
    key: NoiseKey,
    rows: Rows | None = None,
) -> Tensor:
    update, means = kept(_clipped, gradient, state, group, step, rows)
    for name, mean in means.items():
        once(state[name].copy_, mean)
    if group["beta1"] is None:
        return update
    update, units = kept(update.contiguous), dict[str, int]()
    if rows is not None:
        shape = (rows.count, *update.shape[1:])
        units = coded_units(_specs(shape, group, update.dtype), shape, group["state_dtype"])
    if rows is None or not units:
        _average_(Batch([update], [key]), [state], group, step)
        return update
    with whole_blocks(rows.param, shape, state, units, writes=[update]) as cut:
        if cut.writes[0].numel():
            here = replace(key, offset=cut.first)
            _average_(Batch(cut.writes, [here]), [cut.state], group, step)
    return update


def _average_(updates: Batch, states: Sequence[State], group: Group, step: int) -> None:
    """M <- beta1 M + (1 - beta1) U, and U <- M before it is stored."""
    each = zip(updates.tensors, states, strict=True)
    moments = [moment(state, "exp_avg", own.numel(), signed=True) for own, state in each]
    weight, draw = 1.0 - group["beta1"], moment_draw(group, step)
    lerp_(updates, moments, weight, moment_draw=draw, out=updates.tensors)


#: The states of the second moment.
_VARIANCES = ("variance", "row_var", "col_var")


def _clipped(
    gradient: Tensor, state: State, group: Group, step: int, rows: Rows | None
) -> tuple[Tensor, State]:
    """U, and the new mean squares."""
    means = {name: state[name].clone() for name in _VARIANCES if name in state}
    update = _divided(gradient, means, group, step, rows)
    update = update.div_((root_mean_square(update, rows) / group["d"]).clamp_min(1.0))
    return update, means


def _all_clipped(
    gradients: Tensor, states: Sequence[State], group: Group, step: int
) -> tuple[Tensor, State]:
    """The same of k gradients, (k, ...), all in the same operations."""
    names = [name for name in _VARIANCES if name in states[0]]
    means = {name: torch.stack([state[name] for state in states]) for name in names}
    update = _divided(gradients, means, group, step)
    scales = (root_mean_squares(update.unbind()) / group["d"]).clamp_min(1.0)
    return update.div_(scales.view(-1, *[1] * (update.dim() - 1))).contiguous(), means


def _divided(
    gradient: Tensor, means: State, group: Group, step: int, rows: Rows | None = None
) -> Tensor:
    """g / sqrt(v), from mean squares that it updates."""
    g = gradient.to(accumulator_dtype(gradient.dtype))
    mix = step ** float(group["beta2_decay"])
    info = torch.finfo(g.dtype)
    # Whose square is not 0: where there has been no gradient, 0 / sqrt(v) is to be 0.
    eps = info.eps if group["eps"][0] is None else max(float(group["eps"][0]), info.tiny**0.5)
    if "variance" in means:
        return unfactored_(g, means["variance"], mix=mix, eps=eps)
    return factored_(g, means["row_var"], means["col_var"], mix=mix, eps=eps, rows=rows)


ADAFACTOR = Rule(_specs, _adafactor)


@register("galore-adafactor", "low-rank")
class GaLoreAdafactor(ProjectedOptimizer):
    r"""GaLore (Zhao et al., 2024) with Adafactor (Shazeer & Stern, 2018) in the subspace.

    On the projected gradient R (channels, r), for step t from 1 and s = t^beta2_decay:

        row <- (1 - s) row + s mean_r(R^2),    column <- (1 - s) column + s mean_channels(R^2)
        V = row column / max(mean(row), eps1),    U = R / sqrt(max(V, eps1^2))
        N = U / max(1, RMS(U) / d),    and with beta1: M <- beta1 M + (1 - beta1) N, N = M
        theta <- (1 - lr weight_decay) theta - alpha scale up(N)

    with alpha = lr, or with `relative_step`, max(eps2, RMS(theta)) min(lr, 1 / sqrt(t)). Parameters
    of groups with `rank=None`, and those of fewer than two dimensions, get Adafactor itself: of
    vectors V is not factored, of tensors with more than two dimensions the last two are.

    State, in bytes of a matrix with k = max(m, n), l = min(m, n): 4 l r (basis; 2 l r where weights
    are bfloat16) + 4 (k + r) + 8 (`step`), and 4 k r with beta1. Of a matrix that is not projected
    4 (m + n) + 8.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; default 1e-2 (torch.optim.Adafactor; the authors pre-train with it).
        beta2_decay: the exponent of s, at most 0; default -0.8 (paper).
        eps: eps1 and eps2; default (None, 1e-3) (torch); None is the machine epsilon of the dtype
            that is computed in, float32's 1.2e-7 mostly.
        d: the clipping threshold, at least 1; default 1.0 (paper).
        weight_decay: decoupled; default 0.0.
        beta1: of the average of clipped directions; default None, no average (paper).
        relative_step: as above; default False (the authors' code).
        rank, update_proj_gap, scale, proj_type, projector, stagger: as for `GaLoreAdamW`.
        state_dtype, state_rounding: of the average, as for `AdamW`.
        rounding, maximize, seed: as for `AdamW`.

    Raises:
        TypeError, ValueError: a hyperparameter out of range.

    Differs from torch.optim.Adafactor (at `rank=None`): that is `relative_step=True`, without
    beta1, to rounding; but here bfloat16 and float16 are computed in float32, with its epsilon.
    Differs from the paper: directions of R that are nothing but rounding count as 0, as for
    `GaLoreAdamW`; eps1 alone holds back gradients of size 1 at most.
    Differs from the authors' code: it adds eps1 = 1e-30 to the square of the gradient, and it
    averages steps, learning rate and all, where here directions are averaged.

    Example:
        >>> opt = zoopt.GaLoreAdafactor(model.parameters(), lr=1e-2, rank=128)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     opt.step()
        ...     opt.zero_grad()
    """

    shards = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        beta1: float | None = None,
        relative_step: bool = False,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjType = "std",
        projector: Projector = "warm",
        stagger: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)

    def _residual(self, group: Group) -> Residual:
        return INSIDE

    def _rule(self, group: Group) -> Rule:
        return ADAFACTOR

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("beta2_decay", group["beta2_decay"], high=0.0)
        if not isinstance(group["eps"], tuple | list) or len(group["eps"]) != 2:
            raise TypeError(
                f"eps must be a pair of numbers, the first or None, got {group['eps']!r}"
            )
        for i, eps in enumerate(group["eps"]):
            if eps is not None or i == 1:
                check_number(f"eps[{i}]", eps, low=0.0)
        check_number("d", group["d"], low=1.0)
        if group["beta1"] is not None:
            check_number("beta1", group["beta1"], low=0.0, high=1.0, open_high=True)
        check_bool("relative_step", group["relative_step"])
        check_bool("stagger", group["stagger"])

    def _direction(
        self,
        sites: Sequence[Site],
        reduced: Tensor,
        states: Sequence[State],
        step: int,
        keys: Sequence[NoiseKey],
        norms: Tensor | None = None,
    ) -> Tensor:
        """The rule's, times alpha / lr."""
        direction = once(super()._direction, sites, reduced, states, step, keys, norms)
        group, rows = sites[0].group, sites[0].rows
        if not group["relative_step"]:
            return direction
        # min(lr, 1 / sqrt(t)) / lr, of a rate of 0 too.
        share = max(1.0, float(group["lr"]) * math.sqrt(step))
        sizes = root_mean_squares([site.param.detach() for site in sites], rows)
        sizes = sizes.clamp_min(group["eps"][1]).div_(share)
        once(direction.mul_, sizes.view(-1, *[1] * (direction.dim() - 1)))
        return direction

    def _rule_options(self, site: Site) -> dict[str, Any]:
        if site.sharded is None:
            return {}
        geo = self._geometry(site.sharded, site.group)
        # On the left, and between two bases, every process has the whole of R.
        return {"rows": site.rows} if geo is None or geo.side == "right" else {}

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        """The mean squares of rows too, and of more than two axes those of columns."""
        if name not in ("row_var", "col_var"):
            return super()._follows_rows(name, spec, param, group)
        geo = self._geometry(param, group)
        if geo is not None and geo.side != "right":
            return False
        return name == "row_var" or len(spec.shape) > 2
