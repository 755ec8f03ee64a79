"""The changes of a sparse run as a small delta: extract it, apply it to the base, remove it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zoopt.nn.sparse_delta import SparseDeltaLinear, tap_of
from zoopt.selection.growth import State
from zoopt.selection.spiel import SparseDeltaAdamW

Delta = dict[str, dict[str, Tensor]]


def _entries(optimizer: SparseDeltaAdamW) -> Iterator[tuple[str, Tensor, State]]:
    for site in optimizer._sites():
        state = optimizer.state.get(site.param)
        if state and int(state["step"]):
            yield str(site.name), site.param, state


def sparse_delta(optimizer: SparseDeltaAdamW) -> Delta:
    """Extract what the run has changed.

    The delta has, for each parameter by name, the `index` (row-major) of each entry that differs
    from its base, its `value`, and its `base` value. For a layer with a delta beside its weight,
    the name is that of the weight, `value` is the difference from it, and there is no `base`.
    `torch.load(..., weights_only=True)` can load it.

    Raises:
        ValueError: parameters have no names.
    """
    found: Delta = {}
    for name, param, state in _entries(optimizer):
        if any("param_names" not in group for group in optimizer.param_groups):
            raise ValueError(
                "the optimizer's parameters must have names, got some without; pass "
                "model.named_parameters()"
            )
        tap = tap_of(param)
        if tap is not None:
            found[f"{name.removesuffix('delta')}weight"] = _beside(tap.layer)
            continue
        index, order = state["index"].sort()
        value, base = param.detach().reshape(-1)[index.long()], state["base"][order]
        changed = value != base
        found[name] = {"index": index[changed], "value": value[changed], "base": base[changed]}
    return found


def _beside(layer: SparseDeltaLinear) -> dict[str, Tensor]:
    """The positions and values of a layer's delta that are not 0, ascending."""
    index, order = layer.index.sort()
    value = layer.delta.detach()[order]
    return {"index": index[value != 0], "value": value[value != 0]}


def apply_delta(model: nn.Module, delta: Delta) -> None:
    """Apply a delta to its base: write its values to the model, bit for bit.

    Layers whose delta lies beside their weight become `zoopt.nn.SparseDeltaLinear` layers.

    Raises:
        ValueError: the model has other parameters, or it is not the base because an entry differs
            from its base value. Nothing has changed then.
    """
    _replace(model, delta, "base", "value")


def remove_delta(model: nn.Module, delta: Delta) -> None:
    """Remove a delta: the inverse of `apply_delta`, bit for bit. It raises the same errors."""
    _replace(model, delta, "value", "base")


@torch.no_grad()
def _replace(model: nn.Module, delta: Delta, old: str, new: str) -> None:
    params = dict(model.named_parameters())
    beside = {name: own for name, own in delta.items() if "base" not in own}
    delta = {name: own for name, own in delta.items() if "base" in own}
    layers = {
        name: _replaced(model, name, own, adds=new == "value") for name, own in beside.items()
    }
    for name, own in delta.items():
        if name not in params:
            raise ValueError(
                f"model must have the parameters of the delta, got none named {name!r}; load the "
                f"model that it belongs to"
            )
        index = own["index"].long()
        flat = params[name].detach().reshape(-1)
        if index.numel() and int(index.max()) >= flat.numel():
            raise ValueError(
                f"model must have parameters of the delta's sizes, got {flat.numel()} elements of "
                f"{name!r}, which has an entry {int(index.max())}"
            )
        if not torch.equal(flat[index.to(flat.device)], own[old].to(flat)):
            raise ValueError(
                f"model must hold what the delta {'was trained on' if old == 'base' else 'made'}, "
                f"got other entries of {name!r}; load the model that it belongs to"
            )
    for name, layer in layers.items():
        model.set_submodule(name.removesuffix(".weight"), layer)
    for name, own in delta.items():
        param = params[name].detach()
        flat = param.reshape(-1)
        flat[own["index"].long().to(flat.device)] = own[new].to(flat)
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


def _replaced(model: nn.Module, name: str, own: dict[str, Tensor], *, adds: bool) -> nn.Module:
    """The layer that takes the place of the one with that weight: with the delta, or its base."""
    modules = dict(model.named_modules())
    layer = modules.get(name.removesuffix(".weight"))
    if layer is None:
        raise ValueError(
            f"model must have the layers of the delta, got none for {name!r}; load the model that "
            f"it belongs to"
        )
    if isinstance(layer, SparseDeltaLinear) is adds:
        raise ValueError(
            f"model must {'not ' * adds}have the delta of {name!r} yet; "
            f"{'remove' if adds else 'apply'} it first"
        )
    if isinstance(layer, SparseDeltaLinear):
        held = _beside(layer)
        if any(not torch.equal(held[key].cpu(), own[key].cpu()) for key in held):
            raise ValueError(
                f"model must hold what the delta made, got other entries of {name!r}; load the "
                f"model that it belongs to"
            )
        return layer.base
    made = SparseDeltaLinear(layer, entries=own["index"].numel())
    if own["index"].numel() and int(own["index"].max()) >= made.in_features * made.out_features:
        raise ValueError(
            f"model must have layers of the delta's sizes, got {made.out_features} x "
            f"{made.in_features} for {name!r}, which has an entry {int(own['index'].max())}"
        )
    made.place(own["index"])
    made.delta.copy_(own["value"])
    return made.train(layer.training)
