"""A low-rank product plus a sparse matrix: SLTrain's layer."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoopt.checks import check_choice, check_number, check_positive_int
from zoopt.kernels.noise.key import check_unsigned
from zoopt.nn import dual
from zoopt.nn.initial import kaiming_uniform_
from zoopt.nn.linear import (
    ReparametrisedLinear,
    gradient_rows,
    outer_dims,
    replace_layers,
    resolved_seed,
)
from zoopt.nn.modules import Matrices, Target
from zoopt.nn.stacks import SLTrainStack
from zoopt.nn.support import columns_per_row, support
from zoopt.noise import stream

SupportMode = Literal["regenerated", "indices"]


def low_rank_plus_sparse(
    left: Tensor, right: Tensor, values: Tensor, columns: Tensor, scale: float
) -> Tensor:
    """scale B A + S, (m, n), in the parameters' dtype.

    Args:
        left, right: B (m, r) and A (r, n).
        values, columns: (m, c), the entries of each row of S and where they are (int64, distinct).
    """
    with torch.autocast(left.device.type, enabled=False):
        w = left @ (right * scale)
    # A row's columns are distinct: this adds, and in the same order on every device.
    return w.scatter_(1, columns, w.gather(1, columns) + values)


class _SparsePlusLowRank(torch.autograd.Function):
    """x (..., n) -> x W^T + bias. W is computed again in backward, and dL/dW in runs of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: SLTrainLinear,
        left: Tensor,
        right: Tensor,
        values: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, left, right, values)
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        w = low_rank_plus_sparse(left, right, values, layer.columns(), layer.scale)
        return functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, values = ctx.saved_tensors
        scale, columns = ctx.layer.scale, ctx.layer.columns()
        tokens, grad = outer_dims(x), outer_dims(grads[0])  # (t, n), (t, m)
        x_grad = None
        if ctx.needs_input_grad[0]:
            w = low_rank_plus_sparse(left, right, values, columns, scale)
            x_grad = (grad @ w.to(x.dtype)).view_as(x)
            del w
        left_grad = grad.t() @ (tokens @ right.to(x.dtype).t())
        right_grad = (grad @ left.to(x.dtype)).t() @ tokens
        values_grad = torch.empty_like(values)
        for run, dense in gradient_rows(grad, tokens, grad.dtype):
            values_grad[run] = dense.gather(1, columns[run])
        return (
            x_grad,
            None,
            left_grad.mul_(scale).to(left.dtype),
            right_grad.mul_(scale).to(right.dtype),
            values_grad,
            None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype),
        )


class SLTrainLinear(ReparametrisedLinear):
    r"""A linear layer with W = (alpha / rank) B A + S, S sparse: SLTrain (Han et al., 2024).

    arXiv:2406.02214. B (out, rank), A (rank, in), the values of S and the bias train; the support
    of S is random and fixed, round(density in) columns in each row. At the start B = 0, and A, the
    values and the bias are U(+-1 / sqrt(in)).

    Elements: rank (in + out) + density in out, instead of in out. `support="indices"` keeps an
    int32 column for each value, 4 density in out bytes; `support="regenerated"` keeps none and
    regenerates them from the seed in each pass. Both have the same support. W and the gradient's
    rows are temporary in forward and backward.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        rank: r; the paper's 128 at hidden size 512 up to 512 at 2048.
        density: delta of S, in (0, 1]; default 0.03 (the paper's).
        alpha: default rank / 4, at most 32: the paper's 32 at rank 128 (60M parameters), and the
            same share of smaller ranks, where 32 trains unstably. The paper takes 16 at rank 256
            (130M and 350M) and 8 at rank 512 (1B).
        support: `"regenerated"` or `"indices"`.
        seed: of the support and the initial values; default torch.initial_seed(). It is in the
            state dict.
        name: the layer's name, so that layers differ.

    Raises:
        TypeError, ValueError: an argument out of range.

    Differs from the paper: its support is uniform over the matrix; here each row has a fixed count,
    so that the values form a matrix. The authors' code keeps int64 indices.
    """

    support_columns: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        density: float = 0.03,
        alpha: float | None = None,
        support: SupportMode = "regenerated",
        seed: int | None = None,
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("in_features", in_features)
        check_positive_int("out_features", out_features)
        check_positive_int("rank", rank)
        check_number("density", density, low=0.0, high=1.0, open_low=True)
        alpha = min(rank / 4, 32.0) if alpha is None else alpha
        check_number("alpha", alpha, low=0.0, open_low=True)
        check_choice("support", support, get_args(SupportMode))
        seed = resolved_seed(seed)
        check_unsigned("seed", seed, 64)
        super().__init__(in_features, out_features)
        self.scale, self.support = alpha / rank, support
        self.seed, self.stream = seed, stream(f"support {name}")
        count = columns_per_row(in_features, density)
        like = torch.empty(0, device=device, dtype=dtype)
        self.left = nn.Parameter(like.new_zeros(out_features, rank))
        self.right = nn.Parameter(like.new_zeros(rank, in_features))
        self.values = nn.Parameter(like.new_zeros(out_features, count))
        self.register_parameter(
            "bias", nn.Parameter(like.new_zeros(out_features)) if bias else None
        )
        kaiming_uniform_(self.right, in_features, seed=seed, name=f"{name}.right")
        kaiming_uniform_(self.values, in_features, seed=seed, name=f"{name}.values")
        if self.bias is not None:
            kaiming_uniform_(self.bias, in_features, seed=seed, name=f"{name}.bias")
        kept = self._regenerated().int() if support == "indices" else None
        self.register_buffer("support_columns", kept)

    def columns(self) -> Tensor:
        """The support: int64, (out, columns a row), ascending in each row."""
        kept = self.support_columns
        return self._regenerated() if kept is None else kept.long()

    def _regenerated(self) -> Tensor:
        return support(
            *(self.out_features, self.in_features, self.values.shape[1]),
            seed=self.seed,
            stream=self.stream,
            device=self.values.device,
        )

    @torch.no_grad()
    def materialise(self) -> Tensor:
        """W, (out, in)."""
        return low_rank_plus_sparse(self.left, self.right, self.values, self.columns(), self.scale)

    def _linear(self, x: Tensor) -> Tensor:
        return dual.apply(
            *(_SparsePlusLowRank, x, self, self.left, self.right, self.values, self.bias)
        )

    def get_extra_state(self) -> Tensor:
        """The key of the support: int64, (3,), the seed's halves and the stream."""
        return torch.tensor([self.seed & 0xFFFFFFFF, self.seed >> 32, self.stream])

    def set_extra_state(self, state: Tensor) -> None:
        """As from `get_extra_state`."""
        low, high, self.stream = state.tolist()
        self.seed = high << 32 | low

    def extra_repr(self) -> str:
        """The sizes, the rank and the support."""
        rank, count = self.right.shape[0], self.values.shape[1]
        return f"{super().extra_repr()}, rank={rank}, columns_per_row={count}, {self.support}"


def convert_to_sltrain(
    model: nn.Module,
    target: Target = "linear",
    *,
    rank: int,
    density: float = 0.03,
    alpha: float | None = None,
    support: SupportMode = "regenerated",
    seed: int | None = None,
) -> nn.Module:
    """Replace each targeted linear layer by a new `SLTrainLinear`, to train from scratch.

    The layers' weights are NOT kept: SLTrain is a method of pre-training. Biases are. Matrices in
    bare parameters (fused experts) are reparametrised too, each by itself; they are computed in
    each forward pass and kept until the backward pass has used them.

    Args:
        model: changed in place.
        target: which layers; as for `zoopt.lowrank.param_groups`.
        rank, density, alpha, support, seed: as for `SLTrainLinear`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: an argument out of range, nothing that matches, or a layer of a kind
            that cannot be replaced. Nothing has changed then.

    Example:
        >>> model = zoopt.nn.convert_to_sltrain(LlamaForCausalLM(config), rank=128)
        >>> opt = zoopt.AdamW(model.named_parameters(), lr=3e-3)
    """
    options: dict[str, Any] = {"density": density, "alpha": alpha, "support": support}
    seed = resolved_seed(seed)
    # Refuses bad options before a layer is replaced.
    SLTrainLinear(1, 1, rank=rank, seed=seed, device="meta", **options)

    def build(name: str, weight: Tensor, bias: nn.Parameter | None) -> SLTrainLinear:
        layer = SLTrainLinear(
            *(weight.shape[1], weight.shape[0], bias is not None),
            rank=rank,
            seed=seed,
            name=name,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        if bias is not None:
            layer.bias = bias
        return layer

    def build_stack(name: str, own: Matrices) -> SLTrainStack:
        share = min(rank / 4, 32.0) if alpha is None else alpha
        return SLTrainStack(
            *(own, own.module),
            rank=rank,
            density=density,
            alpha=share,
            support=support,
            seed=seed,
            name=name,
        )

    return replace_layers(model, target, build, build_stack)
