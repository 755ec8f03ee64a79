"""Parameters sharded by FSDP2: this process's part of a tensor, and its position in the whole.

An elementwise update runs on the local part like on any tensor. Its noise depends on the elements'
positions in the whole tensor, so sharding does not change a single bit.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoopt.kernels.journal import kept, once, pieces

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


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
    """A value that is sharded as the parameter is; a vector along its only dimension.

    A plain value is the whole tensor, the same in every process.
    """
    if is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    like, value = _dtensor(param), value.contiguous()
    mine = value
    if value.dim() != param.dim():
        mine = mine.narrow(0, *chunk_here(len(value), param))
    for dimension in range(value.dim()) if value.dim() == param.dim() else ():
        mine = mine.narrow(dimension, *chunk_here(value.shape[dimension], param, dimension))
    return DTensor.from_local(
        mine.contiguous().to(like.to_local().device),
        like.device_mesh,
        _placements(value.dim(), param),
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def sharded_zeros(shape: tuple[int, ...], dtype: torch.dtype, param: Tensor) -> Tensor:
    """Zeros that are sharded as the parameter is; a vector along its only dimension."""
    from torch.distributed.tensor import zeros

    mesh = _dtensor(param).device_mesh
    return zeros(*shape, dtype=dtype, device_mesh=mesh, placements=_placements(len(shape), param))


def _placements(dimensions: int, param: Tensor) -> Sequence[Placement]:
    """Of state of so many dimensions, sharded as the parameter is."""
    from torch.distributed.tensor import Shard

    placements = _dtensor(param).placements
    if dimensions == param.dim():
        return placements
    return [Shard(0) if placement.is_shard() else placement for placement in placements]


def offset(param: Tensor) -> int:
    """The position of the local part's first element in the whole tensor, row-major."""
    if not is_sharded(param):
        return 0
    firsts = [chunk_here(size, param, i)[0] for i, size in enumerate(param.shape)]
    return sum(first * math.prod(param.shape[i + 1 :]) for i, first in enumerate(firsts))


def runs(param: Tensor) -> list[int]:
    """Positions in the whole tensor, row-major, of the first elements of the runs that the local
    part consists of: one if it is sharded along its first dimension, else one for each of its rows
    (or each of several dimensions before the one along which it is sharded)."""
    inner, starts = inner_dimension(param), [0]
    for i, size in enumerate(param.shape[: inner + 1]):
        first, count = chunk_here(size, param, i)
        stride = math.prod(param.shape[i + 1 :])
        steps = [first] if i == inner else range(first, first + count)
        starts = [start + step * stride for start in starts for step in steps]
    return starts


def in_runs(part: Tensor, param: Tensor) -> list[Tensor]:
    """The runs, flat, of this process's part of a tensor of the parameter's shape: views."""
    inner = inner_dimension(param)
    return list(part.view(math.prod(part.shape[:inner]), math.prod(part.shape[inner:])).unbind())


def inner_dimension(param: Tensor) -> int:
    """The last of its own dimensions along which a DTensor is sharded; 0 if there is none."""
    placements = _dtensor(param).placements
    return max([getattr(p, "dim", 0) for p in placements], default=0)


def chunk_here(size: int, param: Tensor, dimension: int | None = None) -> tuple[int, int]:
    """Of the numbers 0 ... size - 1, divided as one of the parameter's dimensions is, the first
    that this process has, and how many those are.

    Args:
        dimension: default, that along which it is sharded.
    """
    mesh, first = _dtensor(param).device_mesh, 0
    coordinate = mesh.get_coordinate()
    for i in shard_dimensions(param, dimension):
        # Shards have ceil(size / processes) numbers; the last ones have fewer or none.
        most = -(-size // mesh.size(i))
        skipped = min(most * (coordinate[i] if coordinate else 0), size)
        first, size = first + skipped, min(most, size - skipped)
    return first, size


def shard_dimensions(param: Tensor, dimension: int | None = None) -> list[int]:
    """The dimensions of its mesh over which a DTensor is sharded, or over which that dimension of
    its own is."""
    placements = enumerate(_dtensor(param).placements)
    return [
        i for i, p in placements if p.is_shard() and (dimension is None or p.is_shard(dimension))
    ]


def layout(tensor: Tensor) -> Hashable:
    """Over which processes a sharded tensor is divided, and how."""
    return _dtensor(tensor).device_mesh, _dtensor(tensor).placements


def ranks_of(param: Tensor) -> tuple[set[int], set[int]]:
    """The ranks among which this process's part of a sharded parameter is divided from the whole,
    and those that hold parts of it at all, this one's copies among them."""
    mesh = _dtensor(param).device_mesh
    groups = [
        (placement.is_shard(), torch.distributed.get_process_group_ranks(mesh.get_group(i)))
        for i, placement in enumerate(_dtensor(param).placements)
    ]
    divided = {rank for sharded, ranks in groups if sharded for rank in ranks}
    return divided, {rank for _, ranks in groups for rank in ranks}


def rows_here(param: Tensor) -> range:
    """The rows of the whole tensor that lie in this process."""
    columns = math.prod(param.shape[1:])
    first = offset(param) // columns if columns else 0
    return range(first, first + local(param).shape[0])


def kth_smallest(values: Tensor, count: int, param: Tensor) -> Tensor:
    """The `count`-th smallest of values >= 0 that are divided over the processes as the parameter.

    Args:
        values: this process's, flat, float32.
        count: from 1.

    Returns:
        float32, (); the same in all processes. Nothing but counts is exchanged.
    """
    # The bits of floats >= 0 are ordered as the floats are. They are found a byte at a time.
    bits, found = values.view(torch.int32), 0
    for shift in (24, 16, 8, 0):
        bytes_here = (bits >> shift) & 255
        counts = torch.bincount(bytes_here, minlength=256)
        sum_(counts, param)
        up_to = counts.cumsum(0)
        byte = int((up_to < count).sum())
        count -= int(up_to[byte] - counts[byte])
        bits = bits[bytes_here == byte]
        found |= byte << shift
    return torch.tensor(found, dtype=torch.int32, device=values.device).view(torch.float32)


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
    number = kept(torch.tensor, int(flag), device=local(param).device)
    greatest_(number, param)
    return bool(number)


def greatest_(values: Tensor, param: Tensor) -> None:
    """Replace each value by its maximum over the processes that hold a part of the parameter."""
    mesh = _dtensor(param).device_mesh
    for i in pieces(range(mesh.ndim)):
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, mesh.get_group(i))


def sum_(values: Tensor, param: Tensor) -> None:
    """Replace each value by its sum over the parts of a sharded parameter."""
    mesh = _dtensor(param).device_mesh
    for i in pieces(shard_dimensions(param)):
        torch.distributed.all_reduce(values, group=mesh.get_group(i))


class Rows:
    """The rows that this process has of a sharded parameter, and of tensors sharded alike.

    Attributes:
        param: the parameter.
        count: of all rows.
    """

    def __init__(self, param: Tensor) -> None:
        self.param, self.count = param, param.shape[0] if param.dim() else 1

    def total(self, values: Tensor) -> Tensor:
        """The sum of each process's values, which are not used afterwards."""
        values = kept(values.contiguous)
        sum_(values, self.param)
        return values

    def norm(self, norm: Tensor) -> Tensor:
        """The norm of all rows, from each process's."""
        return self.total(norm.square()).sqrt()

    def greatest_(self, values: Tensor) -> None:
        """Replace each value by its maximum over the processes."""
        greatest_(values, self.param)

    @property
    def first(self) -> int:
        """The number of this process's first row."""
        return chunk_here(self.count, self.param)[0]

    def mine(self, values: Tensor) -> Tensor:
        """This process's rows of a tensor that has them all."""
        first, count = chunk_here(self.count, self.param)
        return values[first : first + count]

    def gathered(self, values: Tensor) -> Tensor:
        """The rows of all processes, from each process's: float32 or float64, bit for bit."""
        every = values.new_zeros(self.count, *values.shape[1:])
        self.mine(every).copy_(values)
        return self.assembled(every)

    def assembled(self, values: Tensor) -> Tensor:
        """The values of all processes, of which each has some and zeros elsewhere: float32 or
        float64, contiguous, and bit for bit."""
        values = kept(lambda: values)
        # As integers: the sum of a negative zero and a zero would be another zero.
        sum_(values.view(torch.int64 if values.itemsize == 8 else torch.int32), self.param)
        return values


def whole(tensor: Tensor) -> Tensor:
    """Gather a whole sharded tensor in this process."""
    full: Tensor = once(_dtensor(tensor).full_tensor)
    return full


def is_owner(param: Tensor, number: int) -> bool:
    """Whether this process, of those that share the parameter, is the one that owns `number`."""
    mesh = _dtensor(param).device_mesh
    coordinate = mesh.get_coordinate() or ()
    return all(own == number % mesh.size(i) for i, own in enumerate(coordinate))


def broadcast_(values: Tensor, param: Tensor, number: int) -> None:
    """Broadcast the values from the owner of `number` to all processes."""
    mesh = _dtensor(param).device_mesh
    for i in pieces(range(mesh.ndim)):
        group = mesh.get_group(i)
        torch.distributed.broadcast(values, group=group, group_src=number % mesh.size(i))


def check_placement(param: Tensor, name: str | int) -> None:
    """Raise unless this process has a part of the parameter, or a copy."""
    if not is_sharded(param):
        return
    from torch.distributed.tensor import Replicate, Shard

    for placement in _dtensor(param).placements:
        # Subclasses of Shard are refused, because their shards can interleave.
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"a parameter must be sharded by Shard or replicated, got {placement!r} for "
                f"{name!r}; use fully_shard on its own"
            )


def _dtensor(tensor: Tensor) -> DTensor:
    return tensor  # type: ignore[return-value]
