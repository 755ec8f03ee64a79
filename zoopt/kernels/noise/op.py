"""The operations that leave theta alone.

An operation checks its arguments, chooses an implementation and runs it. It takes a batch, or a
tensor and its key, which are a batch of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch, as_batch, packed_like
from zoopt.kernels.noise.key import NoiseKey, check_unsigned
from zoopt.kernels.operands import check_like, check_tensor, contiguous, flat


@overload
def perturb(
    theta: Tensor,
    alpha: float,
    *,
    draw: int,
    key: NoiseKey,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def perturb(
    theta: Batch,
    alpha: float,
    *,
    draw: int,
    row_scale: Sequence[Tensor] | None = None,
    out: Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> Sequence[Tensor]: ...


def perturb(
    theta: Tensor | Batch,
    alpha: float,
    *,
    draw: int,
    key: NoiseKey | None = None,
    row_scale: Tensor | Sequence[Tensor] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """theta + alpha z, rounded to nearest; z = z(seed, stream, draw, offset + index) of the key.

    With scales c for the rows (along the first axis) it is theta_i + (alpha c_i) z_i.

    Args:
        theta: a dense float32, bfloat16, float16 or float64 tensor of any shape, or a batch.
        alpha: the scale of the direction (rounded to float32, or float64 for float64).
        key: the noise of theta; a batch has its own. With a density below 1, elements that the
            direction does not move keep their bits.
        draw: the direction's number, 32 bits.
        row_scale: c, (m,) for theta (m, ...), contiguous, float32 (float64 for float64), on its
            device; one for each tensor of a batch.
        out: where the result goes: `theta` itself for in place (a batch: its `tensors`), or a
            tensor of its shape, dtype and device that shares no memory with it, one for each of a
            batch. Default: new contiguous tensors.
        impl: `"reference"`, `"numba"`, `"triton"`, or None for the fastest that can run.

    Returns:
        `out`. All implementations return the same bits (except the payloads of NaNs).

    Raises:
        TypeError: not a tensor, or of an unsupported dtype or layout, or a wrapper of one.
        ValueError: an argument out of range, an `out` that does not match (a batch of some
            elements is perturbed in place only), an `impl` that is not available.

    A tensor that is not contiguous is worked on through a contiguous copy.
    """
    batch = as_batch(theta, key)
    check_unsigned("draw", draw, 32)
    backend = dispatch.choose(batch.tensors[0], impl)
    scaled = None if row_scale is None else _row_scales(row_scale, theta, batch)

    def onto(batch: Batch, outs: Sequence[Tensor]) -> None:
        if scaled is None:
            terms = (scalars([alpha], batch.dtype), [draw], 1.0, None)
            run(backend, "weighted_sum", batch, (outs, None), *terms)
        else:
            numbers = (*scalars([alpha], batch.dtype), draw)
            run(backend, "scaled_rows", batch, (outs, scaled), *numbers)

    if out is None and batch.indices is None:
        made = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor in batch.tensors
        ]
        onto(batch.row_major(), made)
        return made if isinstance(theta, Batch) else made[0]
    outs: Sequence[Tensor] = ()
    if out is not None:
        outs = (out,) if isinstance(out, Tensor) else out
        if len(outs) != len(batch):
            raise ValueError(
                f"out must have a tensor for each of the batch's {len(batch)}, got {len(outs)}"
            )
    in_place = bool(outs) and all(
        target is own for own, target in zip(batch.tensors, outs, strict=True)
    )
    if batch.indices is not None and not in_place:
        raise ValueError("out must be the batch's own tensors where it has indices")
    for own, target in zip(batch.tensors, outs, strict=True):
        if target is not own:
            check_tensor("out", target)
            check_like("out", target, own, batch.dtype)
    if in_place:
        with batch.contiguous() as dense:
            onto(dense, dense.tensors)
    else:
        with contextlib.ExitStack() as stack:
            targets = [stack.enter_context(contiguous(target)) for target in outs]
            onto(batch.row_major(), targets)
    return outs if isinstance(theta, Batch) else outs[0]


def _row_scales(
    given: Tensor | Sequence[Tensor], theta: Tensor | Batch, batch: Batch
) -> Sequence[Tensor]:
    """The scales of each tensor's rows, checked."""
    scales: Any = given if isinstance(theta, Batch) else (given,)
    if len(scales) != len(batch) or batch.indices is not None:
        raise ValueError(
            f"row_scale must have a tensor for each of the batch's {len(batch)}, and the batch no "
            f"indices, got {len(scales)}"
        )
    wide = accumulator_dtype(batch.dtype)
    for own, tensor in zip(scales, batch.tensors, strict=True):
        check_tensor("row_scale", own)
        rows = tensor.shape[:1]
        if own.shape != rows or own.dtype != wide or own.device != tensor.device or not rows:
            raise ValueError(
                f"row_scale must have one {wide} number on {tensor.device} for each row of a "
                f"tensor of shape {tuple(tensor.shape)}, got {own.dtype}, {tuple(own.shape)} on "
                f"{own.device}"
            )
        if not own.is_contiguous():
            raise ValueError("row_scale must be contiguous; pass row_scale.contiguous()")
    return tuple(scales)


def perturbed_copies(
    theta: Batch, alphas: Sequence[float], *, draws: Sequence[int], decay: float = 1.0
) -> list[Tensor]:
    """decay theta + sum_d alphas[d] z(d) of a batch of contiguous tensors, rounded to nearest, as
    views of one buffer, which lives as long as one of them: made with as little Python as possible.
    """
    theta.check()
    copies = packed_like(theta)
    backend = dispatch.choose(theta.tensors[0], None)
    terms = (scalars(alphas, theta.dtype), list(draws), decay, None)
    run(backend, "weighted_sum", theta, (copies, None), *terms)
    return copies


def run(
    backend: ModuleType,
    operation: str,
    batch: Batch,
    beside: Sequence[Sequence[Tensor] | None],
    *numbers: Any,
) -> None:
    """An implementation's operation on a contiguous batch: at once, or tensor by tensor.

    Args:
        beside: other tensors that it works on, contiguous, one for each of the batch's; or None.
        numbers: what else it takes, the same for all.
    """
    function = getattr(backend, operation)
    if dispatch.takes_batches(backend):
        function(batch, *beside, *numbers)
        return
    together = getattr(backend, f"{operation}_batch", None)
    if together is not None and batch.indices is None:
        together(batch, *beside, *numbers)
        return
    for i, (tensor, key) in enumerate(zip(batch.tensors, batch.keys, strict=True)):
        if batch.indices is not None:
            _run_indexed(function, batch, i, beside, *numbers)
        elif tensor.numel():
            theta = flat(tensor, backend)
            others = [
                theta if own is batch.tensors else None if own is None else flat(own[i], backend)
                for own in beside
            ]
            function(theta, *others, *numbers, key)


def _run_indexed(
    function: Callable[..., None],
    batch: Batch,
    i: int,
    beside: Sequence[Sequence[Tensor] | None],
    *numbers: Any,
) -> None:
    """A function on the elements at tensor i's indices: a copy, which goes back."""
    assert batch.indices is not None
    indices, whole = batch.indices[i], batch.tensors[i].detach().view(-1)
    if not indices.numel():
        return
    theta = whole[indices]
    others = [
        theta if own is batch.tensors else None if own is None else own[i].detach().view(-1)
        for own in beside
    ]
    function(theta, *others, *numbers, batch.keys[i])
    whole[indices] = theta


def perturb_rows(
    weight: Tensor,
    rows: Tensor,
    alpha: float,
    *,
    key: NoiseKey,
    draw: int,
    impl: str | None = None,
) -> Tensor:
    """The rows of `perturb(weight, alpha, ...)` that an embedding gathers, and no others.

    Args:
        weight: a dense tensor, (V, d), as for `perturb`.
        rows: integers in [0, V), any shape.
        alpha, key, draw, impl: as for `perturb`.

    Returns:
        A new tensor, (*rows.shape, d), with the bits of `perturb(weight, ...)[rows]`.

    Raises:
        TypeError, ValueError: as for `perturb`, or a weight that is not a matrix.
        IndexError: a row outside [0, V).
    """
    check_tensor("weight", weight)
    check_unsigned("draw", draw, 32)
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rows must be int64 or int32, got {rows.dtype}")
    backend = dispatch.choose(weight, impl)
    out = weight.new_empty((*rows.shape, weight.shape[1]))
    if out.numel() and not dispatch.is_fake(rows):
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"rows must lie in [0, {weight.shape[0]}), got values from {low} to {high}"
            )
    if out.numel():
        [coefficient] = scalars([alpha], weight.dtype)
        backend.gather_rows(
            weight.detach().contiguous(),
            rows.reshape(-1).long().contiguous(),
            out.view(-1, weight.shape[1]),
            coefficient,
            key,
            draw,
        )
    return out
