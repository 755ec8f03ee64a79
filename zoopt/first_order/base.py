"""Shared by all first-order optimizers: groups, the loop over gradients, the seed, rounding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from zoopt.ambient import OwnArithmetic, opaque
from zoopt.checks import check_bool, check_choice, check_number
from zoopt.distributed.checkpoint import asks_for_state
from zoopt.distributed.sharding import (
    Rows,
    check_placement,
    inner_dimension,
    is_sharded,
    local,
    local_like,
    offset,
)
from zoopt.dtypes import RoundingMode, resolved_rounding
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.noise.key import NoiseKey
from zoopt.noise import NOISE_VERSION, stream
from zoopt.optimizer import DeclaredStateOptimizer, Group, Params
from zoopt.parameters import check_param, is_wrapper, named_params
from zoopt.registry import rows


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
    """

    param: Tensor
    group: Group
    name: str | int
    position: int
    count: int
    continues: bool = False
    offset: int = 0
    sharded: Tensor | None = None

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

    @functools.cached_property
    def key(self) -> NoiseKey:
        """The parameter's noise."""
        return NoiseKey(self.seed, self.stream, self.offset)

    def rounding_draw(self, step: int) -> int | None:
        """The draw whose bits round the weights in this step, or None for rounding to nearest."""
        rounding = resolved_rounding(self.group["rounding"], self.param.dtype)
        return draw_of(step) if rounding == "stochastic" else None


def draw_of(number: int) -> int:
    """The draw of that number, modulo 2^32."""
    return number & 0xFFFFFFFF


class Mark:
    """How far a parameter has come in the step from a gradient."""

    def __init__(self, gradient: Tensor) -> None:
        self._gradient, self._version = weakref.ref(gradient), gradient._version
        self.prepared = self.done = False

    def is_of(self, gradient: Tensor) -> bool:
        """Whether it was made for this gradient, which has not been written since."""
        return self._gradient() is gradient and gradient._version == self._version


class Fusion(Protocol):
    """The interface of `zoopt.fuse_backward`, which replaces the step."""

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Finish the updates that backward has not done."""

    def discard(self) -> None:
        """Drop gradients that have arrived and not been applied."""


class FirstOrderOptimizer(DeclaredStateOptimizer):
    """Updates each parameter from its gradient: `_reduce` it to what is needed, then `_apply` that.

    The two are separate so that the gradient can be freed between them (`zoopt.fuse_backward`), and
    so that results of `_reduce` can be summed over micro-batches. Randomness (of stochastic
    rounding, of random projections) is a function of `seed`, the parameter's name or position, and
    its step.
    """

    _fusion: Fusion | None = None
    #: How far each parameter had come in a step that an error ended. A copy has none.
    _begun: dict[Tensor, Mark] | None = None
    #: Whether parameters whose rows are sharded over processes can be updated.
    shards = False

    def __init__(self, params: Params, defaults: dict[str, Any], *, seed: int | None) -> None:
        run = {"seed": self._share_seed(seed), "noise_version": NOISE_VERSION}
        super().__init__(params, {**defaults, **run})

    @opaque
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the loss and its gradients again, and returns the loss.

        Returns:
            What the closure returned, or None.

        Linear algebra that can fail comes first, for all parameters. An error after that, if memory
        runs out say, leaves those updated that have been; called again with the same gradients, a
        step goes on with the others.

        Raises:
            RuntimeError: a gradient is sparse; a parameter no longer has its state's shape, or has
                no values; or processes have different seeds. Nothing has changed then.
        """
        if asks_for_state(self):
            self._make_state()
            return None
        self._check_seed()
        if self._fusion is not None:
            return self._fusion.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with OwnArithmetic():
            self._step()
        return loss

    def _step(self) -> None:
        self._check_state()
        sites = []
        for site in self._sites():
            check_values(site)
            if site.param.grad is not None:
                self._check_gradient(site)
                sites.append(site)
        for site in sites:
            # If memory runs out, it does so before anything has changed.
            self._state(site.param, site.group)
        with self._apart(sites) as parts:
            self._step_sites(parts)

    def _step_sites(self, sites: Sequence[Site]) -> None:
        """Step parameters that have gradients and state."""
        before = self._begun or {}
        self._begun = marks = dict[Tensor, Mark]()
        self._step_begun(sites, before, marks)
        self._begun = None

    def _step_begun(
        self, sites: Sequence[Site], before: dict[Tensor, Mark], marks: dict[Tensor, Mark]
    ) -> None:
        """Step parameters; `marks` notes how far each has come, and `before` how far it had come
        when an error ended the step from the same gradients."""
        ready = []
        for site in sites:
            gradient = site.param.grad
            if gradient is None:
                continue
            mark = before.get(site.param)
            if mark is None or not mark.is_of(gradient):
                mark = Mark(gradient)
            marks[site.param] = mark
            if is_sharded(site.param):
                mark.prepared = True
            elif not mark.prepared:
                mark.done = not self._prepare(site, operand(gradient))
                mark.prepared = True
            if not mark.done:
                continues = site.continues or not is_sharded(site.param)
                ready.append(dataclasses.replace(site, continues=continues))
        together: dict[Hashable, list[Site]] = {}
        places: set[int] = set()
        for site in ready:
            kind = self._kind(site)
            # Parameters tied by their data are updated one after the other.
            if kind is None or site.param.data_ptr() in places:
                self._step_param(site)
                marks[site.param].done = True
            else:
                places.add(site.param.data_ptr())
                together.setdefault(kind, []).append(site)
        for sites in together.values():
            self._update_together(sites, [operand(_gradient(site)) for site in sites])
            for site in sites:
                marks[site.param].done = True
                self._written(site.param)

    @contextlib.contextmanager
    def _apart(self, sites: Sequence[Site]) -> Iterator[Sequence[Site]]:
        """The sites, where parameters that are stepped in parts are replaced by these parts."""
        yield sites

    def _is_parted(self, site: Site) -> bool:
        """Whether a parameter is stepped in parts, some of which may have no gradient."""
        return False

    def _reduce_parts(self, site: Site, gradient: Tensor, kept: Tensor | None) -> Tensor | None:
        """`_reduce` of all parts of a parameter; `kept` is the result of earlier micro-batches."""
        return self._reduce(site, gradient)

    def _apply_parts(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        """`_apply` of all parts of a parameter."""
        self._apply(site, reduced, gradient)

    def _kind(self, site: Site) -> Hashable:
        """Equal for parameters that one operation updates together, which on a GPU is one launch.
        None for a parameter that is updated by itself."""
        return None

    def _update_together(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        """Update parameters of one `_kind` and their state from their gradients."""
        raise NotImplementedError

    @opaque
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients that `zoopt.fuse_backward` has accumulated are dropped too."""
        super().zero_grad(set_to_none)
        if self._fusion is not None:
            self._fusion.discard()

    def _make_state(self) -> None:
        """State for every parameter that has a gradient, as before its first step."""
        with OwnArithmetic():
            for site in self._sites():
                if site.param.grad is not None:
                    self._state(site.param, site.group)

    def _step_param(self, site: Site) -> None:
        gradient = site.param.grad
        if gradient is None:
            return
        if is_sharded(site.param):
            self._step_shard(site, gradient)
        else:
            self._update(site, operand(gradient))
        self._written(site.param)

    def _update(self, site: Site, gradient: Tensor) -> None:
        """Update a prepared parameter and its state from its gradient."""
        reduced = self._reduce(site, gradient)
        if reduced is not None:
            self._apply(site, reduced, gradient)

    def _written(self, param: Tensor) -> None:
        """Tell autograd, which does not see the kernels' writes: going backward through an older
        graph must raise, and not use other weights silently."""
        torch.autograd.graph.increment_version(param)
        if is_sharded(param):
            torch.autograd.graph.increment_version(local(param))

    def _step_shard(self, site: Site, gradient: Tensor) -> None:
        """Step this process's part of a sharded parameter, as if it were the whole."""
        state, part = self._state(site.param, site.group), local(site.param)
        gradient = local_like(gradient, site.param)
        # A view of the whole state: writes to it go to the whole state.
        self.state[part] = {name: local(value) for name, value in state.items()}
        try:
            shard = dataclasses.replace(
                site, param=part, offset=offset(site.param), sharded=site.param
            )
            reduced = self._reduce(shard, gradient)
            if reduced is not None:
                self._apply(shard, reduced, gradient)
        finally:
            del self.state[part]
        self._merge(site)

    def _prepare(self, site: Site, gradient: Tensor) -> bool:
        """Do everything that can fail, for all parameters, before any of them is written. If False
        is returned, this parameter is not updated."""
        return True

    def _reduce(self, site: Site, gradient: Tensor) -> Tensor | None:
        """The part of the gradient that the update needs, which is summed over micro-batches; None
        if the parameter is not to be updated."""
        return gradient

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        """Update the parameter and its state from `_reduce`'s result and, if `_needs_gradient`, the
        whole gradient."""
        raise NotImplementedError

    def _needs_gradient(self, site: Site) -> bool:
        """Whether `_apply` needs the whole gradient besides the result of `_reduce`."""
        return False

    def _keeps_gradient(self, site: Site) -> bool:
        """Whether the result of `_reduce` is the whole gradient."""
        return True

    def _sites(self) -> Iterator[Site]:
        """Every parameter, with its place."""
        named = list(named_params(self.param_groups))
        for position, (_, group, param, name) in enumerate(named):
            yield Site(param, group, name, position, len(named))

    def _can_shard(self, param: Tensor, group: Group) -> bool:
        """Whether a part of the rows can be stepped as a parameter of its own, followed by
        `_merge`."""
        return False

    def _merge(self, site: Site) -> None:
        """Combine the state of all parts after the step of a sharded parameter."""

    def _check_shards(self, group: Group) -> None:
        """Raise if a parameter is sharded in a way that its update does not support."""
        names = group.get("param_names", range(len(group["params"])))
        for param, name in zip(group["params"], names, strict=True):
            if not is_sharded(param):
                continue
            check_placement(param, name)
            if inner_dimension(param) and not self._can_shard(param, group):
                raise ValueError(
                    f"{type(self).__name__} must have parameters sharded along dimension 0 under "
                    f"these hyperparameters, got dimension {inner_dimension(param)} for {name!r}; "
                    f"use AdamW with state_dtype 'float32' or 'bfloat16', a group with rank=None, "
                    f"or SM3 (in 16 bits with rounding='nearest')"
                )
            if not self._can_shard(param, group):
                raise ValueError(
                    f"{type(self).__name__} must have whole parameters under these "
                    f"hyperparameters, got {name!r}, which is sharded; use one of "
                    f"{', '.join(_sharding_classes())}, without matrices in its group, or keep the "
                    f"parameter out of fully_shard"
                )

    def _check_gradient(self, site: Site) -> None:
        gradient = site.param.grad
        if gradient is None:
            return
        sharded = is_sharded(gradient)
        if sharded != is_sharded(site.param) or (is_wrapper(gradient) and not sharded):
            raise RuntimeError(
                f"{type(self).__name__} needs a gradient of its parameter's kind, "
                f"{type(site.param).__name__}, got {type(gradient).__name__} for parameter "
                f"{site.name!r}; pass a plain tensor, or for a DTensor parameter a DTensor"
            )
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} needs dense gradients, got layout {gradient.layout} "
                f"for parameter {site.name!r}; use an embedding with sparse=False, or zoopt.SM3"
            )

    def _check_group(self, group: Group) -> None:
        """Raise unless the group's hyperparameters and parameters are in range."""
        super()._check_group(group)
        check_number("lr", group["lr"], low=0.0)
        check_number("weight_decay", group["weight_decay"], low=0.0)
        check_bool("maximize", group["maximize"])
        check_choice("rounding", group["rounding"], get_args(RoundingMode))
        for param in group["params"]:
            check_param(local(param))
        self._check_shards(group)


def batch_kind(site: Site, *states: Tensor) -> Hashable:
    """The group, dtypes and device of a parameter that can be in a batch, and the dtypes and
    numbers of these of its states; None for one that cannot."""
    param, gradient = site.param, site.param.grad
    alone = gradient is None or is_sharded(param) or is_fake(param) or not param.is_contiguous()
    if alone or gradient is None or gradient.layout != torch.strided or not param.numel():
        return None
    kinds = tuple(s.item() if not s.dim() and s.device.type == "cpu" else s.dtype for s in states)
    return id(site.group), param.dtype, gradient.dtype, param.device, kinds


def batch_of(sites: Sequence[Site]) -> Batch:
    """The parameters with their noise."""
    return Batch([site.param for site in sites], [site.key for site in sites])


def _gradient(site: Site) -> Tensor:
    assert site.param.grad is not None
    return site.param.grad


def check_values(site: Site) -> None:
    """Raise if the parameter has no values here, since a step would silently skip it."""
    if site.param.is_meta:
        raise RuntimeError(
            f"parameter {site.name!r} must hold values, got one on the meta device; load the "
            f"model before the optimizer is made, and instead of accelerate's cpu_offload or "
            f"disk_offload use fully_shard(..., offload_policy=CPUOffloadPolicy())"
        )


def operand(gradient: Tensor) -> Tensor:
    """The gradient with its values contiguous, as updates read it; sparse ones as they are."""
    if gradient.layout != torch.strided:
        return gradient
    return gradient.resolve_neg().contiguous()


def _sharding_classes() -> list[str]:
    """The names of the classes that update sharded parameters."""
    return [row.cls.__name__ for row in rows() if getattr(row.cls, "shards", False)]


def betas_of(group: Group) -> tuple[float, float]:
    """The group's betas as numbers; like torch we accept tensors of one element."""
    first, second = group["betas"]
    return float(first), float(second)


def descent_rate(group: Group) -> float:
    """The factor of a direction: -lr, or lr if the objective is maximised."""
    return float(group["lr"]) * (1.0 if group["maximize"] else -1.0)
