"""SM3 on the GPU: Triton, one read of the gradient, one read and one write of theta."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import torch
import triton
from torch import Tensor

from zoopt.kernels.dispatch import interpreting
from zoopt.kernels.noise.gpu import _int32
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.sm3.gpu_kernels import sm3_kernel

#: Columns and rows a program. It is one warp, so that a row's maximum needs no barrier, and each
#: thread's eight columns are loaded and rounded together.
BLOCK, ROWS, NUM_WARPS = 256, 32, 1


def sm3(
    theta: Tensor,
    gradient: Tensor,
    rows: Tensor | None,
    row: Tensor,
    column: Tensor,
    new_row: Tensor,
    new_column: Tensor,
    buffer: Tensor | None,
    keep: float,
    gain: float,
    eps: float,
    decay: float,
    momentum: float,
    complement: float,
    step_size: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference_sm3.sm3."""
    m, n = gradient.shape
    # Only random bits care where a row begins in its Philox block of 8 elements.
    aligned = rounding_draw is None or (n % 8 == 0 and key.offset % 8 == 0)
    stride = 1 if aligned or rows is not None else 8
    count = ROWS if aligned or rows is None else 1
    groups = triton.cdiv(m, stride * count) * stride
    blocks = triton.cdiv(n + (0 if aligned else 7), BLOCK)
    with torch.cuda.device_of(theta):
        sm3_kernel[(groups * blocks,)](
            theta,
            gradient,
            rows,
            *(bound.view(torch.int32) for bound in (row, column, new_row, new_column)),
            buffer,
            keep,
            gain,
            eps,
            decay,
            momentum,
            complement,
            step_size,
            m,
            n,
            key.offset,
            _int32(key.stream),
            _int32(rounding_draw or 0),
            _int32(key.seed & 0xFFFFFFFF),
            _int32(key.seed >> 32),
            ALIGNED=aligned,
            STRIDE=stride,
            ROWS=count,
            STOCHASTIC=rounding_draw is not None,
            BACKEND="interpreter" if interpreting() else "hip" if torch.version.hip else "cuda",
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
