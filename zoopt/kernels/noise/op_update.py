"""The operations that update theta in place, in one read and one write of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from zoopt.dtypes import Rounding, accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch, as_batch
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.noise.op import run
from zoopt.kernels.noise.writes import Script, Write
from zoopt.kernels.places import Kept

_ROUNDINGS = get_args(Rounding)
#: A tensor (then with a `key`), or a batch.
Batched = TypeVar("Batched", Tensor, Batch)


def apply_(
    theta: Batched,
    coefficients: Sequence[float],
    *,
    draws: Sequence[int],
    key: NoiseKey | None = None,
    decay: float = 1.0,
    rounding: Rounding = "nearest",
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Batched:
    """theta <- round(decay theta + sum_j coefficients[j] z(draws[j])), in place.

    One read and one write of theta however many directions are added; the sum runs in float32
    (float64 for float64) in the order of `draws` and is rounded once.

    Args:
        theta: a dense float32, bfloat16, float16 or float64 tensor of any shape, or a batch.
        coefficients: one number a direction (rounded to float32, or float64 for float64).
        draws: the directions' numbers, 32 bits each.
        decay: multiplies theta, for example 1 - lr weight_decay.
        rounding: `"nearest"`, or `"stochastic"`: up or down with the probability that makes the
            expectation exact, by random bits that belong to a draw. Without effect on float32 and
            float64, which are the accumulator's own type.
        rounding_draw: the draw whose bits round, 32 bits. Default: the last of `draws`.
        key, impl: as for `perturb`.

    Returns:
        theta. An element that no direction moves, with decay 1, keeps its bits.

    Raises:
        TypeError, ValueError: as for `perturb`; also coefficients and draws of unequal length,
            stochastic rounding without a draw, or a theta whose elements share memory.
    """
    batch: Batch = as_batch(theta, key)
    check_directions(draws, coefficients=coefficients)
    rounded_by = rounding_of(rounding, rounding_draw, draws, batch.dtype)
    backend = dispatch.choose(batch.tensors[0], impl)
    [decay] = scalars([decay], batch.dtype)
    terms = (scalars(coefficients, batch.dtype), list(draws), decay, rounded_by)
    with batch.contiguous() as dense:
        run(backend, "weighted_sum", dense, (dense.tensors, None), *terms)
    return theta


def add_(
    theta: Batched,
    update: Tensor | Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    draws: Sequence[int],
    key: NoiseKey | None = None,
    decay: float = 1.0,
    rounding: Rounding = "nearest",
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Batched:
    """theta <- round(decay theta + sum_j coefficients[j] z(draws[j]) + update), in place.

    Args:
        theta: a dense tensor or a batch, as for `apply_`.
        update: contiguous, of theta's shape and device; float32 (float64 for float64). It is
            read only, and shares no memory with theta. For a batch: one for each tensor.
        coefficients, draws: as for `apply_`; both may be empty.
        rounding_draw: the draw whose bits round. Default: the last of `draws`; stochastic rounding
            without `draws` needs it.
        key, decay, rounding, impl: as for `apply_`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `apply_`, or an update that does not match.
    """
    batch: Batch = as_batch(theta, key)
    updates = _beside("update", update, theta, batch)
    check_directions(draws, coefficients=coefficients)
    rounded_by = rounding_of(rounding, rounding_draw, draws, batch.dtype)
    backend = dispatch.choose(batch.tensors[0], impl)
    [decay] = scalars([decay], batch.dtype)
    terms = (scalars(coefficients, batch.dtype), list(draws), decay, rounded_by)
    with batch.contiguous() as dense:
        run(backend, "weighted_sum", dense, (dense.tensors, updates), *terms)
    return theta


def momentum_(
    theta: Batched,
    buffer: Tensor | Sequence[Tensor],
    coefficients: Sequence[float],
    gradients: Sequence[float],
    *,
    momentum: float,
    step_size: float,
    draws: Sequence[int],
    key: NoiseKey | None = None,
    decay: float = 1.0,
    rounding: Rounding = "nearest",
    impl: str | None = None,
) -> Batched:
    """One pass over theta and a momentum buffer, in place:

        buffer <- momentum buffer + sum_j gradients[j] z(draws[j])
        theta  <- round(decay theta + sum_j coefficients[j] z(draws[j]) + step_size buffer)

    Args:
        theta: a dense tensor or a batch, as for `apply_`.
        buffer: contiguous, of theta's shape and device; float32 (float64 for float64). It shares
            no memory with theta. For a batch: one for each tensor.
        coefficients: one number a direction: what theta itself receives (a restored perturbation).
        gradients: one number a direction: its projected gradient.
        momentum, step_size: numbers, as in the formula.
        key, draws, decay, rounding, impl: as for `apply_`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `apply_`, or a buffer that does not match.
    """
    batch: Batch = as_batch(theta, key)
    buffers = _beside("buffer", buffer, theta, batch)
    check_directions(draws, coefficients=coefficients, gradients=gradients)
    rounded_by = rounding_of(rounding, None, draws, batch.dtype)
    backend = dispatch.choose(batch.tensors[0], impl)
    terms = (
        scalars(coefficients, batch.dtype),
        scalars(gradients, batch.dtype),
        list(draws),
        *scalars([decay, momentum, step_size], batch.dtype),
        rounded_by,
    )
    with batch.contiguous() as dense:
        run(backend, "momentum_sum", dense, (buffers,), *terms)
    return theta


def adam_window_(
    theta: Batched,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    closes: Sequence[bool],
    *,
    eps: float,
    step_size: float,
    draws: Sequence[int],
    key: NoiseKey | None = None,
    decay: float = 1.0,
    rounding: Rounding = "nearest",
    impl: str | None = None,
) -> Batched:
    """Adam whose moments are remade from the directions of past steps: one pass, over theta only.

    ghat, m and v begin as 0, in registers or cache. Direction j, in order, adds

        ghat <- ghat + gradients[j] z(draws[j])

    and, where closes[j] says that it is the last one of its step,

        m <- m + first[j] ghat,    v <- v + second[j] (ghat ghat),    ghat <- 0.

    Then

        theta <- round(decay theta + sum_j coefficients[j] z(draws[j])
                       + (step_size m) / (sqrt(v) + eps)).

    Args:
        theta: a dense tensor or a batch, as for `apply_`.
        coefficients: one number a direction: what theta itself receives (a restored perturbation).
        gradients: one number a direction: its projected gradient, over the directions of its step.
        first, second: one number a direction, the weights of its step in m and in v, at least 0 in
            v; only those where closes[j] are used.
        closes: one bool a direction. What ghat holds after the last one that closes is dropped.
        eps: positive in the accumulator's dtype.
        step_size: a number, as in the formula: negative descends.
        key, draws, decay, rounding, impl: as for `apply_`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `apply_`, or a number out of range.
    """
    batch: Batch = as_batch(theta, key)
    check_directions(draws, coefficients=coefficients, gradients=gradients)
    check_directions(draws, first=first, second=second, closes=closes)
    if any(weight < 0 for weight, closed in zip(second, closes, strict=True) if closed):
        raise ValueError(f"second must be at least 0 where closes, got {list(second)}")
    numbers: list[float] = scalars([decay, step_size, eps], batch.dtype)
    if not numbers[-1] > 0:
        wide = accumulator_dtype(batch.dtype)
        raise ValueError(f"eps must be positive in {wide}, got {eps!r}; use 1e-8")
    rounded_by = rounding_of(rounding, None, draws, batch.dtype)
    backend = dispatch.choose(batch.tensors[0], impl)
    terms = (
        *(scalars(values, batch.dtype) for values in (coefficients, gradients, first, second)),
        [bool(closed) for closed in closes],
        list(draws),
        *numbers,
        rounded_by,
    )
    with batch.contiguous() as dense:
        run(backend, "adam_window", dense, (), *terms)
    return theta


def write_each_(
    theta: Batched,
    writes: Sequence[Write],
    *,
    buffer: Tensor | Sequence[Tensor] | None = None,
    key: NoiseKey | None = None,
    impl: str | None = None,
) -> Batched:
    """Each of the writes in turn, each rounded, in one read and one write of theta's memory.

    The bits are those of `apply_`, `adam_window_` and so on, one after the other. What is read and
    written between them stays in registers or in the cache, and a direction that several writes
    use is made once (on the CPU, if it is among the last 64; on a GPU, if it is the last one).

    Args:
        theta: a dense tensor or a batch, as for `apply_`.
        writes: see `Write`.
        buffer: that of `rule="momentum"`, as for `momentum_`; not with Triton.
        key, impl: as for `apply_`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: as for `apply_`, or a write whose numbers do not fit.
    """
    batch: Batch = as_batch(theta, key)
    for write in writes:
        write.check()
    backend = dispatch.choose(batch.tensors[0], impl)
    if not writes:
        return theta
    script = Script(writes, batch.dtype)
    if script.stateful != (buffer is not None):
        raise ValueError(
            f"buffer must be given where a write has rule 'momentum', and only there, got {buffer}"
        )
    if script.stateful and dispatch.takes_batches(backend):
        raise ValueError(
            f"writes of rule 'momentum' must be made by impl='numba' or 'reference', got "
            f"impl={impl!r} on {batch.device}; use momentum_"
        )
    buffers = None if buffer is None else _beside("buffer", buffer, theta, batch)
    with batch.contiguous() as dense:
        run(backend, "write_each", dense, (buffers,), script)
    return theta


def _beside(
    name: str, given: Tensor | Sequence[Tensor], theta: Tensor | Batch, batch: Batch
) -> Sequence[Tensor]:
    """What lies beside theta, element by element: a tensor for each of the batch's, checked."""
    others: Any = given if isinstance(theta, Batch) else (given,)
    batch.check_beside(name, others, accumulator_dtype(batch.dtype))
    return others if isinstance(others, Kept) else tuple(others)


def check_directions(draws: Sequence[int], **per_direction: Sequence[float]) -> None:
    """Raise unless each sequence has one entry a draw, and the draws 32 bits."""
    for name, values in per_direction.items():
        if len(values) != len(draws):
            raise ValueError(
                f"{name} and draws must have equal lengths, got {len(values)} and {len(draws)}"
            )
    for draw in draws:
        check_unsigned("draw", draw, 32)


def rounding_of(
    rounding: str, explicit: int | None, draws: Sequence[int], dtype: torch.dtype
) -> int | None:
    """The draw whose bits round, or None where rounding is to nearest or not needed."""
    if rounding not in _ROUNDINGS:
        known = ", ".join(map(repr, _ROUNDINGS))
        raise ValueError(f"rounding must be one of {known}, got {rounding!r}")
    if explicit is not None:
        check_unsigned("rounding_draw", explicit, 32)
    if rounding == "nearest":
        return None
    if explicit is None and not draws:
        raise ValueError(
            "rounding='stochastic' needs at least one draw or a rounding_draw, got none"
        )
    exact = dtype == accumulator_dtype(dtype)
    return None if exact else draws[-1] if explicit is None else explicit
