"""Reparametrised matrices in bare parameters: a layer's experts, torch's attention.

The module that owns such a parameter reads it as an attribute, so no layer can replace it. Instead,
torch's parametrizations make the attribute a function of other parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zoopt.nn import dual
from zoopt.nn.initial import kaiming_uniform_
from zoopt.nn.modules import Matrices
from zoopt.nn.norms import Norm, channel_norms
from zoopt.nn.support import columns_per_row, support
from zoopt.noise import stream


class Stack(nn.Module):
    """W, of the bare parameter's shape, as a function of other parameters.

    In a forward pass of the module that owns the parameter, W is computed once, however often it is
    read. The tensors that autograd saves live until the backward pass has used them.
    """

    def __init__(self, matrices: Matrices, owner: nn.Module) -> None:
        super().__init__()
        self.shape = tuple(matrices.param.shape)
        self.matrices = matrices.number
        self._made: Tensor | None = None
        self._inside = False
        self._hooks = (
            owner.register_forward_pre_hook(self._enter),
            owner.register_forward_hook(self._leave, always_call=True),
        )

    @property
    def stacked(self) -> tuple[int, int, int]:
        """(E, m, n)."""
        size = self.shape[0] // self.matrices if len(self.shape) == 2 else self.shape[1]
        return self.matrices, size, self.shape[-1]

    def own_shape(self, *shape: int) -> tuple[int, ...]:
        """(E, *shape), or shape alone if there is one matrix."""
        return shape if self.matrices == 1 else (self.matrices, *shape)

    def forward(self, original: Tensor) -> Tensor:
        """W, from the parameter that is kept under its name and from this module's own
        parameters."""
        if self._made is not None:
            return self._made
        made = self._make(original).view(self.shape)
        if self._inside:
            self._made = made
        return made

    def _make(self, original: Tensor) -> Tensor:
        """W, (E, m, n)."""
        raise NotImplementedError

    def _enter(self, *_: Any) -> None:
        self._inside, self._made = True, None

    def _leave(self, *_: Any) -> None:
        self._inside, self._made = False, None

    def detach_hooks(self) -> None:
        """Remove the hooks from the owner's forward pass."""
        for hook in self._hooks:
            hook.remove()


def three(tensor: Tensor, matrices: int) -> Tensor:
    """A parameter of one matrix, (a, b), or of E, (E, a, b), as (E, a, b)."""
    return tensor.unsqueeze(0) if matrices == 1 else tensor


class _GradNorm(torch.autograd.Function):
    """W0, I, J, M -> W, all (E, ...). The only saved tensor of W's size is W0."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, left: Tensor, right: Tensor, magnitude: Tensor, norm: Norm
    ) -> Tensor:
        ctx.save_for_backward(weight, left, right, magnitude)
        ctx.norm = norm
        v, c = _columns(weight, left, right, norm)
        return v.mul_((magnitude.to(c.dtype) / c).unsqueeze(_axis(norm)).to(v.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # As in GradNormLinear: with G = dL/dW, s_j = sum_i G_ij V_ij and e = d s / c^2,
        # dL/dV = G d - V e.
        weight, left, right, magnitude = ctx.saved_tensors
        [grad], axis = grads, _axis(ctx.norm)
        v, c = _columns(weight, left, right, ctx.norm)
        d = magnitude.to(c.dtype) / c
        s = (grad * v).sum(axis, dtype=c.dtype)
        e = d * s / c / c
        inner = grad * d.unsqueeze(axis).to(v.dtype) - v * e.unsqueeze(axis).to(v.dtype)
        return (
            None,
            inner @ right.to(v.dtype).transpose(1, 2),
            left.to(v.dtype).transpose(1, 2) @ inner,
            (s / c).to(magnitude.dtype),
            None,
        )


def _axis(norm: Norm) -> int:
    return 1 if norm == "input" else 2


def _columns(weight: Tensor, left: Tensor, right: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """V = W0 + I J, (E, m, n), and the norms of its columns (rows), (E, n) or (E, m)."""
    with torch.autocast(weight.device.type, enabled=False):
        v = torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype))
    return v, channel_norms(v, norm)


class GradNormStack(Stack):
    """A `GradNormLinear` for each matrix of a bare parameter, which is W0 and frozen.

    I (E, m, rank), J (E, rank, n) and M (E, n) or (E, m) train; without E if the parameter is
    one matrix.
    """

    def __init__(
        self,
        matrices: Matrices,
        owner: nn.Module,
        *,
        rank: int,
        norm: Norm,
        seed: int,
        name: str,
    ) -> None:
        super().__init__(matrices, owner)
        weight, (count, m, n) = matrices.param.detach(), self.stacked
        self.norm = norm
        self.left = nn.Parameter(weight.new_zeros(self.own_shape(m, rank)))
        self.right = nn.Parameter(weight.new_zeros(self.own_shape(rank, n)))
        norms = channel_norms(weight.view(count, m, n), norm).to(weight.dtype)
        self.magnitude = nn.Parameter(norms if count > 1 else norms[0])
        kaiming_uniform_(self.right, n, seed=seed, name=f"{name}.right")

    def _make(self, original: Tensor) -> Tensor:
        if original.requires_grad:
            raise RuntimeError(
                "the weight under a GradNormStack must stay frozen, got requires_grad=True; call "
                "requires_grad_(False) on it"
            )
        count = self.matrices
        magnitude = self.magnitude.unsqueeze(0) if count == 1 else self.magnitude
        left, right = three(self.left, count), three(self.right, count)
        weight = original.view(self.stacked)
        return dual.apply(_GradNorm, weight, left, right, magnitude, self.norm)


class _LowRankPlusSparse(torch.autograd.Function):
    """B, A, values -> W = scale B A + S, (E, m, n)."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, values: Tensor, layer: SLTrainStack
    ) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.layer = layer
        with torch.autocast(left.device.type, enabled=False):
            w = left @ (right * layer.scale)
        columns = layer.columns()
        return w.scatter_(2, columns, w.gather(2, columns) + values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        [grad], scale = grads, ctx.layer.scale
        return (
            (grad @ right.transpose(1, 2)).mul_(scale),
            (left.transpose(1, 2) @ grad).mul_(scale),
            grad.gather(2, ctx.layer.columns()),
            None,
        )


class SLTrainStack(Stack):
    """An `SLTrainLinear` for each matrix of a bare parameter, which B (E, m, rank) replaces.

    A (E, rank, n) and the values (E, m, c) are this module's; without E if the parameter is one
    matrix.
    """

    support_columns: Tensor | None

    def __init__(
        self,
        matrices: Matrices,
        owner: nn.Module,
        *,
        rank: int,
        density: float,
        alpha: float,
        support: str,
        seed: int,
        name: str,
    ) -> None:
        super().__init__(matrices, owner)
        like, (_, m, n) = matrices.param.detach(), self.stacked
        self.rank, self.scale = rank, alpha / rank
        self.seed, self.stream = seed, stream(f"support {name}")
        count = columns_per_row(n, density)
        self.right = nn.Parameter(like.new_zeros(self.own_shape(rank, n)))
        self.values = nn.Parameter(like.new_zeros(self.own_shape(m, count)))
        kaiming_uniform_(self.right, n, seed=seed, name=f"{name}.right")
        kaiming_uniform_(self.values, n, seed=seed, name=f"{name}.values")
        kept = self._regenerated().int() if support == "indices" else None
        self.register_buffer("support_columns", kept)

    def columns(self) -> Tensor:
        """The support: int64, (E, m, columns a row), ascending in each row."""
        kept = self.support_columns
        return self._regenerated() if kept is None else kept.long()

    def _regenerated(self) -> Tensor:
        count, m, n = self.stacked
        columns = self.values.shape[-1]
        made = support(
            *(count * m, n, columns),
            seed=self.seed,
            stream=self.stream,
            device=self.values.device,
        )
        return made.view(count, m, columns)

    def _make(self, original: Tensor) -> Tensor:
        count = self.matrices
        parts = (three(part, count) for part in (original, self.right, self.values))
        return dual.apply(_LowRankPlusSparse, *parts, self)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """B at the start: 0, for any weight."""
        return weight.new_zeros(self.own_shape(self.stacked[1], self.rank))

    def get_extra_state(self) -> Tensor:
        """The key of the support: int64, (3,), the seed's halves and the stream."""
        return torch.tensor([self.seed & 0xFFFFFFFF, self.seed >> 32, self.stream])

    def set_extra_state(self, state: Tensor) -> None:
        """As from `get_extra_state`."""
        low, high, self.stream = state.tolist()
        self.seed = high << 32 | low


def attach(matrices: Matrices, own: str, stack: Stack) -> None:
    """Make the module's parameter of that name a function of the stack's."""
    if isinstance(stack, GradNormStack):
        matrices.param.requires_grad_(False)
    parametrize.register_parametrization(matrices.module, own, stack)


def stacks_of(module: nn.Module) -> dict[str, Stack]:
    """The stacks of the module's own parameters, by the parameters' names."""
    lists = getattr(module, "parametrizations", None)
    if lists is None:
        return {}
    return {name: own[0] for name, own in lists.items() if isinstance(own[0], Stack)}


@torch.no_grad()
def merge_stacks(module: nn.Module) -> None:
    """Replace each of the module's stacks by a plain parameter."""
    for name, stack in stacks_of(module).items():
        weight = getattr(module, name).detach().clone()
        stack.detach_hooks()
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        module.register_parameter(name, nn.Parameter(weight))
