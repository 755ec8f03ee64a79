"""A frozen weight plus a low-rank product, its columns normalised: GradNormLoRP's layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoopt.checks import check_positive_int
from zoopt.dtypes import accumulator_dtype
from zoopt.nn.linear import ReparametrisedLinear, kaiming_uniform_, outer_dims, resolved_seed


def normalised(
    weight: Tensor, left: Tensor, right: Tensor, magnitude: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """V = W0 + I J, the norms c of its columns, and d = M / c: the layer's weight is V d.

    Args:
        weight: W0, (m, n).
        left, right: I (m, k) and J (k, n).
        magnitude: M, (n,).

    Returns:
        V (m, n), in weight's dtype; c and d, (n,), in the accumulator's.
    """
    with torch.autocast(weight.device.type, enabled=False):
        v = torch.addmm(weight, left.to(weight.dtype), right.to(weight.dtype))
    c = column_norms(v)
    return v, c, magnitude.to(c.dtype) / c


def column_norms(v: Tensor) -> Tensor:
    """The norms of V's columns, (m, n) -> (n,), and the least number for a column of zeros."""
    wide = accumulator_dtype(v.dtype)
    norms: Tensor = torch.linalg.vector_norm(v, dim=0, dtype=wide)
    return norms.clamp_min_(torch.finfo(wide).tiny)


class _GradNorm(torch.autograd.Function):
    """x (..., n) -> x (V d)^T + bias. V is made anew in backward, and dL/dW never."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, left, right, magnitude)
        ctx.bias_dtype = None if bias is None else bias.dtype
        v, _, d = normalised(weight, left, right, magnitude)
        return functional.linear(
            x, v.mul_(d).to(x.dtype), None if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # With G = dL/dW, so that dL/dV = G d - V e with e = d s / c^2 and s_j = sum_i G_ij V_ij:
        # every product with G is one with the output's gradient and with x, both thin.
        x, weight, left, right, magnitude = ctx.saved_tensors
        dtype = x.dtype
        tokens, grad = outer_dims(x), outer_dims(grads[0])  # (t, n), (t, m)
        v, c, d = normalised(weight, left, right, magnitude)
        v, thin_i, thin_j = v.to(dtype), left.to(dtype), right.to(dtype)
        back = grad @ v  # (t, n)
        s = (tokens * back).sum(0, dtype=c.dtype)  # (n,)
        e = (d * s / c / c).to(dtype)
        d = d.to(dtype)
        left_grad = grad.t() @ ((tokens * d) @ thin_j.t()) - v @ (thin_j * e).t()
        right_grad = ((grad @ thin_i).t() @ tokens) * d - (thin_i.t() @ v) * e
        return (
            (back * d).view_as(x) if ctx.needs_input_grad[0] else None,
            None,
            left_grad.to(left.dtype),
            right_grad.to(right.dtype),
            (s / c).to(magnitude.dtype),
            None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype),
        )


class GradNormLinear(ReparametrisedLinear):
    r"""A linear layer with W = M (W0 + I J) / ||W0 + I J||_c (Huang et al., 2024).

    arXiv:2412.19616. c: the norm of each column. W0 (out, in) is frozen; I (out, rank), J
    (rank, in), M (in,) and the bias train. At the start I = 0 and M = ||W0||_c, hence W = W0 to
    rounding.

    No tensor of W's size outlives a forward or a backward pass: W is made, used and freed in each.

    Args:
        weight: W0, (out, in).
        bias: (out,), or None.
        rank: k, of I J.
        seed: of J's initial values, U(+-1 / sqrt(in)); default torch.initial_seed().
        name: the layer's name, so that layers differ.

    State dict: weight, left (I), right (J), magnitude (M), bias.

    Raises:
        TypeError, ValueError: a rank that is not a positive int.
        RuntimeError: in forward, W0 requires a gradient.

    Differs from DoRA, whose code takes the norm as a constant in backward: here its gradient is
    whole.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        *,
        rank: int,
        seed: int | None = None,
        name: str = "",
    ) -> None:
        check_positive_int("rank", rank)
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.left = nn.Parameter(weight.new_zeros(out_features, rank))
        self.right = nn.Parameter(weight.new_zeros(rank, in_features))
        self.magnitude = nn.Parameter(column_norms(self.weight.detach()).to(weight.dtype))
        self.register_parameter("bias", bias)
        kaiming_uniform_(self.right, in_features, seed=resolved_seed(seed), name=f"{name}.right")

    @torch.no_grad()
    def materialise(self) -> Tensor:
        """W, (out, in)."""
        v, _, d = normalised(self.weight, self.left, self.right, self.magnitude)
        return v.mul_(d)

    def _linear(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            raise RuntimeError(
                "weight of a GradNormLinear must stay frozen, got requires_grad=True; call "
                "layer.weight.requires_grad_(False)"
            )
        return _GradNorm.apply(  # type: ignore[no-any-return,no-untyped-call]
            x, self.weight, self.left, self.right, self.magnitude, self.bias
        )

    def extra_repr(self) -> str:
        """The sizes and the rank."""
        return f"{super().extra_repr()}, rank={self.left.shape[1]}"
