"""Products with a matrix under a low-rank displacement, which is never added to the matrix.

x (W + L R^T)^T = x W^T + (x R) L^T        torch.nn.functional.linear: L (m, k), R (n, k)
x (W + L R^T)   = x W + (x L) R^T          torch.matmul, torch.mm, torch.addmm
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoopt.kernels import dispatch

_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def displaced_product(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_parameter: Callable[[Any], bool],
    factors: Callable[[Tensor], tuple[Tensor, Tensor] | None],
    replace: Callable[[Any], Any],
) -> Tensor | None:
    """The result of a product whose matrix is a displaced parameter, or None for other calls.

    Args:
        func, args, kwargs: the call.
        is_parameter: whether a value is a parameter that is to be displaced.
        factors: parameter -> L and R, or None if its displacement is no product.
        replace: any other argument -> the value to use instead.
    """
    operands = operands_of(func, args, kwargs)
    if operands is None:
        return None
    x, weight, bias = operands
    if is_parameter(x) or not is_parameter(weight) or weight.dim() != 2:
        return None
    pair = factors(weight)
    if pair is None:
        return None
    left, right = pair
    bias = replace(bias)
    if func is torch.nn.functional.linear:
        return _plus_product(func(x, weight, bias), x, right, left)
    y = func(x, weight) if bias is None else func(bias, x, weight)
    return _plus_product(y, x, left, right)


def operands_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, Any] | None:
    """x, W and the bias (or None) of a product x W^T or x W, or None for other calls."""
    if func is torch.nn.functional.linear:
        if not kwargs and len(args) > 1:
            return args[0], args[1], args[2] if len(args) > 2 else None
        values = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        return values["input"], values["weight"], values.get("bias")
    if func is torch.addmm and len(args) == 3 and not kwargs:
        bias, x, weight = args
        return x, weight, bias
    if func in _MATMULS and len(args) == 2 and not kwargs:
        return args[0], args[1], None
    return None


def plus_product(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """As `_plus_product`, with factors on a GPU, and with little Python where all is of one dtype:
    then autocast, which has been on during the product y, has nothing to cast."""
    if x.dtype == y.dtype == inner.dtype == outer.dtype and x.dim() > 1:
        rows, out = (x, y) if x.dim() == 2 else (x.flatten(0, -2), y.view(-1, y.shape[-1]))
        out.addmm_(torch.mm(rows, inner), outer.t())
        return y
    return _plus_product(y, x, inner, outer)


def _plus_product(y: Tensor, x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """y + (x inner) outer^T: y (..., m), x (..., n), inner (n, k), outer (m, k); y is reused."""
    if dispatch.launches(x) and inner.dtype == outer.dtype == x.dtype:
        thin = torch.matmul(x, inner)  # (..., k)
    else:
        # Both operands row-major: several times as fast as with a tall thin matrix.
        thin = torch.nn.functional.linear(x, inner.to(x.dtype).T.contiguous())
    if y.dtype != thin.dtype or torch.is_autocast_enabled(y.device.type):
        return y + torch.matmul(thin, outer.to(thin.dtype).T)
    y.view(-1, y.shape[-1]).addmm_(thin.reshape(-1, thin.shape[-1]), outer.to(y.dtype).T)
    return y
