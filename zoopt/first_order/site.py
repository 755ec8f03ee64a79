"""A parameter's place in a first-order step, and what several parameters have in common."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from zoopt.distributed.sharding import Rows, is_sharded, local, offset
from zoopt.dtypes import resolved_rounding
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import is_fake, launches
from zoopt.kernels.noise.key import NoiseKey
from zoopt.lasting import prepared
from zoopt.noise import stream
from zoopt.optimizer import Group


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter, its group, and its place among all parameters.

    Attributes:
        name: the parameter's name, or its position if it has none.
        position, count: its number among the optimizer's parameters, and how many there are.
        continues: whether the step has already been prepared, or one of its micro-batches reduced.
            Whatever the reduction uses, such as a basis, then stays the same.
        offset: for a shard, the position of its first element in the whole parameter.
        sharded: for a shard, that parameter.
        stack: of a matrix in a stack, the parameter that is the stack.
    """

    param: Tensor
    group: Group
    name: str | int
    position: int
    count: int
    continues: bool = False
    offset: int = 0
    sharded: Tensor | None = None
    stack: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """The parameter, or the one that it is a shard of."""
        return self.param if self.sharded is None else self.sharded

    @property
    def rows(self) -> Rows | None:
        """The rows that a shard has."""
        return None if self.sharded is None else Rows(self.sharded)

    @property
    def shard(self) -> Site:
        """This process's part of a sharded parameter."""
        param = self.param
        return dataclasses.replace(self, param=local(param), offset=offset(param), sharded=param)

    @property
    def seed(self) -> int:
        """The run's seed."""
        seed: int = self.group["seed"]
        return seed

    @property
    def stream(self) -> int:
        """The stream of the parameter's noise."""
        return stream(self.name)

    @property
    def key(self) -> NoiseKey:
        """The parameter's noise."""
        return _key(self.seed, self.name, self.offset)

    def rounding_draw(self, step: int) -> int | None:
        """The draw whose bits round the weights in this step, or None for rounding to nearest."""
        rounding = resolved_rounding(self.group["rounding"], self.param.dtype)
        return draw_of(step) if rounding == "stochastic" else None


@functools.lru_cache(maxsize=1 << 16)
def _key(seed: int, name: str | int, offset: int) -> NoiseKey:
    return NoiseKey(seed, stream(name), offset)


def draw_of(number: int) -> int:
    """The draw of that number, modulo 2^32."""
    return number & 0xFFFFFFFF


def batch_kind(site: Site, gradient: Tensor, *states: Tensor) -> Hashable:
    """The group, dtypes and device of a parameter that can be in a batch, and the dtypes and
    numbers of these of its states; None for one that cannot."""
    param = site.param
    planned = is_fake(param) and not launches(param)
    alone = is_sharded(param) or planned or not param.is_contiguous()
    if alone or gradient.layout != torch.strided or not param.numel():
        return None
    kinds = tuple(s.item() if not s.dim() and s.device.type == "cpu" else s.dtype for s in states)
    return id(site.group), param.dtype, gradient.dtype, param.device, kinds


def tied_by_data(params: Sequence[Tensor]) -> set[int]:
    """The numbers of contiguous parameters without which no two of them share memory."""
    spans, reached, tied = [], 0, set[int]()
    for i, param in enumerate(params):
        start = id(param) if is_fake(param) else param.data_ptr()
        spans.append((start, start + (1 if is_fake(param) else param.nbytes), i))
    for start, end, i in sorted(spans):
        if start < reached:
            tied.add(i)
        else:
            reached = end
    return tied


def batch_of(sites: Sequence[Site]) -> Batch:
    """The parameters with their noise."""

    def batch() -> Batch:
        return Batch([site.param for site in sites], [site.key for site in sites])

    return prepared(sites, "batch", batch)


def gradient_of(site: Site) -> Tensor:
    """The gradient of a parameter that has one."""
    assert site.param.grad is not None
    return site.param.grad


def operand(gradient: Tensor) -> Tensor:
    """The gradient with its values contiguous, as updates read it; sparse ones as they are."""
    if gradient.layout != torch.strided:
        return gradient
    return gradient.resolve_neg().contiguous()


def betas_of(group: Group) -> tuple[float, float]:
    """The group's betas as numbers; like torch we accept tensors of one element."""
    first, second = group["betas"]
    return float(first), float(second)


def descent_rate(group: Group) -> float:
    """The factor of a direction: -lr, or lr if the objective is maximised."""
    return float(group["lr"]) * (1.0 if group["maximize"] else -1.0)
