"""LoRA-SB: between two fixed bases of the first full step, an r x r matrix trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from zoopt.checks import check_number, check_positive_int
from zoopt.dtypes import accumulator_dtype
from zoopt.nn.linear import ReparametrisedLinear
from zoopt.nn.modules import Target, is_conv1d, linear_layers


def first_step(gradient: Tensor, rank: int, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """B, R, A with B R A the best approximation of rank r to the first step -lr sign(G) of Adam.

    Args:
        gradient: G (m, n), the sum over the first batches.

    Returns:
        B (m, r) and A (r, n), of orthonormal columns and rows, and R (r, r), diagonal.
    """
    wide = gradient.to(accumulator_dtype(gradient.dtype))
    u, s, vh = torch.linalg.svd(wide.sign() * -lr, full_matrices=False)
    return u[:, :rank].contiguous(), torch.diag(s[:rank]), vh[:rank].contiguous()


class LoRASBLinear(ReparametrisedLinear):
    r"""A linear layer with W = W0 + B R A (Ponkshe et al., 2024, arXiv:2411.19557).

    B (out, r) and A (r, in) have orthonormal columns and rows and are fixed, as W0 is; R (r, r)
    trains: r^2 elements. B and A are leading singular vectors of the first step that full training
    would make, and R its singular values at the start, so that W begins as W0 and the best
    approximation of rank r to that step.

    As B and A are orthonormal, dL/dR = B^T (dL/dW) A^T is the gradient's part between the bases,
    and a step of R is that step of W: no scale is to be tuned.

    Args:
        weight: W0, (out, in).
        bias: the layer's, as it is.
        left, core, right: B, R and A, from `first_step`.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, left: Tensor, core: Tensor, right: Tensor
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_buffer("left", left.to(weight.dtype))
        self.register_buffer("right", right.to(weight.dtype))
        self.left: Tensor
        self.right: Tensor
        self.core = nn.Parameter(core.to(weight.dtype))
        self.register_parameter("bias", bias)

    @torch.no_grad()
    def materialise(self) -> Tensor:
        """W, (out, in)."""
        return torch.addmm(self.weight, self.left @ self.core, self.right)

    def _linear(self, x: Tensor) -> Tensor:
        def like(tensor: Tensor) -> Tensor:
            return tensor.to(x.dtype)

        inner = functional.linear(x, like(self.right))
        inner = functional.linear(inner, like(self.core))
        base = functional.linear(
            x, like(self.weight), None if self.bias is None else like(self.bias)
        )
        return base + functional.linear(inner, like(self.left))

    def extra_repr(self) -> str:
        """The sizes and the rank."""
        return f"{super().extra_repr()}, rank={len(self.core)}"


def first_gradients(
    weights: Mapping[str, Tensor], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """The sums of the losses' gradients at the weights, by name. `.grad` is what it was.

    Raises:
        ValueError: no losses, or a weight that they do not depend on.
    """
    required = {name: weight.requires_grad for name, weight in weights.items()}
    sums: dict[str, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in losses:
            with torch.enable_grad():
                made = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, made, strict=True):
                if gradient is None:
                    raise ValueError(
                        f"losses must depend on all layers of target, got one that does not on "
                        f"{name!r}; leave it out of target"
                    )
                sums[name] = sums[name] + gradient if name in sums else gradient
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(required[name])
    if not sums:
        raise ValueError("losses must hold a function at least, got none; pass one for each batch")
    return sums


def convert_to_lora_sb(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    target: Target = "linear",
    *,
    rank: int,
    lr: float,
) -> nn.Module:
    """Put a `LoRASBLinear` in the place of each targeted linear layer.

    Args:
        model: changed in place. What is in no such layer keeps its requires_grad.
        losses: functions that return the loss of a batch with its graph; the paper takes a
            thousandth of the training data. Gradients of the targeted layers exist for its time.
        target: which layers; as for `zoopt.lowrank.param_groups`.
        rank: r.
        lr: of the full step that W begins with; the paper's is that of training.

    Returns:
        The model. `zoopt.nn.merge` puts plain layers in their place.

    Raises:
        TypeError, ValueError: an argument out of range, nothing that matches, a layer of a kind
            that cannot be replaced, or losses without gradients. Nothing has changed then.

    Example:
        >>> first = [lambda batch=batch: model(**batch).loss for batch in batches]
        >>> zoopt.nn.convert_to_lora_sb(model, first, rank=64, lr=1e-4)
        >>> opt = zoopt.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    """
    check_positive_int("rank", rank)
    check_number("lr", lr, low=0.0, open_low=True)
    layers = linear_layers(model, target)
    for name, layer in layers.items():
        if not name or (type(layer) is not nn.Linear and not is_conv1d(layer)):
            raise TypeError(
                f"a layer to convert must be an nn.Linear or Conv1D inside the model, got "
                f"{type(layer).__name__} for {name!r}; choose layers by target without it"
            )
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    gradients = first_gradients(weights, losses)
    for name, layer in layers.items():
        weight, gradient = weights[name].detach(), gradients.pop(name)
        if is_conv1d(layer):
            weight, gradient = weight.t().contiguous(), gradient.t()
        bias: Any = layer.bias
        built = LoRASBLinear(weight, bias, *first_step(gradient, rank, lr))
        model.set_submodule(name, built.train(layer.training))
    return model


class _Core(nn.Module):
    """A, fixed, behind a core that trains: the weight R A of a LoRA's first layer."""

    def __init__(self, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("right", right)
        self.right: Tensor

    def forward(self, core: Tensor) -> Tensor:
        return core @ self.right

    def right_inverse(self, weight: Tensor) -> Tensor:
        """R of R A, A having orthonormal rows."""
        return weight @ self.right.t()


def adapt_lora_to_sb(
    model: nn.Module, losses: Iterable[Callable[[], Tensor]], *, lr: float
) -> list[tuple[str, nn.Parameter]]:
    """Make the LoRA adapters of a peft model LoRA-SB's, each of its own rank.

    Of each adapted linear layer, with peft's delta scaling B A: B is fixed, and A is R times a
    fixed A, so that only R (r, r) trains, and peft's merging goes on to work. They begin as
    `LoRASBLinear` does.

    Args:
        model: of peft, with one active adapter, of LoRA.
        losses, lr: as for `convert_to_lora_sb`.

    Returns:
        The cores R by name, which alone train.

    Raises:
        TypeError, ValueError: as for `convert_to_lora_sb`; a model without LoRA layers.
    """
    check_number("lr", lr, low=0.0, open_low=True)
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A) and hasattr(module, "base_layer")
    }
    if not found:
        raise ValueError(
            "model must have LoRA layers of peft, got none; make it by peft.get_peft_model(...)"
        )
    weights = {name: module.base_layer.weight for name, module in found.items()}
    gradients = first_gradients(weights, losses)
    model.requires_grad_(False)
    cores = []
    for name, module in found.items():
        [adapter] = module.lora_A.keys()
        down, up = module.lora_A[adapter], module.lora_B[adapter]
        gradient = gradients.pop(name)
        gradient = gradient.t() if is_conv1d(module.base_layer) else gradient
        left, core, right = first_step(gradient, down.weight.shape[0], lr)
        with torch.no_grad():
            up.weight.copy_(left / module.scaling[adapter])
            down.weight.copy_((core @ right).to(down.weight.dtype))
        parametrize.register_parametrization(down, "weight", _Core(right.to(down.weight.dtype)))
        made = down.parametrizations.weight.original
        made.requires_grad_(True)
        cores.append(made)
    own = {id(core) for core in cores}
    return [(name, param) for name, param in model.named_parameters() if id(param) in own]
