"""Operations on some entries of each tensor: Adam on them, sums of their gradients, SM3's bounds.

Each takes a batch and one of every other operand for each tensor. On a GPU a batch is one launch
(two for SM3's bounds), elsewhere a loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.adam.reference import Numbers
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.entries.operands import Cover, Entries, Rates, Sums
from zoopt.kernels.journal import kept, once, pieces
from zoopt.kernels.noise.key import check_unsigned
from zoopt.kernels.operands import apart, check_apart, check_tensor, dense


def adam_entries_(
    theta: Batch,
    gradient: Sequence[Tensor],
    entries: Sequence[Entries],
    *,
    betas: tuple[float, float],
    eps: float,
    rate: float,
    decay: float = 0.0,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Batch:
    """Adam on some entries, each with an age a, and so a correction, of its own:

        a <- min(a + 1, OLDEST),    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g g
        N = mhat / (sqrt(vhat) + eps),   mhat = m / (1 - b1^a),   vhat = v / (1 - b2^a)
        theta <- round(theta + decay (base - theta) + rate N)

    Where there is no base, it is 0, and theta <- theta + (rate N - decay theta).

    Args:
        theta: a batch.
        gradient: of theta's size, one for each tensor, of one dtype; read at the entries.
        entries: one for each tensor; either all have positions and a base, or none has.
        betas, eps: Adam's.
        rate, decay: numbers, as in the formulas.
        rounding_draw: 32 bits; the draw whose bits, of the entries' positions, round theta
            stochastically. Default: to nearest.
        impl: as for `perturb`.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: operands that do not match. On the CPU also a position outside of
            its tensor; on a GPU such an entry stays as it is.
    """
    theta.check()
    wide = accumulator_dtype(theta.dtype)
    sizes = [own.numel() for own in theta.tensors]
    _check_one_each(theta, gradient=gradient, entries=entries)
    for own, size in zip(entries, sizes, strict=True):
        count = own.exp_avg.numel()
        if (own.positions is None) is not (own.base is None) or (
            own.positions is None and count != size
        ):
            raise ValueError("entries must have both positions and base, or be all of a tensor")
        _check(own.positions, "positions", torch.int32, count, theta)
        _check(own.base, "base", theta.dtype, count, theta)
        _check(own.exp_avg, "exp_avg", wide, count, theta)
        _check(own.exp_avg_sq, "exp_avg_sq", wide, count, theta)
        _check(own.age, "age", torch.int16, count, theta)
        check_positions("positions", own.positions, size)
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        rounding_draw = None if theta.dtype == wide else rounding_draw
    gradients = _read(gradient, sizes, wide)
    beta1, beta2 = betas
    numbers = [beta1, beta2, 1.0 - beta1, 1.0 - beta2, rate, eps, decay]
    *adam, rounded_decay = scalars(numbers, wide)
    rates = Rates(Numbers(*adam), rounded_decay)
    backend = dispatch.choose(theta.tensors[0], impl, "entries")
    with theta.contiguous() as batch:
        written = [tensor for own in entries for tensor in own[2:]]
        check_apart(theta=batch.tensors, state=written)
        read = [kept(apart, g, x, same=True) for g, x in zip(gradients, batch.tensors, strict=True)]
        if dispatch.takes_batches(backend):
            once(backend.adam_entries, batch, read, entries, betas, rates, rounding_draw)
            return theta
        operands = zip(batch.tensors, read, entries, batch.keys, strict=True)
        for x, g, own, key in pieces(operands):
            if own.exp_avg.numel():
                flat = x.detach().view(-1), g.view(-1)
                backend.adam_entries(*flat, own, betas, rates, key, rounding_draw)
    return theta


def sum_entries_(gradient: Batch, sums: Sequence[Sums], *, impl: str | None = None) -> None:
    """total <- round(total + g),    squares <- round(squares + g g),    to nearest.

    Args:
        gradient: a batch; read at the entries.
        sums: one for each tensor, of one dtype.
        impl: as for `perturb`.

    Raises:
        TypeError, ValueError: as for `adam_entries_`.
    """
    gradient.check("gradient")
    _check_one_each(gradient, sums=sums)
    for own, g in zip(sums, gradient.tensors, strict=True):
        count = own.total.numel()
        if own.positions is None and count != g.numel():
            raise ValueError("sums must have positions, or be of all of a gradient")
        _check(own.positions, "positions", torch.int32, count, gradient)
        _check(own.total, "total", sums[0].total.dtype, count, gradient)
        _check(own.squares, "squares", sums[0].total.dtype, count, gradient)
        check_positions("positions", own.positions, g.numel())
    check_apart(sums=[tensor for own in sums for tensor in own[1:]])
    batch = gradient.row_major()
    wide = sums[0].total if sums[0].total.dtype == torch.float64 else batch.tensors[0]
    backend = dispatch.choose(wide, impl, "entries")
    if dispatch.takes_batches(backend):
        once(backend.sum_entries, batch, sums)
        return
    for g, own in pieces(zip(batch.tensors, sums, strict=True)):
        if own.total.numel():
            backend.sum_entries(g.detach().view(-1), own)


def cover_entries_(
    gradient: Batch, covers: Sequence[Cover], *, picked: bool = False, impl: str | None = None
) -> None:
    """SM3-II's accumulators, from the gradients of some entries (i, j):

        nu_ij = min(r_i, c_j) + g_ij^2
        r_i <- max(r_i, max_j nu_ij),    c_j <- max(c_j, max_i nu_ij)

    Args:
        gradient: a batch.
        covers: one for each tensor.
        picked: whether gradients are of the entries themselves, (k,), and not of the matrix.
        impl: as for `perturb`.

    Raises:
        TypeError, ValueError: as for `adam_entries_`.
    """
    gradient.check("gradient")
    wide = accumulator_dtype(covers[0].rows.dtype)
    _check_one_each(gradient, covers=covers)
    for cover, g in zip(covers, gradient.tensors, strict=True):
        size = cover.rows.numel() * cover.columns.numel()
        if g.numel() != (cover.positions.numel() if picked else size):
            raise ValueError(f"gradient must be of the entries or the matrix, got {tuple(g.shape)}")
        _check(cover.positions, "positions", torch.int32, cover.positions.numel(), gradient)
        _check(cover.rows, "rows", wide, cover.rows.numel(), gradient)
        _check(cover.columns, "columns", wide, cover.columns.numel(), gradient)
        check_positions("positions", cover.positions, size)
    batch = gradient.row_major()
    probe = covers[0].rows if wide == torch.float64 else batch.tensors[0]
    backend = dispatch.choose(probe, impl, "entries")
    if dispatch.takes_batches(backend):
        once(backend.cover_entries, batch, covers, picked)
        return
    for g, cover in pieces(zip(batch.tensors, covers, strict=True)):
        backend.cover_entries(g.detach().view(-1), cover, picked)


def check_positions(name: str, index: Tensor | None, size: int) -> None:
    """Raise if a position lies outside of a tensor of so many elements. A GPU is not asked."""
    if index is None or not index.numel() or not index.is_cpu or is_fake(index):
        return
    if dispatch.launches(index):
        return
    least, most = torch.aminmax(index)
    if int(least) < 0 or int(most) >= size:
        raise ValueError(
            f"{name} must be from 0 to {size - 1}, got {int(least)} to {int(most)}; "
            f"load the state that belongs to the parameter"
        )


def _check_one_each(batch: Batch, **several: Sequence[object]) -> None:
    for name, own in several.items():
        if len(own) != len(batch):
            raise ValueError(
                f"{name} must be one for each of the batch's {len(batch)} tensors, got {len(own)}"
            )


def _check(tensor: Tensor | None, name: str, dtype: torch.dtype, count: int, beside: Batch) -> None:
    """Raise unless a tensor has one dimension, this dtype and so many elements on the device."""
    if tensor is None:
        return
    if tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        check_tensor(name, tensor)
    if tensor.dtype != dtype or tensor.numel() != count or tensor.device != beside.device:
        raise ValueError(
            f"{name} must be {dtype} of {count} elements on {beside.device}, got {tensor.dtype}, "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; pass {name}.contiguous()")


def _read(gradient: Sequence[Tensor], sizes: Sequence[int], wide: torch.dtype) -> list[Tensor]:
    """Gradients in row-major memory, of a dtype that kernels take."""
    for own, size in zip(gradient, sizes, strict=True):
        check_tensor("gradient", own)
        if own.numel() != size or own.dtype != gradient[0].dtype:
            raise ValueError(
                f"gradient must have theta's {size} elements and one dtype in a batch, got "
                f"{tuple(own.shape)}, {own.dtype}"
            )
    narrow = gradient[0].dtype == torch.float64 != wide
    return [dense(own.to(wide) if narrow else own) for own in gradient]
