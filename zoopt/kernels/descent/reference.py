"""The definition of the operations, in plain PyTorch on any device. Chunks bound the temporaries.

Sums of directions are computed by the noise kernels. Every other product is rounded before it is
added. Roots and quotients are correctly rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.descent.rule import Rule, Shape
from zoopt.kernels.noise import reference as noise
from zoopt.kernels.noise.key import NoiseKey

#: The type of `weighted_sum` in any implementation of the noise.
Sums = Callable[..., None]


def descend(
    theta: Tensor,
    out: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    beside: Tensor | None,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    shape: Shape,
    rule: Rule,
    decay: float,
    rounding_draw: int | None,
    key: NoiseKey,
    sums: Sums = noise.weighted_sum,
) -> None:
    """See op.descend_; all tensors are flat."""
    for part in chunks(theta):
        own, shifted = theta[part], key.shifted(part.start)

        def combined(numbers: Sequence[float], radial: float) -> Tensor:
            total = torch.zeros_like(own, dtype=accumulator_dtype(own.dtype))  # noqa: B023
            sums(total, total, None, numbers, draws, 1.0, None, shifted)  # noqa: B023
            return shaped(total, own, _part(beside, part), shape.kind, radial)  # noqa: B023

        update = None
        if rule.kind != "none":
            estimate = combined(gradients, shape.estimate)
            update = ruled(estimate, _part(first, part), _part(second, part), rule)
        if shape.kind == "plain":
            sums(own, out[part], update, coefficients, draws, decay, rounding_draw, shifted)
            continue
        moved = combined(coefficients, shape.radial)
        update = moved if update is None else update + moved
        sums(own, out[part], update, [], [], decay, rounding_draw, shifted)


def shaped(total: Tensor, theta: Tensor, beside: Tensor | None, kind: str, radial: float) -> Tensor:
    """Turn a sum of directions into a displacement, see `Shape`. `beside` has the sum's size, or
    is a single limit."""
    if beside is None:
        return total
    if kind == "small":
        return total.mul_(theta.abs() <= beside.to(theta.dtype))
    if kind == "kept":
        return total.mul_(beside)
    if kind == "scaled":
        return total.div_(exact_root(beside))
    return total.add_(beside * radial)


def ruled(estimate: Tensor, first: Tensor | None, second: Tensor | None, rule: Rule) -> Tensor:
    """The update of theta, see `Rule`. The state changes in place."""
    numbers = rule.numbers
    if rule.kind == "sign":
        return estimate.sign().mul_(numbers[0])
    assert first is not None
    if rule.kind == "momentum":
        first.mul_(numbers[0]).add_(estimate)
        return first * numbers[1]
    assert second is not None
    b1, c1, b2, c2, correction, step_size, eps = numbers
    first.mul_(b1).add_(estimate * c1)
    second.mul_(b2).add_((estimate * estimate).mul_(c2))
    root = exact_root(second / second.new_tensor(correction)).add_(eps)
    return first.mul(step_size).div_(root)


def exact_root(x: Tensor) -> Tensor:
    """sqrt(x), correctly rounded. torch's float32 root is sometimes off by one unit. The float64
    root, rounded to float32, is correct: the root of a float32 number is at least 4 float64 units
    away from every tie."""
    return x.double().sqrt().to(x.dtype)


def curve(
    state: Tensor,
    coefficients: Sequence[float],
    draws: Sequence[int],
    base: float,
    key: NoiseKey,
    sums: Sums = noise.weighted_sum,
) -> None:
    """See op.curve_."""
    for part in chunks(state):
        growth = torch.full_like(state[part], base)
        for coefficient, draw in zip(coefficients, draws, strict=True):
            z = torch.zeros_like(growth)
            sums(z, z, None, [1.0], [draw], 1.0, None, key.shifted(part.start))
            growth.add_(z.square_().mul_(coefficient))
        state[part] = growth.mul_(state[part])


def turn(
    state: Tensor,
    coefficients: Sequence[float],
    draws: Sequence[int],
    radial: float,
    keep: float,
    grow: float,
    key: NoiseKey,
    sums: Sums = noise.weighted_sum,
) -> None:
    """See op.turn_."""
    for part in chunks(state):
        own = state[part]
        estimate = torch.zeros_like(own)
        sums(estimate, estimate, None, coefficients, draws, 1.0, None, key.shifted(part.start))
        estimate.add_(own * radial)
        own.mul_(keep).add_(estimate.mul_(grow))


def small(theta: Tensor, limit: Tensor, out: Tensor, key: NoiseKey) -> None:
    """See op.small_elements."""
    for part in chunks(theta):
        out[part] = theta[part].abs() <= limit.to(theta.dtype)


def energy(
    theta: Tensor,
    coefficients: Sequence[float] | None,
    draws: Sequence[int],
    key: NoiseKey,
    sums: Sums = noise.weighted_sum,
) -> Tensor:
    """See op.energies; for one tensor, float64 ()."""
    total = torch.zeros((), dtype=torch.float64, device=theta.device)
    for part in chunks(theta):
        values = theta[part].to(accumulator_dtype(theta.dtype))
        if coefficients is not None:
            values = torch.zeros_like(values)
            sums(values, values, None, coefficients, draws, 1.0, None, key.shifted(part.start))
        total += values.double().square_().sum()
    return total


def chunks(tensor: Tensor) -> Iterator[slice]:
    """Slices that cover a flat tensor."""
    for start in range(0, tensor.numel(), noise.CHUNK):
        yield slice(start, min(start + noise.CHUNK, tensor.numel()))


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    """The part of an operand for a chunk; a single limit applies to all chunks."""
    return tensor if tensor is None or tensor.numel() == 1 else tensor[part]
