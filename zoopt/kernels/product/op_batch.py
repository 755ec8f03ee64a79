"""Adds low-rank products to a batch of matrices in one pass; on a GPU, in one launch per rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoopt.dtypes import accumulator_dtype, scalars
from zoopt.kernels import dispatch
from zoopt.kernels.batch import Batch, name_of
from zoopt.kernels.noise.key import check_unsigned
from zoopt.kernels.operands import check_read


def add_products_(
    theta: Batch,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    *,
    decay: float = 1.0,
    rounding_draw: int | None = None,
    impl: str | None = None,
) -> Batch:
    """theta <- round(decay theta + sum_d left[d] right[d]^T) for each matrix, in place.

    Args:
        theta: a batch of contiguous matrices, (m, n) each.
        left, right: for each matrix (D, m, r) and (D, n, r), float32 (float64 for float64). Each
            left factor is contiguous; each right factor or its transpose is contiguous.
        decay: multiplies theta.
        rounding_draw: 32 bits; the draw of the bits for stochastic rounding. Default: round to
            nearest.
        impl: as for `add_product_`; implementations agree up to rounding, not bit for bit.

    Returns:
        theta.

    Raises:
        TypeError, ValueError: an argument is out of range, or tensors do not match.
    """
    theta.check()
    names = name_of(left), name_of(right)
    if None in names:
        _check_factors(theta, left, right)
    else:
        theta.made(("factors", *names), lambda: _check_factors(theta, left, right))
    wide = accumulator_dtype(theta.dtype)
    if rounding_draw is not None:
        check_unsigned("rounding_draw", rounding_draw, 32)
        rounding_draw = None if theta.dtype == wide else rounding_draw
    [decay] = scalars([decay], theta.dtype)
    backend = dispatch.choose(theta.tensors[0], impl, "product")
    if hasattr(backend, "add_products"):
        backend.add_products(theta, left, right, decay, rounding_draw)
        return theta
    for matrix, a, b, key in zip(theta.tensors, left, right, theta.keys, strict=True):
        if matrix.numel():
            both = (a.movedim(0, 1).flatten(1), b.movedim(0, 1).flatten(1))
            backend.add_product(
                matrix.detach(), *both, 1.0, decay, None, None, None, 0.0, key, rounding_draw
            )
    return theta


def _check_factors(theta: Batch, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Raise unless there are factors for each matrix that fit it."""
    wide = accumulator_dtype(theta.dtype)
    if not len(left) == len(right) == len(theta):
        raise ValueError(
            f"left and right must have one tensor for each of the batch's {len(theta)}, got "
            f"{len(left)} and {len(right)}"
        )
    for matrix, a, b in zip(theta.tensors, left, right, strict=True):
        for name, factor in (("left", a), ("right", b)):
            check_read(name, factor, matrix)
        count, r = a.shape[0], a.shape[-1]
        sizes = matrix.shape if matrix.dim() == 2 else (0, 0)
        if a.shape != (count, sizes[0], r) or b.shape != (count, sizes[1], r):
            raise ValueError(
                f"left and right must have shapes (D, m, r) and (D, n, r) for a matrix (m, n), got "
                f"{tuple(a.shape)} and {tuple(b.shape)} for {tuple(matrix.shape)}"
            )
        if a.dtype != wide or b.dtype != wide or not matrix.is_contiguous():
            raise TypeError(f"left and right must be of {wide}, and the matrices contiguous")
        if not a.is_contiguous() or not (b.is_contiguous() or b.mT.is_contiguous()):
            raise ValueError("left must be contiguous, and right or its transpose")
