"""LoRA-SB: an r x r matrix trains between two fixed bases, taken from the first full step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from zoopt.checks import check_number, check_positive_int
from zoopt.dtypes import accumulator_dtype
from zoopt.nn.linear import ReparametrisedLinear, check_replaceable
from zoopt.nn.losses import functions
from zoopt.nn.losses import gradients as loss_gradients
from zoopt.nn.modules import Target, is_conv1d, linear_layers, named


def first_step(gradient: Tensor, rank: int, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factor the first step of Adam, -lr sign(G): B R A is its best approximation of rank r.

    Args:
        gradient: G (m, n), the sum over the first batches.

    Returns:
        B (m, r) with orthonormal columns, R (r, r) diagonal, and A (r, n) with orthonormal rows.
    """
    wide = gradient.to(accumulator_dtype(gradient.dtype))
    u, s, vh = torch.linalg.svd(wide.sign() * -lr, full_matrices=False)
    return u[:, :rank].contiguous(), torch.diag(s[:rank]), vh[:rank].contiguous()


class LoRASBLinear(ReparametrisedLinear):
    r"""A linear layer with W = W0 + B R A (Ponkshe et al., 2024, arXiv:2411.19557).

    B (out, r) has orthonormal columns and A (r, in) orthonormal rows. Both are fixed, and so is W0.
    Only the r^2 elements of R (r, r) train. B and A are the leading singular vectors of the first
    step of full training, and R starts with its singular values. W therefore starts as W0 plus the
    best approximation of rank r to that step.

    B and A are orthonormal. So dL/dR = B^T (dL/dW) A^T is the projection of the gradient onto the
    bases, and a step of R is a step of W of the same size. There is no scale to tune.

    Args:
        weight: W0, (out, in).
        bias: the layer's bias, used as it is.
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
    """Sum the losses' gradients with respect to the weights, by name, without touching `.grad`.

    Raises:
        ValueError: there are no losses, or one returns no loss with a graph, does not depend on one
            of the weights, or has gradients that are not finite.
    """
    required = {name: weight.requires_grad for name, weight in weights.items()}
    sums: dict[str, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in functions(losses):
            made = loss_gradients(loss, [*weights.values()])
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
    for name, gradient in sums.items():
        if not gradient.isfinite().all():
            raise ValueError(
                f"losses must have finite gradients, got one that is not for {name!r}; leave out "
                f"batches of which the model makes infinities or NaN"
            )
    return sums


def convert_to_lora_sb(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    target: Target = "linear",
    *,
    rank: int,
    lr: float,
) -> nn.Module:
    """Replace each targeted linear layer with a `LoRASBLinear`.

    Args:
        model: changed in place. Other parameters keep their requires_grad.
        losses: functions that each return the loss of a batch with its graph. The paper uses a
            thousandth of the training data. The gradients of the targeted layers are in memory
            during the conversion.
        target: which layers; as for `zoopt.lowrank.param_groups`.
        rank: r.
        lr: learning rate of the initial full step. The paper uses the learning rate of training.

    Returns:
        The model. `zoopt.nn.merge` turns the layers into plain ones.

    Raises:
        TypeError, ValueError: an argument is out of range, no layer matches, a layer cannot be
            replaced, or a loss has no gradient. The model is then unchanged.

    Example:
        >>> first = [lambda batch=batch: model(**batch).loss for batch in batches]
        >>> zoopt.nn.convert_to_lora_sb(model, first, rank=64, lr=1e-4)
        >>> opt = zoopt.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    """
    check_positive_int("rank", rank)
    check_number("lr", lr, low=0.0, open_low=True)
    layers = linear_layers(model, target)
    check_replaceable(layers)
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
    """The weight R A of a LoRA's first layer, with a trained core R and a fixed A."""

    def __init__(self, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("right", right)
        self.right: Tensor

    def forward(self, core: Tensor) -> Tensor:
        return core @ self.right.to(core.dtype)  # peft may cast one of them.

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Recover R from R A; the rows of A are orthonormal."""
        return weight @ self.right.t().to(weight.dtype)


_CORE, _RIGHT = "parametrizations.weight.original", "parametrizations.weight.0.right"


def _add_product(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Add R A to a LoRA's state dict under the name of peft's weight, which peft loads."""
    state_dict[f"{prefix}weight"] = module.weight.detach()  # type: ignore[operator]


def _take_product(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load R and A, or if only their product is there, factors of it.

    In a file of peft, R and A have the adapter's name twice.
    """
    product = state_dict.pop(f"{prefix}weight", None)
    adapter = prefix.split(".")[-2] if prefix else ""
    for name in (_CORE, _RIGHT):
        moved = state_dict.pop(f"{prefix}{adapter}.{name}", None)
        if moved is not None:
            state_dict.setdefault(f"{prefix}{name}", moved)
    if product is None or any(f"{prefix}{name}" in state_dict for name in (_CORE, _RIGHT)):
        return
    wide = product.to(accumulator_dtype(product.dtype))
    right = module.get_buffer(_RIGHT).to(wide.dtype)
    core = wide @ right.t()
    if (core @ right - wide).norm() > torch.finfo(product.dtype).eps ** 0.5 * wide.norm():
        u, s, right = torch.linalg.svd(wide, full_matrices=False)
        core = u * s
    for name, value in ((_CORE, core), (_RIGHT, right)):
        state_dict[f"{prefix}{name}"] = value.to(product.dtype)


def adapt_lora_to_sb(
    model: nn.Module, losses: Iterable[Callable[[], Tensor]], *, lr: float
) -> list[tuple[str, nn.Parameter]]:
    """Turn the LoRA adapters of a peft model into LoRA-SB adapters; each keeps its rank.

    The update of an adapted layer in peft is scaling B A. Here B is fixed, and peft's A becomes R
    times a fixed matrix. Only R (r, r) trains, and merging in peft still works. The initial values
    are those of `LoRASBLinear`. State dicts have the product of R and that matrix too, so that peft
    loads what `save_pretrained` has saved as a plain LoRA. In a model that this function has
    adapted, a loaded R continues bit for bit.

    Args:
        model: a peft model with one LoRA adapter, which is new: its product B A is 0, and it is not
            merged.
        losses, lr: as for `convert_to_lora_sb`.

    Returns:
        The cores R by name. Nothing else trains.

    Raises:
        TypeError, ValueError: as for `convert_to_lora_sb`; or the model has no LoRA layers, several
            adapters, adapters that are not new, or a variant such as DoRA. The model is then
            unchanged.
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
    for name, module in found.items():
        _check_adapter(name, module)
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
        down.register_state_dict_post_hook(_add_product)
        down.register_load_state_dict_pre_hook(_take_product)
        made = down.parametrizations.weight.original
        made.requires_grad_(True)
        cores.append(made)
    return named(model, cores)


def _check_adapter(name: str, module: Any) -> None:
    """Raise unless the LoRA layer of peft can be adapted without losing anything."""
    base, adapters = module.base_layer, list(module.lora_A.keys())
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        raise TypeError(
            f"model must have an nn.Linear or Conv1D under each adapter, got "
            f"{type(base).__name__} for {name!r}; leave it out of the adapter's target_modules"
        )
    if len(adapters) > 1:
        raise ValueError(
            f"model must have one adapter, got {', '.join(adapters)} for {name!r}; delete the "
            f"others"
        )
    variants = list(getattr(module, "lora_variant", {}).values())
    if variants:
        raise ValueError(
            f"model must have plain LoRA adapters, got a {type(variants[0]).__name__} for "
            f"{name!r}; leave the variant out of LoraConfig"
        )
    if module.merged:
        raise ValueError(
            f"model must have adapters that are not merged, got one for {name!r} that is; call "
            f"unmerge_adapter() first"
        )
    factors = (module.lora_A[adapters[0]].weight, module.lora_B[adapters[0]].weight)
    if len(factors[0]) > min(base.weight.shape):
        raise ValueError(
            f"rank must be at most {min(base.weight.shape)}, the smaller side of {name!r}, got "
            f"{len(factors[0])}; pass a smaller r in LoraConfig"
        )
    if all(factor.detach().any() for factor in factors):
        raise ValueError(
            f"model must have new adapters, got one for {name!r} that has changed the weight, "
            f"which would be lost; merge it, and add a new one with init_lora_weights=True"
        )
