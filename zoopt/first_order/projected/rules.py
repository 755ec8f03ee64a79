"""The rule seam: what happens to a gradient inside its subspace. A rule never sees theta."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoopt.first_order.projected.codecs import moment, moment_specs
from zoopt.first_order.site import betas_of, draw_of
from zoopt.kernels.adam.moments import Moment, Moments
from zoopt.kernels.adam.op import adam_, adamw_
from zoopt.kernels.adam.op_average import average_
from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import kept
from zoopt.kernels.noise.key import NoiseKey
from zoopt.lasting import prepared
from zoopt.optimizer import Group, TensorSpec

State = dict[str, Tensor]


class Rule(NamedTuple):
    """A rule's state and its direction.

    Attributes:
        specs: shape, group, accumulator's dtype -> the state tensors.
        direction: gradients (k, c, r), states, group, step from 1, keys -> what is descended,
            (k, c, r) in the accumulator's dtype: of k parameters with a state and a key each. It
            updates the states; the gradients keep their values. Each may have any other shape than
            (c, r).
        elementwise: whether each element's direction and state depend on its own gradients alone,
            so that parts of a parameter can be stepped apart.
        norms: gradients, states -> what `direction` takes as `norms`, (2, k c): it writes there the
            squared norms of the direction's rows and of the gradients', in the pass that makes the
            direction. None where it cannot.
        overwrites: whether `direction` takes gradients of every dtype, and `out`, where the
            direction goes, which may be the gradients.
        write: batch, gradients, states, group, step -> None, with `rate`, `decay` and
            `rounding_draw`: theta <- decay theta + rate direction in one pass over all parameters
            of a batch. None where that takes two passes, a parameter at a time.
    """

    specs: Callable[[tuple[int, ...], Group, torch.dtype], Mapping[str, TensorSpec]]
    direction: Callable[..., Tensor]
    elementwise: bool = False
    norms: Callable[[Tensor, Sequence[State]], Tensor] | None = None
    overwrites: bool = False
    write: Callable[..., None] | None = None


def adam_numbers(group: Group, step: int) -> tuple[float, float]:
    """Adam's scale and eps, as the kernels take them, with both biases corrected.

    With eps_correction=False eps is added to sqrt(v) itself, not to sqrt(vhat).
    """
    beta1, beta2 = betas_of(group)
    root = math.sqrt(1.0 - beta2**step)
    eps = group["eps"] * (root if group.get("eps_correction", True) else 1.0)
    return root / (1.0 - beta1**step), eps


def moment_draw(group: Group, step: int) -> int | None:
    """The draw whose bits round moments, or None where they are rounded to nearest."""
    return draw_of(step) if group["state_rounding"] == "stochastic" else None


def _adam_specs(
    shape: tuple[int, ...], group: Group, accumulator: torch.dtype
) -> dict[str, TensorSpec]:
    kind = group["state_dtype"]
    return {
        **moment_specs("exp_avg", shape, kind, signed=True, accumulator=accumulator),
        **moment_specs("exp_avg_sq", shape, kind, signed=False, accumulator=accumulator),
    }


def adam_moments(state: State, numel: int) -> tuple[Moment, Moment]:
    """Adam's moments as they are stored."""
    return (
        moment(state, "exp_avg", numel, signed=True),
        moment(state, "exp_avg_sq", numel, signed=False),
    )


def _moments_of(states: Sequence[State], numel: int) -> tuple[list[Moment], list[Moment]]:
    pairs = [adam_moments(state, numel) for state in states]
    return [first for first, _ in pairs], [second for _, second in pairs]


def _adam(
    gradients: Tensor,
    states: Sequence[State],
    group: Group,
    step: int,
    keys: Sequence[NoiseKey],
    norms: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """mhat / (sqrt(vhat) + eps)."""
    scale, eps = adam_numbers(group, step)
    firsts, seconds = _moments_of(states, gradients[0].numel())
    if out is None:
        wide = firsts[0].accumulator
        out = kept(torch.empty, gradients.shape, dtype=wide, device=gradients.device)
    options: dict[str, Any] = {"betas": betas_of(group), "scale": scale, "eps": eps}
    options |= {"moment_draw": moment_draw(group, step), "norms": norms}
    if len(keys) == 1:
        adam_(gradients[0], firsts[0], seconds[0], key=keys[0], out=out[0], **options)
    else:
        adam_(Batch(gradients.unbind(), keys), firsts, seconds, out=out.unbind(), **options)
    return out


def _adam_norms(gradients: Tensor, states: Sequence[State]) -> Tensor:
    """(2, k c), uninitialised, in the moments' accumulator."""
    first, _ = adam_moments(states[0], gradients[0].numel())
    rows = gradients.shape[0] * gradients.shape[1]
    return gradients.new_empty((2, rows), dtype=first.accumulator)


def _adamw(
    batch: Batch,
    gradients: Sequence[Tensor],
    states: Sequence[State],
    group: Group,
    step: int,
    *,
    rate: float,
    decay: float,
    rounding_draw: int | None,
) -> None:
    """theta <- decay theta + rate mhat / (sqrt(vhat) + eps)."""
    scale, eps = adam_numbers(group, step)

    def moments() -> list[Moments]:
        pairs = [
            adam_moments(state, param.numel())
            for state, param in zip(states, batch.tensors, strict=True)
        ]
        return [Moments([pair[i] for pair in pairs]) for i in range(2)]

    adamw_(
        batch,
        gradients,
        *prepared(states, "moments", moments),
        betas=betas_of(group),
        scale=rate * scale,
        eps=eps,
        decay=decay,
        moment_draw=moment_draw(group, step),
        rounding_draw=rounding_draw,
    )


def _momentum_specs(
    shape: tuple[int, ...], group: Group, accumulator: torch.dtype
) -> Mapping[str, TensorSpec]:
    kind = group["state_dtype"]
    return moment_specs("momentum_buffer", shape, kind, signed=True, accumulator=accumulator)


def _lion_specs(
    shape: tuple[int, ...], group: Group, accumulator: torch.dtype
) -> Mapping[str, TensorSpec]:
    kind = group["state_dtype"]
    return moment_specs("exp_avg", shape, kind, signed=True, accumulator=accumulator)


def _average(
    name: str,
    gradients: Tensor,
    states: Sequence[State],
    keys: Sequence[NoiseKey],
    **options: Any,
) -> Tensor:
    """The running average of that name, and the direction that it gives: see `average_`."""
    moments = [moment(state, name, gradients[0].numel(), signed=True) for state in states]
    wide = moments[0].accumulator
    out = kept(torch.empty, gradients.shape, dtype=wide, device=gradients.device)
    average_(Batch(gradients.unbind(), keys), moments, out=out.unbind(), **options)
    return out


def _momentum(
    gradients: Tensor, states: Sequence[State], group: Group, step: int, keys: Sequence[NoiseKey]
) -> Tensor:
    """buffer <- momentum buffer + g; descends the buffer."""
    momentum: float = group["momentum"]
    return _average(
        *("momentum_buffer", gradients, states, keys),
        look=(momentum, 1.0),
        keep=(momentum, 1.0),
        moment_draw=moment_draw(group, step),
    )


def _lion(
    gradients: Tensor, states: Sequence[State], group: Group, step: int, keys: Sequence[NoiseKey]
) -> Tensor:
    """sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (Chen et al., 2023)."""
    beta1, beta2 = betas_of(group)
    return _average(
        *("exp_avg", gradients, states, keys),
        look=(beta1, 1.0 - beta1),
        keep=(beta2, 1.0 - beta2),
        signs=True,
        moment_draw=moment_draw(group, step),
    )


ADAM = Rule(_adam_specs, _adam, elementwise=True, norms=_adam_norms, overwrites=True, write=_adamw)
MOMENTUM = Rule(_momentum_specs, _momentum, elementwise=True)
LION = Rule(_lion_specs, _lion, elementwise=True)
