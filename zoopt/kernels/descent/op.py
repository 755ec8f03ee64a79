"""Updates that are more than a sum of directions, each in one pass over a batch of tensors.

They are for GPUs, where every operation is a launch. On a CPU the optimizers' own loops do these
updates chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from zoopt.dtypes import Rounding, accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch
from zoopt.kernels.descent.rule import Rule, RuleKind, Shape, ShapeKind
from zoopt.kernels.noise.op import run
from zoopt.kernels.noise.op_update import check_directions, rounding_of
from zoopt.kernels.places import Kept

_FAMILY = "descent"


def descend_(
    theta: Batch,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    *,
    draws: Sequence[int],
    shape: Shape,
    rule: Rule,
    first: Sequence[Tensor] | None = None,
    second: Sequence[Tensor] | None = None,
    beside: Sequence[Tensor] | None = None,
    decay: float = 1.0,
    rounding: Rounding = "nearest",
    rounding_draw: int | None = None,
    out: Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> Batch:
    """out <- round(decay theta + D(sum_j coefficients[j] z_j) + U(D(sum_j gradients[j] z_j))),

    with D the shape of a displacement (see `Shape`) and U the rule of the update, which changes
    the state `first` and `second` (see `Rule`).

    Args:
        theta: the batch. Its keys have density 1 unless the shape is plain.
        coefficients, gradients: one number for each direction.
        draws: the directions' numbers, 32 bits each.
        first, second: the rule's state. One for each tensor, of its shape, in the accumulator's
            dtype.
        beside: the shape's operand, one for each tensor. It has the tensor's shape and the
            accumulator's dtype; for `"kept"` it is bool, for `"small"` it is one number.
        decay, rounding, rounding_draw, impl: as for `apply_`.
        out: where the result goes, one contiguous tensor for each; default theta itself.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `apply_`, or state is missing or does not match.
    """
    theta.check()
    check_directions(draws, coefficients=coefficients, gradients=gradients)
    rounded_by = rounding_of(rounding, rounding_draw, draws, theta.dtype)
    if shape.kind not in get_args(ShapeKind) or rule.kind not in get_args(RuleKind):
        raise ValueError(f"shape and rule must be known ones, got {shape} and {rule}")
    wide = accumulator_dtype(theta.dtype)
    for name, state, needed in (
        ("first", first, rule.states > 0),
        ("second", second, rule.states > 1),
        ("beside", beside, shape.kind != "plain"),
    ):
        if (state is not None) != needed:
            raise ValueError(f"{name} must be {'given' if needed else 'None'} with {rule}, {shape}")
        if isinstance(state, Kept):
            state.made()
        if state is not None and not (name == "beside" and shape.kind == "small"):
            kept = name == "beside" and shape.kind == "kept"
            theta.check_beside(name, state, torch.bool if kept else wide)
    if shape.kind != "plain" and theta.key.threshold is not None:
        raise ValueError(f"density must be 1 with {shape}, got {theta.key.density}")
    if out is not None and theta.indices is not None:
        raise ValueError("out must be None with indices")
    if out is not None:
        theta.check_beside("out", out, theta.dtype)
    backend = dispatch.choose(theta.tensors[0], impl, _FAMILY)
    numbers = tuple(scalars(rule.numbers, theta.dtype))
    radial, estimate = scalars([shape.radial, shape.estimate], theta.dtype)
    terms = (
        scalars(coefficients, theta.dtype),
        scalars(gradients, theta.dtype),
        list(draws),
        Shape(shape.kind, radial, estimate),
        Rule(rule.kind, numbers),
        *scalars([decay], theta.dtype),
        rounded_by,
    )
    if out is not None:
        run(backend, "descend", theta.row_major(), (out, first, second, beside), *terms)
        return theta
    with theta.contiguous() as dense:
        run(backend, "descend", dense, (dense.tensors, first, second, beside), *terms)
    return theta


def curve_(
    state: Batch,
    coefficients: Sequence[float],
    *,
    draws: Sequence[int],
    base: float,
    impl: str | None = None,
) -> Batch:
    """state <- state (base + sum_j coefficients[j] z_j^2), in place: float32 or float64."""
    _check_state(state, draws, coefficients)
    backend = dispatch.choose(state.tensors[0], impl, _FAMILY)
    [base] = scalars([base], state.dtype)
    terms = (scalars(coefficients, state.dtype), list(draws), base)
    with state.contiguous() as dense:
        run(backend, "curve", dense, (), *terms)
    return state


def turn_(
    state: Batch,
    coefficients: Sequence[float],
    *,
    draws: Sequence[int],
    radial: float,
    keep: float,
    grow: float,
    impl: str | None = None,
) -> Batch:
    """state <- keep state + grow (sum_j coefficients[j] z_j + radial state), in place: float32 or
    float64."""
    _check_state(state, draws, coefficients)
    backend = dispatch.choose(state.tensors[0], impl, _FAMILY)
    terms = (
        scalars(coefficients, state.dtype),
        list(draws),
        *scalars([radial, keep, grow], state.dtype),
    )
    with state.contiguous() as dense:
        run(backend, "turn", dense, (), *terms)
    return state


def small_elements(
    theta: Batch, limits: Sequence[Tensor], out: Sequence[Tensor], *, impl: str | None = None
) -> None:
    """out <- |theta| <= limit, compared in theta's dtype.

    Args:
        theta: the batch.
        limits: one float32 number for each tensor.
        out: one contiguous bool tensor for each, of its shape.
    """
    theta.check()
    theta.check_beside("out", out, torch.bool)
    if isinstance(limits, Kept):
        limits.made()
    backend = dispatch.choose(theta.tensors[0], impl, _FAMILY)
    run(backend, "small", theta.row_major(), (limits, out))


def energies(
    theta: Batch,
    coefficients: Sequence[float] | None = None,
    *,
    draws: Sequence[int] = (),
    impl: str | None = None,
) -> Tensor:
    """The sum of squares of each tensor, or with coefficients, of sum_j coefficients[j] z_j.

    One float64 number for each tensor. Each implementation sums in its own order."""
    theta.check()
    if coefficients is not None:
        check_directions(draws, coefficients=coefficients)
        coefficients = scalars(coefficients, theta.dtype)
    backend = dispatch.choose(theta.tensors[0], impl, _FAMILY)
    dense = theta.row_major()
    if dispatch.takes_batches(backend):
        found: Tensor = backend.energies(dense, coefficients, list(draws))
        return found
    parts = [
        backend.energy(tensor.detach().view(-1), coefficients, list(draws), key)
        for tensor, key in zip(dense.tensors, dense.keys, strict=True)
    ]
    return torch.stack(parts)


def _check_state(state: Batch, draws: Sequence[int], coefficients: Sequence[float]) -> None:
    state.check("state")
    check_directions(draws, coefficients=coefficients)
    if state.dtype != accumulator_dtype(state.dtype):
        raise TypeError(f"state must be of float32 or float64, got {state.dtype}")
