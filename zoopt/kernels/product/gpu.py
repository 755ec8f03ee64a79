"""theta plus a low-rank product on the GPU: by BLAS if it rounds as required; by Triton, in one
read and one write of theta, if terms of the gradient or random bits are added with the product."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import torch
import triton
from torch import Tensor

from zoopt.kernels.noise.gpu import _int32, backend_name
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.gpu_batch import add_products
from zoopt.kernels.product.gpu_kernels import product_kernel
from zoopt.kernels.product.reference import blas_rounds

__all__ = ["add_product", "add_products", "squares"]

#: Rows and columns of a program's tile with a product, and the columns of a factor at a time.
TILE, K = (64, 64), 16
#: The same if theta has 16 bits and only a product is added.
NARROW_TILE, NARROW_K = (128, 64), 32
#: Elements of a program's tile without one.
PLAIN = 2048
NUM_WARPS = {"cuda": 8, "hip": 8, "interpreter": 1}


def add_product(
    theta: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    alpha: float,
    decay: float,
    gradient: Tensor | None,
    channel_scale: Tensor | None,
    sign_of: tuple[Tensor, Tensor] | None,
    sign_step: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference_product.add_product."""
    if not theta.numel():
        return
    m, n = theta.shape
    backend = backend_name()
    alone = channel_scale is None and sign_of is None
    # Rounding factors to theta's 16 bits changes 2^-8 or less of a step, not of theta. The
    # interpreter computes with numpy, which has no bfloat16.
    narrow = theta.dtype in (torch.bfloat16, torch.float16) and backend != "interpreter"
    if narrow and left is not None and right is not None:
        left, right = left.to(theta.dtype), right.to(theta.dtype)
    if alone and left is not None and right is not None and blas_rounds(theta, rounding_draw):
        theta.addmm_(left.to(theta.dtype), right.to(theta.dtype).t(), alpha=alpha, beta=decay)
        return
    (rows, columns), k = (NARROW_TILE, NARROW_K) if narrow and alone else (TILE, K)
    if left is None and sign_of is None:
        columns = min(PLAIN, triton.next_power_of_2(max(n, 8)))
        rows = PLAIN // columns
    if alone:
        gradient = None
    strides = (0, 0) if gradient is None else gradient.stride()
    sign_left, sign_right = (None, None) if sign_of is None else sign_of
    factors = [
        None if factor is None else factor.detach().contiguous()
        for factor in (left, right, channel_scale, sign_left, sign_right)
    ]
    with torch.cuda.device_of(theta):
        product_kernel[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
            theta,
            *factors[:2],
            gradient,
            *factors[2:],
            alpha,
            decay,
            sign_step,
            m,
            n,
            *strides,
            key.offset,
            _int32(key.stream),
            _int32(rounding_draw or 0),
            _int32(key.seed & 0xFFFFFFFF),
            _int32(key.seed >> 32),
            BY_ROW=channel_scale is not None and channel_scale.shape[0] > 1,
            BY_COLUMN=channel_scale is not None and channel_scale.shape[1] > 1,
            RANK=0 if left is None else left.shape[1],
            SIGN_RANK=0 if sign_left is None else sign_left.shape[1],
            STOCHASTIC=rounding_draw is not None,
            ALIGNED=key.offset % 8 == 0 and n % 8 == 0,
            NARROW=narrow,
            BACKEND=backend,
            ROWS=rows,
            COLUMNS=columns,
            K=k,
            num_warps=NUM_WARPS[backend],
            enable_fp_fusion=False,
        )


def squares(gradient: Tensor, axis: int, wide: torch.dtype) -> Tensor:
    """See reference.squares: a norm is one launch, and widens what it reads."""
    norm: Tensor = torch.linalg.vector_norm(gradient, 2, axis, dtype=wide)
    return norm.square_()
