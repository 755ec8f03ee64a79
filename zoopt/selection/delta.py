"""The changes of a sparse run as a small delta: extract it, apply it to the base, remove it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zoopt.nn.sparse_delta import SparseDeltaLinear, checked_base, tap_of
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
    for name, own in beside.items():
        _check_beside(model, name, own, adds=new == "value")
    for name, own in delta.items():
        if name not in params:
            raise ValueError(
                f"model must have the parameters of the delta, got none named {name!r}; load the "
                f"model that it belongs to"
            )
        index = own["index"].long()
        flat = params[name].detach().reshape(-1)
        if (entry := _outside(index, flat.numel())) is not None:
            raise ValueError(
                f"model must have parameters of the delta's sizes, got {flat.numel()} elements of "
                f"{name!r}, which has an entry {entry}"
            )
        if not torch.equal(flat[index.to(flat.device)], own[old].to(flat)):
            raise ValueError(
                f"model must hold what the delta {'was trained on' if old == 'base' else 'made'}, "
                f"got other entries of {name!r}; load the model that it belongs to"
            )
    for name, own in beside.items():
        path = name.removesuffix(".weight")
        model.set_submodule(path, _replaced(model.get_submodule(path), own))
    for name, own in delta.items():
        param = params[name].detach()
        flat = param.reshape(-1)
        flat[own["index"].long().to(flat.device)] = own[new].to(flat)
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


def _outside(index: Tensor, size: int) -> int | None:
    """An index that is none of `size` elements; None if there is none."""
    outside = index[(index < 0) | (index >= size)]
    return int(outside[0]) if outside.numel() else None


def _check_beside(model: nn.Module, name: str, own: dict[str, Tensor], *, adds: bool) -> None:
    """Raise unless the layer with that weight can get the delta, or has it to be removed."""
    layer = dict(model.named_modules()).get(name.removesuffix(".weight"))
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
        return
    m, n, _ = checked_base(layer)
    if (entry := _outside(own["index"], m * n)) is not None:
        raise ValueError(
            f"model must have layers of the delta's sizes, got {m} x {n} for {name!r}, which has "
            f"an entry {entry}"
        )


def _replaced(layer: nn.Module, own: dict[str, Tensor]) -> nn.Module:
    """The layer with the delta beside its weight; or the base of one that has it."""
    if isinstance(layer, SparseDeltaLinear):
        return layer.base
    made = SparseDeltaLinear(layer, entries=own["index"].numel())
    made.place(own["index"])
    made.delta.copy_(own["value"])
    return made.train(layer.training)
