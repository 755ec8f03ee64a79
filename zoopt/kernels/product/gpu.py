"""theta plus a low-rank product on the GPU. BLAS computes it if it rounds as required. Triton
computes it, with one read and one write of theta, if there are terms of the gradient or stochastic
rounding.

For a batch of matrices of one shape, the Triton kernel is launched once, BLAS once per matrix.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import pieces
from zoopt.kernels.noise.gpu import _TYPES, _addresses, _int32, backend_name
from zoopt.kernels.product.gpu_batch import add_products, scale
from zoopt.kernels.product.gpu_kernels import product_kernel
from zoopt.kernels.product.reference import blas_rounds

__all__ = ["add_product", "add_products", "scale", "squares"]

#: An operation takes a whole batch.
BATCHES = True
#: Rows and columns of a program's tile with a product, and how many columns of a factor it reads
#: at a time.
TILE, K = (64, 64), 16
#: The same if theta has 16 bits and only a product is added.
NARROW_TILE, NARROW_K = (128, 64), 32
#: Elements of a program's tile without a product.
PLAIN = 2048
NUM_WARPS = {"cuda": 8, "hip": 8, "interpreter": 1}

#: An operand of each matrix of a batch.
Several = Sequence[Tensor] | None


class Terms(NamedTuple):
    """The operands of the added terms; None for absent terms."""

    left: Several
    right: Several
    gradient: Several
    channel_scale: Several
    sign_left: Several
    sign_right: Several


def add_product(
    theta: Batch,
    left: Several,
    right: Several,
    alpha: float,
    decay: float,
    gradient: Several,
    channel_scale: Several,
    sign_of: Sequence[tuple[Tensor, Tensor]] | None,
    sign_step: float,
    rounding_draw: int | None,
) -> None:
    """See reference.add_product; for every matrix of a batch, all of one shape."""
    if not theta.numel:
        return
    alone = channel_scale is None and sign_of is None
    # Rounding factors to theta's 16 bits changes 2^-8 or less of a step, not of theta. The
    # interpreter computes with numpy, which has no bfloat16.
    narrow = theta.dtype in (torch.bfloat16, torch.float16) and backend_name() != "interpreter"
    if narrow and left is not None and right is not None:
        left, right = ([factor.to(theta.dtype) for factor in part] for part in (left, right))
    # In float32 the sum may be rounded between terms, and BLAS is several times as fast.
    by_blas = blas_rounds(theta.tensors[0], rounding_draw) and (
        alone or theta.dtype == torch.float32
    )
    if by_blas and left is not None and right is not None:
        for own, a, b in pieces(zip(theta.tensors, left, right, strict=True)):
            own.addmm_(a.to(theta.dtype), b.to(theta.dtype).t(), alpha=alpha, beta=decay)
        if alone:
            return
        left, right, decay = None, None, 1.0
    if gradient is not None and len(theta) > 1:
        gradient = _dense(gradient)
    terms = Terms(
        *(_dense(left), _dense(right)),
        None if alone else gradient,
        _dense(channel_scale),
        *(
            None if sign_of is None else [pair[i].contiguous() for pair in sign_of]
            for i in range(2)
        ),
    )
    numbers = {"alpha": alpha, "decay": decay, "sign_step": sign_step}
    _launch(theta, terms, numbers, rounding_draw, narrow)


def _dense(factors: Several) -> Several:
    return None if factors is None else [factor.contiguous() for factor in factors]


def _launch(
    theta: Batch,
    terms: Terms,
    numbers: dict[str, float],
    rounding_draw: int | None,
    narrow: bool,
) -> None:
    m, n = theta.tensors[0].shape
    backend, key, alone = backend_name(), theta.key, len(theta) == 1
    only_product = terms.gradient is None
    (rows, columns), k = (NARROW_TILE, NARROW_K) if narrow and only_product else (TILE, K)
    if terms.left is None and terms.sign_left is None:
        columns = min(PLAIN, triton.next_power_of_2(max(n, 8)))
        rows = PLAIN // columns
    memories = (theta.tensors, *terms)
    vectors, table = False, None
    if alone:
        arguments: list[Any] = [None if part is None else part[0] for part in memories]
    else:
        places = [None if part is None else theta.addresses_of(part) for part in memories]
        vectors = not any(at % 16 for part in places if part is not None for at in part)
        arguments = [None if part is None else _addresses(part, theta.device) for part in places]
        own = [word for each in theta.keys for word in (each.offset, _int32(each.stream))]
        table = _addresses(tuple(own), theta.device)
    scale = None if terms.channel_scale is None else terms.channel_scale[0]
    row, column = (0, 0) if terms.gradient is None else terms.gradient[0].stride()
    tiles = triton.cdiv(m, rows) * triton.cdiv(n, columns)
    with torch.cuda.device_of(theta.tensors[0]):
        product_kernel[(tiles * len(theta),)](
            *arguments,
            table,
            **numbers,
            m=m,
            n=n,
            gradient_row=row,
            gradient_column=column,
            first=key.offset if alone else 0,
            number=_int32(key.stream) if alone else 0,
            rounding_draw=_int32(rounding_draw or 0),
            k0=_int32(key.seed & 0xFFFFFFFF),
            k1=_int32(key.seed >> 32),
            DTYPE=_TYPES[theta.dtype],
            LEFT=_type(terms.left),
            RIGHT=_type(terms.right),
            GRADIENT=_type(terms.gradient),
            TABLE=not alone,
            VECTORS=vectors,
            BY_ROW=scale is not None and scale.shape[0] > 1,
            BY_COLUMN=scale is not None and scale.shape[1] > 1,
            RANK=0 if terms.left is None else terms.left[0].shape[1],
            SIGN_RANK=0 if terms.sign_left is None else terms.sign_left[0].shape[1],
            STOCHASTIC=rounding_draw is not None,
            ALIGNED=n % 8 == 0 and not any(own_key.offset % 8 for own_key in theta.keys),
            NARROW=narrow,
            BACKEND=backend,
            ROWS=rows,
            COLUMNS=columns,
            K=k,
            num_warps=NUM_WARPS[backend],
            enable_fp_fusion=False,
        )


def _type(tensors: Several) -> Any:
    return None if tensors is None else _TYPES[tensors[0].dtype]


def squares(gradients: Sequence[Tensor], axis: int, wide: torch.dtype) -> Tensor:
    """See reference.squares. A norm is one launch, which converts to the wide dtype as it reads."""
    m, n = gradients[0].shape
    out = torch.empty(len(gradients), (n, m)[axis], dtype=wide, device=gradients[0].device)
    for gradient, norm in zip(gradients, out, strict=True):
        torch.linalg.vector_norm(gradient, 2, axis, dtype=wide, out=norm)
    return out.square_()
