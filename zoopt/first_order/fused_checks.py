"""Checks of a fused backward pass: no wrappers that keep gradients, no scaled gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.first_order.checks import check_values
from zoopt.first_order.site import Site

#: Wrappers under which a hook sees gradients before they have been summed over the processes.
#: (`fully_shard` calls the hooks of its shards after that.)
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}


def check_model(model: nn.Module) -> None:
    """Raise if the model, or a part of it, is wrapped in DDP or FSDP."""
    for module in model.modules():
        wrappers = _WRAPPERS & {cls.__name__ for cls in type(module).__mro__}
        if wrappers:
            _refuse(wrappers.pop())


def check_not_replicated(model: nn.Module, inputs: Any) -> None:
    """Checked before each forward pass, since the model may be wrapped in DDP after it was
    fused."""
    if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
        _refuse("DistributedDataParallel")


def _refuse(wrapper: str) -> NoReturn:
    raise ValueError(
        f"model must not be wrapped in DDP or FSDP, got {wrapper}: it keeps all gradients until "
        f"the backward pass has ended; use fully_shard, over a mesh of (processes, 1) for whole "
        f"parameters in every process, or leave the backward unfused"
    )


def check_sites(sites: Iterable[Site], model: nn.Module) -> None:
    """Raise unless the parameters are the model's own, and have values."""
    known = set(model.parameters())
    for site in sites:
        check_values(site)
        if site.param not in known:
            raise ValueError(
                f"optimizer must hold parameters of the model only, got {site.name!r}, which "
                f"is not one; pass the module that holds all of them"
            )


def check_unscaled(optimizer: FirstOrderOptimizer) -> None:
    """Raise if a GradScaler calls the step: it has left its scale on the optimizer."""
    if hasattr(optimizer, "grad_scale"):
        for left in ("grad_scale", "found_inf"):
            delattr(optimizer, left)
        raise RuntimeError(
            "a GradScaler cannot drive a fused backward, got one: its scaled gradients have "
            "been applied; train in bfloat16 without a scaler, or unfused"
        )
