"""The operations on fake tensors, which have no values: they compute nothing.

They allocate what the real ones allocate, so that the memory planner can count a step of every
optimizer on fake tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoopt.kernels.dispatch import native_bfloat16, on_gpu
from zoopt.kernels.product import reference as reference_product


def nothing(*args: Any) -> None:
    """Leave everything as it is."""


squares = reference_product.squares
weighted_sum = scaled_rows = momentum_sum = adam_window = gather_rows = write_each = nothing
adam = adamw = average = scale = sm3 = nothing
adam_entries = sum_entries = cover_entries = nothing


def add_product(theta: Tensor, left: Any, right: Any, *numbers_and_terms: Any) -> None:
    """Allocate as the CPU implementation does: a chunk of rows, unless BLAS adds in place. On a GPU
    nothing is allocated."""
    if on_gpu(theta):
        return  # Kernels read what is there; BLAS adds in place.
    alpha, _, gradient, channel_scale, sign_of, sign_step, _, rounding_draw = numbers_and_terms
    product_alone = channel_scale is None and sign_of is None
    at_once = reference_product.blas_rounds(theta, rounding_draw)
    dtype = theta.dtype if at_once or native_bfloat16(theta) else torch.float32
    if product_alone and dtype == theta.dtype:
        if left is not None:
            left, right = left.to(dtype), right.to(dtype)
        if left is not None and not at_once:
            theta.new_empty(reference_product.chunk_rows(theta), theta.shape[1])
        return
    left, right = reference_product.scaled_factors(left, right, alpha, dtype)
    rows = reference_product.row_chunks(theta)[0]
    reference_product.addend(
        rows, left, right, gradient, channel_scale, sign_of, sign_step, torch.float32
    )
