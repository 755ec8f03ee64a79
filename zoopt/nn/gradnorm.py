"""A frozen weight plus a low-rank product, its columns normalised: GradNormLoRP's layer."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoopt.checks import check_choice, check_positive_int
from zoopt.nn import dual
from zoopt.nn.initial import kaiming_uniform_
from zoopt.nn.linear import (
    ReparametrisedLinear,
    outer_dims,
    replace_layers,
    resolved_seed,
)
from zoopt.nn.modules import Matrices, Target
from zoopt.nn.norms import Norm, channel_norms
from zoopt.nn.stacks import GradNormStack


def normalised(
    weight: Tensor, left: Tensor, right: Tensor, magnitude: Tensor, norm: Norm = "input"
) -> tuple[Tensor, Tensor, Tensor]:
    """V = W0 + I J, the norms c of its columns (rows), and d = M / c: the layer's weight is V with
    each column (row) times its d.

    Args:
        weight: W0, (m, n).
        left, right: I (m, k) and J (k, n).
        magnitude: M, (n,), by output (m,).

    Returns:
        V (m, n), in weight's dtype; c and d, of M's shape, in the accumulator's.
    """
    with torch.autocast(weight.device.type, enabled=False):
        v = torch.addmm(weight, left.to(weight.dtype), right.to(weight.dtype))
    c = channel_norms(v, norm)
    return v, c, magnitude.to(c.dtype) / c


class _GradNorm(torch.autograd.Function):
    """x (..., n) -> x W^T + bias. V is computed again in backward, and dL/dW never."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        norm: Norm,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, left, right, magnitude)
        ctx.bias_dtype, ctx.norm = None if bias is None else bias.dtype, norm
        v, _, d = normalised(weight, left, right, magnitude, norm)
        w = v.mul_(d if norm == "input" else d.unsqueeze(1))
        return functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # With G = dL/dW, s_j = sum_i G_ij V_ij of each column and e = d s / c^2: dL/dV = G d - V e
        # (rows in the same way). Every product with G is one with the output's gradient and x, both
        # thin.
        x, weight, left, right, magnitude = ctx.saved_tensors
        dtype = x.dtype
        tokens, grad = outer_dims(x), outer_dims(grads[0])  # (t, n), (t, m)
        v, c, d = normalised(weight, left, right, magnitude, ctx.norm)
        v, thin_i, thin_j = v.to(dtype), left.to(dtype), right.to(dtype)
        if ctx.norm == "input":
            back = grad @ v  # (t, n)
            s = (tokens * back).sum(0, dtype=c.dtype)  # (n,)
            e, d = (d * s / c / c).to(dtype), d.to(dtype)
            left_grad = grad.t() @ ((tokens * d) @ thin_j.t()) - v @ (thin_j * e).t()
            right_grad = ((grad @ thin_i).t() @ tokens) * d - (thin_i.t() @ v) * e
            x_grad = back * d
        else:
            s = (grad * (tokens @ v.t())).sum(0, dtype=c.dtype)  # (m,)
            e, d = (d * s / c / c).to(dtype), d.to(dtype)
            scaled = grad * d
            left_grad = scaled.t() @ (tokens @ thin_j.t()) - e.unsqueeze(1) * (v @ thin_j.t())
            right_grad = (scaled @ thin_i).t() @ tokens - (thin_i * e.unsqueeze(1)).t() @ v
            x_grad = scaled @ v
        return (
            x_grad.view_as(x) if ctx.needs_input_grad[0] else None,
            None,
            left_grad.to(left.dtype),
            right_grad.to(right.dtype),
            (s / c).to(magnitude.dtype),
            None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype),
            None,
        )


class GradNormLinear(ReparametrisedLinear):
    r"""A linear layer with W = M (W0 + I J) / ||W0 + I J||_c (Huang et al., 2024).

    arXiv:2412.19616. ||.||_c: the norm of each column of W (out, in), so there is one magnitude for
    each input, as in the paper. With `norm="output"` it is that of each row, one for each
    output, as in peft's DoRA. W0 (out, in) is frozen; I (out, rank), J (rank, in), M (in,) or
    (out,) and the bias train. At the start I = 0 and M = ||W0||_c, so W = W0 up to rounding.

    No tensor of W's size outlives a forward or a backward pass: W is made, used and freed in each.

    Args:
        weight: W0, (out, in).
        bias: (out,), or None.
        rank: k, of I J.
        norm: `"input"` (default; paper) or `"output"` (peft's DoRA).
        seed: of J's initial values, U(+-1 / sqrt(in)); default torch.initial_seed().
        name: the layer's name, so that layers differ.

    State dict: weight, left (I), right (J), magnitude (M), bias.

    Raises:
        TypeError, ValueError: a rank that is not a positive int, another norm.
        RuntimeError: in forward, W0 requires a gradient.

    Differs from DoRA, whose code treats the norm as a constant in backward; here the gradient is
    exact.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        *,
        rank: int,
        norm: Norm = "input",
        seed: int | None = None,
        name: str = "",
    ) -> None:
        check_positive_int("rank", rank)
        check_choice("norm", norm, get_args(Norm))
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features)
        self.norm = norm
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.left = nn.Parameter(weight.new_zeros(out_features, rank))
        self.right = nn.Parameter(weight.new_zeros(rank, in_features))
        self.magnitude = nn.Parameter(channel_norms(self.weight.detach(), norm).to(weight.dtype))
        self.register_parameter("bias", bias)
        kaiming_uniform_(self.right, in_features, seed=resolved_seed(seed), name=f"{name}.right")

    @torch.no_grad()
    def materialise(self) -> Tensor:
        """W, (out, in)."""
        v, _, d = normalised(self.weight, self.left, self.right, self.magnitude, self.norm)
        return v.mul_(d if self.norm == "input" else d.unsqueeze(1))

    def _linear(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            raise RuntimeError(
                "weight of a GradNormLinear must stay frozen, got requires_grad=True; call "
                "layer.weight.requires_grad_(False)"
            )
        weights = self.weight, self.left, self.right, self.magnitude
        return dual.apply(_GradNorm, x, *weights, self.bias, self.norm)

    def extra_repr(self) -> str:
        """The sizes and the rank."""
        return f"{super().extra_repr()}, rank={self.left.shape[1]}"


def convert_to_gradnorm(
    model: nn.Module,
    target: Target = "linear",
    *,
    rank: int,
    norm: Norm = "input",
    seed: int | None = None,
) -> nn.Module:
    """Replace each targeted linear layer by a `GradNormLinear` of its weight.

    Matrices in bare parameters (fused experts) are reparametrised too, each by itself. They are
    computed in each forward pass and kept until the backward pass has used them; with activation
    checkpointing, only while their layer is computed.

    The model's outputs stay the same up to rounding. The layers' own weights are frozen, and all
    other parameters keep their requires_grad. `zoopt.nn.merge` undoes it.

    Args:
        model: changed in place.
        target: which layers; as for `zoopt.lowrank.param_groups`.
        rank: k, of each layer's I J.
        norm: as for `GradNormLinear`.
        seed: of J's initial values; default torch.initial_seed().

    Returns:
        The model.

    Raises:
        TypeError, ValueError: a rank that is not a positive int, another norm, nothing that
            matches, or a layer of a kind that cannot be replaced. Nothing has changed then.
    """
    check_positive_int("rank", rank)
    check_choice("norm", norm, get_args(Norm))
    seed = resolved_seed(seed)

    def build(name: str, weight: Tensor, bias: nn.Parameter | None) -> GradNormLinear:
        return GradNormLinear(weight, bias, rank=rank, norm=norm, seed=seed, name=name)

    def build_stack(name: str, own: Matrices) -> GradNormStack:
        return GradNormStack(own, own.module, rank=rank, norm=norm, seed=seed, name=name)

    return replace_layers(model, target, build, build_stack)
