"""Parameters sharded by FSDP2: this process's part of a tensor, and its position in the whole.

An elementwise update runs on the local part like on any tensor. Its noise depends on the elements'
positions in the whole tensor, so sharding does not change a single bit.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Any) -> bool:
    """Whether the tensor is a DTensor."""
    # Do not import the module: that is slow, and a program with a DTensor has already imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of the tensor, without a copy; for a plain tensor, the tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = _dtensor(tensor).to_local()
    return part


def local_like(value: Tensor, param: Tensor) -> Tensor:
    """The part of a value that corresponds to this process's part of the parameter, contiguous."""
    if is_sharded(value) and is_sharded(param):
        placements = _dtensor(param).placements
        if _dtensor(value).placements != placements:
            value = _dtensor(value).redistribute(placements=placements)
    return local(value).contiguous()


def sharded_as(value: Tensor, param: Tensor) -> Tensor:
    """A value with as many rows as the sharded parameter, sharded like it.

    A plain value is the whole tensor, the same in every process.
    """
    if is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    like, value = _dtensor(param), value.contiguous()
    part = like.to_local()
    first = offset(param) // max(math.prod(param.shape[1:]), 1)
    mine = value[first : first + part.shape[0]].to(part.device)
    return DTensor.from_local(
        *(mine, like.device_mesh, like.placements),
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def sharded_zeros(shape: tuple[int, ...], dtype: torch.dtype, param: Tensor) -> Tensor:
    """Zeros with as many rows as the sharded parameter, sharded like it."""
    from torch.distributed.tensor import zeros

    whole = _dtensor(param)
    return zeros(*shape, dtype=dtype, device_mesh=whole.device_mesh, placements=whole.placements)


def offset(param: Tensor) -> int:
    """The position of the local part's first element in the whole tensor, row-major."""
    if not is_sharded(param) or not param.dim():
        return 0
    whole = _dtensor(param)
    coordinate = whole.device_mesh.get_coordinate()
    first, rows = 0, param.shape[0]
    for i, placement in enumerate(whole.placements):
        if placement.is_shard():
            # Shards have ceil(rows / size) rows; the last ones have fewer or none.
            size = -(-rows // whole.device_mesh.size(i))
            skipped = min(size * (coordinate[i] if coordinate else 0), rows)
            first, rows = first + skipped, min(size, rows - skipped)
    return first * math.prod(param.shape[1:])


@contextlib.contextmanager
def regathered() -> Iterator[None]:
    """Make FSDP gather parameters again in forward passes inside this context, and free them after.

    Outside of training FSDP keeps the gathered parameters of a root module, and would not notice
    that their shards have changed.
    """
    from torch.distributed.fsdp import FSDPModule

    gathered: list[Any] = []

    def release(module: torch.nn.Module, args: Any) -> None:
        if isinstance(module, FSDPModule) and module not in gathered:
            gathered.append(module)
            module.reshard()

    handle = torch.nn.modules.module.register_module_forward_pre_hook(release)
    try:
        yield
    finally:
        handle.remove()
        for module in gathered:
            module.reshard()


def anywhere(flag: bool, param: Tensor) -> bool:
    """Whether the flag is set in any process that holds a part of the parameter."""
    if not is_sharded(param):
        return flag
    number = torch.tensor(int(flag), device=local(param).device)
    greatest_(number, param)
    return bool(number)


def greatest_(values: Tensor, param: Tensor) -> None:
    """Replace each value by its maximum over the processes that hold a part of the parameter."""
    mesh = _dtensor(param).device_mesh
    for i in range(mesh.ndim):
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, mesh.get_group(i))


def sum_(values: Tensor, param: Tensor) -> None:
    """Replace each value by its sum over the parts of a sharded parameter."""
    mesh = _dtensor(param).device_mesh
    for i, placement in enumerate(_dtensor(param).placements):
        if placement.is_shard():
            torch.distributed.all_reduce(values, group=mesh.get_group(i))


def whole(tensor: Tensor) -> Tensor:
    """Gather a whole sharded tensor in this process."""
    full: Tensor = _dtensor(tensor).full_tensor()
    return full


def is_owner(param: Tensor, number: int) -> bool:
    """Whether this process, of those that share the parameter, is the one that owns `number`."""
    mesh = _dtensor(param).device_mesh
    coordinate = mesh.get_coordinate() or ()
    return all(own == number % mesh.size(i) for i, own in enumerate(coordinate))


def broadcast_(values: Tensor, param: Tensor, number: int) -> None:
    """Broadcast the values from the owner of `number` to all processes."""
    mesh = _dtensor(param).device_mesh
    for i in range(mesh.ndim):
        group = mesh.get_group(i)
        torch.distributed.broadcast(values, group=group, group_src=number % mesh.size(i))


def check_placement(param: Tensor, name: str | int) -> None:
    """Raise unless the local part is a contiguous run of the whole tensor's rows."""
    if not is_sharded(param):
        return
    from torch.distributed.tensor import Replicate, Shard

    for placement in _dtensor(param).placements:
        # Subclasses of Shard are refused, because their shards can interleave.
        if type(placement) is Shard and placement.dim:
            raise ValueError(
                f"a sharded parameter must be sharded along dimension 0, got dimension "
                f"{placement.dim} for {name!r}; use fully_shard without a shard_placement_fn"
            )
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"a parameter must be sharded by Shard(0) or replicated, got {placement!r} for "
                f"{name!r}; use fully_shard on its own"
            )


def _dtensor(tensor: Tensor) -> DTensor:
    return tensor  # type: ignore[return-value]
