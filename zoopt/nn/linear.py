"""What reparametrised linear layers share: autocast, merging, replacing a model's layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoopt.distributed.seed import SharedSeed
from zoopt.kernels.noise.philox import halfwords
from zoopt.nn.modules import Target, is_conv1d, linear_layers
from zoopt.noise import stream

#: Elements of a dense (rows, n) intermediate, or of noise, that exist at a time.
CHUNK = 1 << 20


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

    def extra_repr(self) -> str:
        """The sizes."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


def merge(model: nn.Module) -> nn.Module:
    """Put an nn.Linear in the place of each reparametrised layer, in place.

    Returns:
        The model; if it is itself such a layer, its nn.Linear.
    """
    if isinstance(model, ReparametrisedLinear):
        return model.merge()
    for name, module in list(model.named_modules()):
        if isinstance(module, ReparametrisedLinear):
            model.set_submodule(name, module.merge())
    return model


def replace_layers(
    model: nn.Module,
    target: Target,
    build: Callable[[str, Tensor, nn.Parameter | None], ReparametrisedLinear],
) -> nn.Module:
    """Put build(name, weight (out, in), bias) in the place of each targeted layer, in place.

    Raises:
        TypeError: a layer is of a subclass of nn.Linear or Conv1D, whose owner may read its
            weight directly. Nothing has changed then.
        ValueError: `target` matches nothing, or the model itself.
    """
    layers = linear_layers(model, target)
    for name, module in layers.items():
        if not name:
            raise ValueError(
                f"model must contain the layers to convert, got a bare {type(module).__name__}; "
                f"wrap it in nn.Sequential"
            )
        if type(module) is not nn.Linear and not is_conv1d(module):
            raise TypeError(
                f"a layer to convert must be an nn.Linear or Conv1D itself, got "
                f"{type(module).__name__} for {name!r}, whose owner may read its weight; choose "
                f"layers by target without it"
            )
    for name, module in layers.items():
        stored: Tensor = module.weight  # type: ignore[assignment]
        weight = stored.detach().t().contiguous() if is_conv1d(module) else stored.detach()
        built = build(name, weight, module.bias)  # type: ignore[arg-type]
        model.set_submodule(name, built.train(module.training))
    return model


@torch.no_grad()
def kaiming_uniform_(tensor: Tensor, fan_in: int, *, seed: int, name: str) -> None:
    """Fill with U(+-1 / sqrt(fan_in)), as nn.Linear does.

    Each element takes 16 random bits that depend on seed and name alone. Meta tensors are left as
    they are.
    """
    if tensor.is_meta:
        return
    bound = 1.0 / math.sqrt(fan_in)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        index = torch.arange(start, start + part.numel(), device=tensor.device)
        bits = halfwords(index, seed=seed, stream=stream(f"initial {name}"), draw=0)
        part.copy_((bits.double() + 0.5) * (bound / 32768) - bound)


def resolved_seed(seed: int | None) -> int:
    """The seed; by default torch's initial one, that of rank 0 in all processes."""
    return SharedSeed(None, "zoopt.nn").value if seed is None else seed


def outer_dims(x: Tensor) -> Tensor:
    """(..., n) -> (t, n)."""
    return x.reshape(-1, x.shape[-1])
