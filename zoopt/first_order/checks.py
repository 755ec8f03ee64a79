"""Checks of a first-order step: values, gradients, and how parameters are sharded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoopt.distributed.sharding import check_placement, inner_dimension, is_sharded
from zoopt.first_order.site import Site
from zoopt.optimizer import Group
from zoopt.parameters import is_wrapper
from zoopt.registry import rows


def check_values(site: Site) -> None:
    """Raise if the parameter has no values here, since a step would silently skip it."""
    if site.param.is_meta:
        raise RuntimeError(
            f"parameter {site.name!r} must hold values, got one on the meta device; load the "
            f"model before the optimizer is made, and instead of accelerate's cpu_offload or "
            f"disk_offload use fully_shard(..., offload_policy=CPUOffloadPolicy())"
        )


def check_gradient(site: Site, name: str) -> None:
    """Raise unless updates of the class of that name can read the parameter's gradient."""
    gradient = site.param.grad
    if gradient is None:
        return
    sharded = is_sharded(gradient)
    if sharded != is_sharded(site.param) or (is_wrapper(gradient) and not sharded):
        raise RuntimeError(
            f"{name} needs a gradient of its parameter's kind, "
            f"{type(site.param).__name__}, got {type(gradient).__name__} for parameter "
            f"{site.name!r}; pass a plain tensor, or for a DTensor parameter a DTensor"
        )
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"{name} needs dense gradients, got layout {gradient.layout} "
            f"for parameter {site.name!r}; use an embedding with sparse=False, or zoopt.SM3"
        )


def check_shards(group: Group, can_shard: Callable[[Tensor, Group], bool], name: str) -> None:
    """Raise if a parameter of the group is sharded in a way that the class of that name, with its
    `_can_shard`, does not support."""
    names = group.get("param_names", range(len(group["params"])))
    for param, own in zip(group["params"], names, strict=True):
        if not is_sharded(param):
            continue
        check_placement(param, own)
        if inner_dimension(param) and not can_shard(param, group):
            raise ValueError(
                f"{name} must have parameters sharded along dimension 0 under "
                f"these hyperparameters, got dimension {inner_dimension(param)} for {own!r}; "
                f"use AdamW with state_dtype 'float32' or 'bfloat16', a group with rank=None, "
                f"or SM3 (in 16 bits with rounding='nearest')"
            )
        if not can_shard(param, group):
            raise ValueError(
                f"{name} must have whole parameters under these "
                f"hyperparameters, got {own!r}, which is sharded; use one of "
                f"{', '.join(_sharding_classes())}, without matrices in its group, or keep the "
                f"parameter out of fully_shard"
            )


def _sharding_classes() -> list[str]:
    """The names of the classes that update sharded parameters."""
    return [row.cls.__name__ for row in rows() if getattr(row.cls, "shards", False)]
