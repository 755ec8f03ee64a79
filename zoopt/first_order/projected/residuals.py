"""The residual seam: a method's algorithm, and what becomes of a gradient outside its subspace.

The algorithm takes a gradient down to R, has the rule make a direction N (channels, r) of it, and
descends terms in one write of theta: a low-rank product, and a multiple of the gradient for each
channel. It does so for k matrices of one geometry at once, stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from zoopt.checks import check_choice, check_number
from zoopt.distributed.sharding import sum_
from zoopt.first_order.projected.geometry import Geometry
from zoopt.kernels import squares
from zoopt.kernels.journal import kept, once
from zoopt.optimizer import Group, TensorSpec

State = dict[str, Tensor]
#: The projections under which R has channels of its gradient's.
OneSided = Literal["std", "reverse_std", "right", "left"]


class Terms(NamedTuple):
    """What is descended: the way up of rate times `product`, plus channel_scale times the gradient,
    plus sign_step times the signs of the gradient outside its subspace.

    Attributes:
        product: (k, channels, r), which the write may use up, or None.
        channel_scale: (k, channels), or (k, 1) for all channels, or None.
        sign_steps: a number for each of the k; empty for no such term.
        reduced: R, (k, channels, r), which the signs need.
        rate: a number.
    """

    product: Tensor | None
    channel_scale: Tensor | None = None
    sign_steps: Sequence[float] = ()
    reduced: Tensor | None = None
    rate: float = 1.0


class Step(NamedTuple):
    """A step of k matrices of one geometry: the operations of an algorithm, and its operands.

    Attributes:
        down: () -> R, (k, channels, r): G Q, or G^T P, or P^T G Q, as `Geometry` says. Where
            gradients are freed as they come, R is already there, summed over micro-batches.
        rule: R -> the rule's direction N, of R's shape. It updates the moments, and takes the place
            of R if the residual does not need that.
        rule_and_norms: R -> N, and the norms of the rows of N and of R, (2, k, channels), from the
            rule's pass over its moments.
        descend: terms -> the write of theta.
        gradients: G of each, (m, n); where they are freed as they come, only if they are needed.
        states: each matrix's; group, geo: those of all.
        sharded: the parameter whose rows these are some of, where they are not all.
    """

    down: Callable[[], Tensor]
    rule: Callable[[Tensor], Tensor]
    rule_and_norms: Callable[[Tensor], tuple[Tensor, Tensor]]
    descend: Callable[[Terms], None]
    gradients: Sequence[Tensor] | None
    states: Sequence[State]
    group: Group
    geo: Geometry
    sharded: Tensor | None = None


class Residual(NamedTuple):
    """A residual's state and its algorithm.

    Attributes:
        specs: geometry, accumulator's dtype -> the state tensors.
        algorithm: takes a step.
        needs_gradient: whether it descends terms that multiply the whole gradient.
        needs_reduced: whether it reads R after the rule, or the write does.
    """

    specs: Callable[[Geometry, torch.dtype], dict[str, TensorSpec]]
    algorithm: Callable[[Step], None]
    needs_gradient: bool
    needs_reduced: bool = True


def no_specs(geo: Geometry, accumulator: torch.dtype) -> dict[str, TensorSpec]:
    """No state."""
    return {}


def channel_norms(
    gradients: Sequence[Tensor], geo: Geometry, dtype: torch.dtype, sharded: Tensor | None = None
) -> Tensor:
    """||G_j|| of each channel j, a row of G (m, n), or a column if its left side is projected:
    (k, channels)."""
    left = geo.side == "left"
    total = kept(lambda: squares(gradients, 0 if left else 1).to(dtype))
    if left and sharded is not None:
        sum_(total, sharded)
    return total.sqrt()


def norm_over_channels(values: Tensor, step: Step) -> Tensor:
    """The norm, (k,), of a number for each channel, (k, channels): of all processes' channels,
    where those are rows that lie apart."""
    norm: Tensor = torch.linalg.vector_norm(values, dim=1)
    if step.sharded is None or step.geo.side == "left":
        return norm
    square = kept(norm.square)
    sum_(square, step.sharded)
    return square.sqrt()


def times_norm(scale: Tensor, norm: Tensor) -> Tensor:
    """scale norm, and 0 for a scale of 0 of anything, a norm that has overflowed too."""
    return torch.where(scale == 0, 0.0, scale * norm)


def limited(norm: Tensor, states: Sequence[State], group: Group) -> Tensor:
    """min(1, gamma previous / norm), (k,): the factor under which a norm grows by gamma at most.

    The last norm that was not 0 is the state's; there is none before the first step.
    """
    norms = [state["update_norm"] for state in states]
    factor, limited_norms = kept(_limited, norm, norms, group["norm_growth_limit"])
    once(torch._foreach_copy_, norms, limited_norms.unbind())
    return factor


def _limited(norm: Tensor, norms: Sequence[Tensor], gamma: float) -> tuple[Tensor, Tensor]:
    """The factor, and what the last norms that were not 0, one in `norms` for each, become."""
    previous = torch.stack(list(norms))
    cap = previous * gamma
    factor = torch.where((previous > 0) & (norm > cap), cap / norm, torch.ones_like(norm))
    return factor, torch.where(norm > 0, norm * factor, previous)


def check_channels(group: Group) -> None:
    """Raise unless the group can be scaled by channels, under a limiter or none."""
    if group["norm_growth_limit"] is not None:
        check_number("norm_growth_limit", group["norm_growth_limit"], low=1.0)
    # Between two bases R has no channels: its rows are mixtures of the gradient's.
    check_choice("proj_type", group["proj_type"], get_args(OneSided))


def norm_specs(geo: Geometry, accumulator: torch.dtype) -> dict[str, TensorSpec]:
    """The last norm, for the limiter."""
    return {"update_norm": TensorSpec((), accumulator)}


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, with x / 0 = 0: a channel without a gradient has no scale."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def energy_outside(whole: Tensor, inside: Tensor) -> Tensor:
    """||G||^2 - ||R||^2 of their norms, which is that of the part outside, the basis being
    orthonormal; 0 where it is within the rounding of the squares, 32 eps ||G||^2."""
    square = whole.square()
    outside = square - inside.square()
    return torch.where(outside > 32.0 * torch.finfo(square.dtype).eps * square, outside, 0.0)
