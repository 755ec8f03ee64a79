"""Shared by reparametrised linear layers: autocast, merging, replacing a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from zoopt.distributed.seed import SharedSeed
from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.dispatch import is_fake
from zoopt.nn import dual
from zoopt.nn.initial import CHUNK
from zoopt.nn.modules import Matrices, Target, is_conv1d, matrices
from zoopt.nn.stacks import Stack, attach, merge_stacks


class ReparametrisedLinear(nn.Module):
    """y = x W^T + bias, with W (out, in) a function of the layer's parameters.

    A subclass has `materialise`, and `_linear`, whose graph keeps no tensor of W's size.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None

    def materialise(self) -> Tensor:
        """W, (out, in), outside of autograd."""
        raise NotImplementedError

    def _linear(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        return self._linear(x)

    def merge(self) -> nn.Linear:
        """An nn.Linear of the weight as it is now: the same outputs, bit for bit."""
        weight = self.materialise()
        merged = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        merged.weight = nn.Parameter(weight)
        if self.bias is not None:
            merged.bias = nn.Parameter(self.bias.detach().clone())
        return merged.train(self.training)

    def _apply_but_not_narrow(self, name: str, fn: Any, recurse: bool) -> None:
        """As nn.Module._apply, but that parameter stays in float32 or float64 if `fn` would narrow
        it."""
        before = getattr(self, name).detach().clone()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        param: nn.Parameter = getattr(self, name)
        if accumulator_dtype(param.dtype) != param.dtype:
            param.data = before.to(param.device)

    def extra_repr(self) -> str:
        """The sizes."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class RecomputedLinear(ReparametrisedLinear):
    """A layer whose W is a function of frozen tensors and one that trains, `values`.

    W exists only temporarily, in forward and backward, and no more than a few rows of dL/dW do.
    """

    def weight_of(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """W (out, in) in that dtype, a new tensor."""
        raise NotImplementedError

    def _gradient(self, values: Tensor, grad: Tensor, tokens: Tensor) -> Tensor:
        """dL/dvalues, from the output's gradient (t, out) and the input (t, in)."""
        raise NotImplementedError

    def _recomputed(self, x: Tensor, values: Tensor) -> Tensor:
        return dual.apply(_Recomputed, x, self, values, self.bias)


class _Recomputed(torch.autograd.Function):
    """x (..., n) -> x W^T + bias. Backward computes W again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: RecomputedLinear, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        w = layer.weight_of(values, x.dtype)
        return functional.linear(x, w, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        layer: RecomputedLinear = ctx.layer
        tokens, grad = outer_dims(x), outer_dims(grads[0])  # (t, n), (t, m)
        x_grad = values_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ layer.weight_of(values, x.dtype)).view_as(x)
        if ctx.needs_input_grad[2]:
            values_grad = layer._gradient(values, grad, tokens)
        if ctx.needs_input_grad[3]:
            bias_grad = grad.sum(0).to(ctx.bias_dtype)
        return x_grad, None, values_grad, bias_grad


def gradient_rows(
    grad: Tensor, tokens: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """dL/dW, from the output's gradient (t, m) and the input (t, n), a few rows at a time: which
    rows, and their gradient (rows, n) in that dtype."""
    m, rows = grad.shape[1], max(1, CHUNK // tokens.shape[1])
    # Fake tensors only measure memory, and two chunks have the same peak as all of them.
    for start in range(0, min(2 * rows, m) if is_fake(grad) else m, rows):
        run = slice(start, start + rows)
        yield run, (grad[:, run].t() @ tokens).to(dtype)


def merge(model: nn.Module) -> nn.Module:
    """Replace each reparametrised layer by an nn.Linear, and each reparametrised bare parameter by
    a plain one.

    Returns:
        The model; if it is itself such a layer, its nn.Linear.
    """
    if isinstance(model, ReparametrisedLinear):
        return model.merge()
    merged: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if name.startswith(merged):
            continue  # The base of a layer that has been merged as a whole.
        if isinstance(module, ReparametrisedLinear):
            model.set_submodule(name, module.merge())
            merged += (f"{name}.",)
        else:
            merge_stacks(module)
    return model


def check_inside(layers: dict[str, nn.Module]) -> None:
    """Raise if one of the layers, by name, is the model itself, in which nothing can replace it."""
    if "" in layers:
        raise ValueError(
            f"model must contain the layers to convert, got a bare {type(layers['']).__name__}; "
            f"wrap it in nn.Sequential"
        )


def check_replaceable(layers: dict[str, nn.Module]) -> None:
    """Raise unless other layers can take the place of these, by name.

    Raises:
        TypeError: a layer is of a subclass of nn.Linear or Conv1D, whose owner may read its weight
            directly.
        ValueError: a layer is the model itself, or has hooks, which would be lost.
    """
    check_inside(layers)
    for name, module in layers.items():
        if type(module) is not nn.Linear and not is_conv1d(module):
            raise TypeError(
                f"a layer to convert must be an nn.Linear or Conv1D inside the model, got "
                f"{type(module).__name__} for {name!r}, whose owner may read its weight; choose "
                f"layers by target without it"
            )
    check_no_hooks(layers)


def check_no_hooks(layers: dict[str, nn.Module]) -> None:
    """Raise if a call of one of the layers, by name, runs more than its own forward pass."""
    for name, module in layers.items():
        hooks: list[Any] = [getattr(module, kind) for kind in _HOOKS]
        # accelerate's hooks put another function in the place of the class's.
        forward = vars(module).get("forward", module.forward)
        if any(hooks) or getattr(forward, "__func__", None) is not type(module).forward:
            raise ValueError(
                f"a layer to convert must have no hooks, which would be lost, got {name!r} with "
                f"some; remove them first (those of accelerate by "
                f"accelerate.hooks.remove_hook_from_module), or choose layers by target without it"
            )


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def replace_layers(
    model: nn.Module,
    target: Target,
    build: Callable[[str, Tensor, nn.Parameter | None], ReparametrisedLinear],
    build_stack: Callable[[str, Matrices], Stack],
) -> nn.Module:
    """Replace each targeted layer by build(name, weight (out, in), bias), and make each targeted
    bare parameter a function of build_stack(name, matrices).

    Raises:
        TypeError, ValueError: `target` matches nothing, or a layer that cannot be replaced.
            Nothing has changed then.
    """
    found = matrices(model, target)
    bare = {name: own for name, own in found.items() if not own.is_layers}
    layers = {name.rpartition(".")[0]: own.module for name, own in found.items() if own.is_layers}
    for name, module in list(layers.items()):
        if type(module) is NonDynamicallyQuantizableLinear:
            # torch's attention reads its weight, and never calls it.
            own = found[f"{name}.weight" if name else "weight"]
            bare[f"{name}.weight"] = own
            del layers[name]
    check_replaceable(layers)
    for name, module in layers.items():
        stored: Tensor = module.weight  # type: ignore[assignment]
        weight = stored.detach().t().contiguous() if is_conv1d(module) else stored.detach()
        built = build(name, weight, module.bias)  # type: ignore[arg-type]
        model.set_submodule(name, built.train(module.training))
    for name, own in bare.items():
        attach(own, name.rpartition(".")[2], build_stack(name, own))
    return model


def resolved_seed(seed: int | None) -> int:
    """The seed; by default torch's initial one, that of rank 0 in all processes."""
    return SharedSeed(None, "zoopt.nn").value if seed is None else seed


def outer_dims(x: Tensor) -> Tensor:
    """(..., n) -> (t, n)."""
    return x.reshape(-1, x.shape[-1])
