"""Runs operators on fake tensors, including some that torch itself cannot simulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.kernels.dispatch import is_fake

_GROUPED_MM = torch.ops.aten._grouped_mm.default
#: The rows of a result are aligned to this many bytes.
_ALIGNMENT = 16


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator. For grouped products, only the shape of the result is computed."""
    return (_grouped_mm if func is _GROUPED_MM else func)(*args, **kwargs)


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any, **options: Any
) -> Any:
    """`torch._grouped_mm`, which experts use. torch's own shape function supports only bfloat16.

    (M, K) x (G, K, N) and (G, M, K) x (K, N) give (M, N); the two other forms give (G, M, N).
    """
    if not is_fake(a) or a.dtype == torch.bfloat16 or a.dtype != b.dtype:
        return _GROUPED_MM(a, b, offs, *rest, **options)
    m, n = a.shape[-2], b.shape[-1]
    step = _ALIGNMENT // a.element_size()
    row = -(-n // step) * step
    if a.dim() != b.dim():
        return a.new_empty_strided((m, n), (row, 1))
    groups = a.shape[0] if offs is None or a.dim() == 3 else offs.shape[0]
    return a.new_empty_strided((groups, m, n), (m * row, row, 1))
