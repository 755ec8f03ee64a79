"""The projector seam: subspaces of a gradient, and the way down to one.

Every basis has orthonormal columns but the random one, whose expectation P P^T is the identity.
The functions take a gradient and the side as `Geometry` has it, and work in float32 (float64 for
float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.projected.geometry import Geometry
from zoopt.kernels import perturb
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import (
    known,
    mm_into_float32,
    multiplies_into_float32,
    native_bfloat16,
)
from zoopt.kernels.journal import kept
from zoopt.kernels.noise.key import NoiseKey
from zoopt.linalg import sign_fixed_qr
from zoopt.noise import normal

Projector = Literal["svd", "gram", "randomized", "warm", "random", "orthogonal"]
#: Projectors whose bases do not depend on the gradient.
BLIND = ("random", "orthogonal", "columns")
#: Elements of a gradient that are widened to float32 at a time.
CHUNK = 1 << 20


def times(
    gradient: Tensor, factor: Tensor, *, transposed: bool = False, out: Tensor | None = None
) -> Tensor:
    """G F, or G^T F, with G (m, n) in any dtype and F (n, k) or (m, k) in the gradient's or its
    accumulator's, in which the product is.

    Args:
        out: where it goes; default, a new tensor.
    """
    turned, wide = gradient.t() if transposed else gradient, accumulator_dtype(gradient.dtype)
    if gradient.dtype == wide:
        return torch.mm(turned, factor.to(wide), out=out)
    # To round the factor is to round the product to the precision of the gradient's own entries.
    if multiplies_into_float32(gradient):
        product = mm_into_float32(turned, factor.to(gradient.dtype), out)
        if product is not None:
            return product
    if native_bfloat16(gradient):
        # Sums are float32 inside.
        product = torch.mm(turned, factor.to(gradient.dtype))
        return product.to(wide) if out is None else out.copy_(product)
    (m, n), factor = gradient.shape, factor.to(wide)
    if out is None:
        out = factor.new_empty(n if transposed else m, factor.shape[1])
    if transposed:
        out.zero_()
    rows = max(1, CHUNK // max(n, 1))
    for start in range(0, m, rows):
        part = gradient[start : start + rows].to(wide)
        if transposed:
            out.addmm_(part.t(), factor[start : start + rows])
        else:
            torch.mm(part, factor, out=out[start : start + rows])
    return out


def factor_dtype(gradient: Tensor, geo: Geometry) -> torch.dtype:
    """What a basis is rounded to on the way down."""
    one_sided = native_bfloat16(gradient) and geo.side != "both"
    if one_sided or multiplies_into_float32(gradient):
        return gradient.dtype
    return accumulator_dtype(gradient.dtype)


def down(
    gradients: Sequence[Tensor], bases: Sequence[Mapping[str, Tensor]], geo: Geometry
) -> Tensor:
    """R of each G (m, n): (k, channels, r), in the accumulator's dtype.

    Where bfloat16 is multiplied as it is, R comes in bfloat16, whose precision it has anyway.
    """
    if len(gradients) == 1:
        return _down(gradients[0], bases[0], geo).unsqueeze(0)
    first = gradients[0]
    narrow = native_bfloat16(first) and geo.side != "both"
    dtype = first.dtype if narrow else accumulator_dtype(first.dtype)
    out = first.new_empty((len(gradients), *geo.reduced_shape), dtype=dtype)
    for gradient, own, reduced in zip(gradients, bases, out, strict=True):
        _down(gradient, own, geo, reduced)
    return out


def _down(
    gradient: Tensor, bases: Mapping[str, Tensor], geo: Geometry, out: Tensor | None = None
) -> Tensor:
    left = geo.side == "left"
    if native_bfloat16(gradient) and geo.side != "both":
        turned = gradient.t() if left else gradient
        return torch.mm(turned, bases["basis"].to(gradient.dtype), out=out)
    if geo.side != "both":
        return times(gradient, bases["basis"], transposed=left, out=out)
    half = times(gradient, bases["basis"])
    return torch.mm(bases["basis_left"].to(half.dtype).t(), half, out=out)


def silence_rounding_(
    reduced: Tensor,
    geo: Geometry,
    *,
    roundings: float = 2.0,
    greatest: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Set to 0, in place, what of R is nothing but rounding: directions without energy.

    A basis with more columns than the gradient has rank has directions in which the gradient is 0.
    R = G Q has rounding there, some eps ||G|| of either sign, and a rule that divides by its size
    (Adam by sqrt(v)) makes a step of it as long as any. So columns of R, and where both sides are
    projected single entries, count as 0 below

        roundings eps sqrt(max(m, n)) max |R|.

    The rounding of G's products with computed singular vectors stays below a quarter of that (of
    known rank, to (4096, 1024), by all projectors). What is silenced has less than a thousandth of
    the size of the least directions of a gradient whose singular values span three decades.

    Args:
        reduced: (..., channels, r), each matrix for itself.
        roundings: default 2.
        greatest: makes the greatest of each number over all parts of a gradient that is sharded.
    """
    magnitude = kept(_magnitude, reduced, geo)
    if greatest is not None:
        greatest(magnitude)
    floor = (
        roundings * torch.finfo(accumulator_dtype(reduced.dtype)).eps * math.sqrt(max(geo.m, geo.n))
    )
    # NaN and infinity are below nothing, and stay.
    silent = magnitude < magnitude.amax((-2, -1), keepdim=True) * floor
    return reduced.masked_fill_(silent, 0.0)


def _magnitude(reduced: Tensor, geo: Geometry) -> Tensor:
    """The size of each column, (..., 1, r), or between two bases of each entry."""
    if geo.side == "both":
        return reduced.abs()
    if not reduced.numel():
        return reduced.new_zeros((*reduced.shape[:-2], 1, geo.rank))
    largest: Tensor = torch.linalg.vector_norm(reduced, math.inf, dim=-2, keepdim=True)
    return largest


def factors(reduced: Tensor, bases: dict[str, Tensor], geo: Geometry) -> tuple[Tensor, Tensor]:
    """The way up: left (m, r) and right (n, r) of which left right^T is R's part of the matrix."""
    if geo.side == "left":
        return bases["basis"], reduced
    if geo.side == "both":
        return bases["basis_left"].to(reduced.dtype) @ reduced, bases["basis"]
    return reduced, bases["basis"]


def subspace(
    gradient: Tensor,
    rank: int,
    *,
    right: bool,
    projector: Projector,
    previous: Tensor | None,
    seed: int,
    stream: int,
    draw: int,
    power: int = 2,
    oversample: int = 10,
) -> Tensor:
    """A basis (n, r) (right) or (m, r) of the gradient's leading singular directions.

    Args:
        gradient: (m, n), finite.
        projector: `"svd"` and `"gram"` are exact; `"randomized"` (Halko et al., 2011) draws a
            sketch from the noise; `"warm"` takes one step of orthogonal iteration from `previous`,
            and is `"randomized"` without one; `"random"` and `"orthogonal"` ignore the gradient:
            N(0, 1/r), and the same made orthonormal.
        previous: the last basis, or None.
        seed, stream, draw: name the sketch's noise.
        power, oversample: power iterations and extra columns of a randomised basis.
    """
    m, n = gradient.shape
    dim = n if right else m
    dtype = accumulator_dtype(gradient.dtype)
    if projector == "random":
        own = [NoiseKey(seed, stream)]
        return random_bases(own, dim, rank, draw, gradient.device, dtype)[0]
    if projector == "orthogonal":
        z = normal(dim * rank, seed=seed, stream=stream, draw=draw, device=gradient.device)
        return orthonormal(z.view(dim, rank).to(dtype))
    if projector == "svd":
        try:
            u, _, vh = torch.linalg.svd(gradient.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # It has not converged, which may happen on finite matrices.
            return _gram(gradient.to(dtype), rank, right)
        top: Tensor = vh[:rank].t() if right else u[:, :rank]
        return top.contiguous()
    if projector == "gram":
        return _gram(gradient.to(dtype), rank, right)
    if projector == "warm" and previous is not None:
        return orthonormal(_there_and_back(gradient, previous, right))
    width = min(rank + oversample, m, n)
    z = normal(dim * width, seed=seed, stream=stream, draw=draw, device=gradient.device)
    sketch = orthonormal(_there_and_back(gradient, z.view(dim, width).to(dtype), right))
    for _ in range(power):
        sketch = orthonormal(_there_and_back(gradient, sketch, right))
    # The leading directions inside the sketch: of the small side's Gram matrix.
    inner = times(gradient, sketch, transposed=not right)  # (channels, width)
    inner = inner * unit(inner)
    top, told_apart = _leading(inner.t() @ inner, rank)
    return _pure(torch.mm(sketch, top), told_apart, gradient, right)


def random_bases(
    keys: Sequence[NoiseKey],
    dim: int,
    rank: int,
    draw: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Entries N(0, 1/r) of the keys' noise: (k, dim, rank), in the dtype."""
    z = torch.zeros(len(keys), dim * rank, device=device)
    # No value of z is a zero, so 0 + 1 z has z's bits.
    batch = Batch(z.unbind(), keys)
    perturb(batch, 1.0, draw=draw, out=batch.tensors)
    return z.view(-1, dim, rank).to(dtype).mul_(1.0 / math.sqrt(rank))


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns (d, k), k <= d: two shifted Cholesky QRs, or Householder;
    or of each matrix of a stack, (e, d, k).

    R's diagonal is positive, so that a basis moves with its columns and does not change sign.
    """
    # Columns of one size: the Gram matrix squares their condition number.
    sizes = columns.norm(dim=-2, keepdim=True)
    q: Tensor = columns / sizes.clamp_min(torch.finfo(columns.dtype).tiny)
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    for _ in range(2):
        gram = q.mT @ q
        shift = 11.0 * (q.shape[-2] + 1) * torch.finfo(q.dtype).eps
        factor, failed = torch.linalg.cholesky_ex(gram.add_(eye, alpha=shift))
        if known(failed.amax() > 0, False):
            break
        solved: Tensor = torch.linalg.solve_triangular(factor, q.mT, upper=False)
        q = solved.mT
    error = (q.mT @ q - eye).abs().amax()
    if known(error <= 1e3 * torch.finfo(q.dtype).eps, True):
        return q.contiguous()
    if columns.dim() > 2:
        return torch.stack([orthonormal(own) for own in columns])
    return sign_fixed_qr(columns)


def _there_and_back(gradient: Tensor, basis: Tensor, right: bool) -> Tensor:
    """G^T (G Q) for right, G (G^T P) for left, times a number."""
    image = times(gradient, basis, transposed=not right)
    return times(gradient, balanced(image), transposed=right)


def unit(tensor: Tensor, among: Callable[[Tensor], None] | None = None) -> Tensor:
    """The power of two, (), that brings the tensor's greatest magnitude to between 1/2 and 1; of a
    stack of matrices each one's, (e, 1, 1).

    To multiply by it rounds nothing; squares of what it brings there neither overflow nor vanish.
    `among` makes the greatest number over all parts of a tensor that is sharded.
    """
    if tensor.numel():
        axes, stack = ((-2, -1), True) if tensor.dim() > 2 else (None, False)
        greatest = kept(torch.linalg.vector_norm, tensor, math.inf, axes, stack)
    else:
        greatest = kept(tensor.new_zeros, ())
    if among is not None:
        among(greatest)
    # 2^120 has a float32 of its own, and so has its inverse.
    return torch.ldexp(torch.ones_like(greatest), -torch.frexp(greatest).exponent.clamp(-120, 120))


def balanced(image: Tensor, among: Callable[[Tensor], None] | None = None) -> Tensor:
    """An image G F of numbers F of size 1, such that G^T times it has the size 1 too; `among` as
    for `unit`."""
    scale = unit(image, among)
    return image * scale * scale


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors (d, rank) of the largest eigenvalues of a Gram matrix (d, d), in order.

    And whether all of them can be told from ones of the eigenvalue 0, which rounding makes as large
    as 6 eps times the largest one.
    """
    values, vectors = torch.linalg.eigh(gram)
    told_apart = values[-rank] > 16.0 * torch.finfo(gram.dtype).eps * values[-1]
    return vectors.flip(1)[:, :rank], told_apart


def _pure(basis: Tensor, told_apart: Tensor, gradient: Tensor, right: bool) -> Tensor:
    """The basis; or, where a Gram matrix could not tell its last columns from directions without
    energy, that after one step of orthogonal iteration.

    Such columns are mixed with leading ones, by sqrt(eps) at worst. The step takes out of each
    column what lies along those before it.
    """
    if known(told_apart, True):
        return basis.contiguous()
    return orthonormal(_there_and_back(gradient, basis, right))


def _gram(gradient: Tensor, rank: int, right: bool) -> Tensor:
    """Exact, from the eigenvectors of the smaller Gram matrix."""
    m, n = gradient.shape
    small_is_right = m >= n
    gradient = gradient * unit(gradient)
    gram = gradient.t() @ gradient if small_is_right else gradient @ gradient.t()
    top, told_apart = _leading(gram, rank)
    if small_is_right != right:
        top = orthonormal(gradient @ top if small_is_right else gradient.t() @ top)
    return _pure(top, told_apart, gradient, right)
