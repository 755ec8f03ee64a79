"""Takes the steps of a recorded run symbolically, and writes them to the weights later.

If an update depends only on the losses, all parameters of one group, dtype and block are written in
the same way: with the same coefficients, each along its own directions. The optimizer's own code
therefore takes the steps on a stand-in model that has one element for each such kind. A queue
replaces the passes over the weights. The queued writes are applied to the weights later, many
steps at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.distributed.sharding import is_sharded
from zoopt.kernels import Write, dispatch, write_each_
from zoopt.kernels.batch import Batch, share_no_memory
from zoopt.kernels.descent.rule import Rule, Shape
from zoopt.kernels.noise.key import NoiseKey
from zoopt.noise import stream
from zoopt.parameters import named_params
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.blocks import block_of
from zoopt.zeroth_order.engine.mask import Indexed
from zoopt.zeroth_order.engine.noise import Noise
from zoopt.zeroth_order.engine.passes import Passes
from zoopt.zeroth_order.engine.progress import Progress, count_write

#: A function that returns a parameter's momentum buffer; None: it has none.
Buffer = Callable[[], Tensor] | None
#: Group keys that describe the parameters and not the method.
_THEIRS = ("params", "param_names", "mask")


class NotScriptedError(Exception):
    """A step cannot be expressed as queued writes along the noise."""


@dataclasses.dataclass
class Kind:
    """Parameters that are all written in the same way, and their stand-in.

    Attributes:
        stand_in: a tensor of one element, which is never written.
        params: the parameters with their directions, and their momentum buffers: functions that
            return them, or None where there are none.
        writes: the writes still to be applied to each of them.
    """

    stand_in: Tensor
    params: list[tuple[Tensor, Noise, Buffer]] = dataclasses.field(default_factory=list)
    writes: list[Write] = dataclasses.field(default_factory=list)

    def make(self, writes: Sequence[Write]) -> None:
        """Apply the writes to the weights."""
        batches: dict[Any, list[tuple[Tensor, Noise, Buffer]]] = {}
        for param, direction, buffer in self.params if writes else ():
            batches.setdefault(param.device, []).append((param, direction, buffer))
            count_write(param)
        stateful = any(write.rule == "momentum" for write in writes)
        for own in batches.values():
            params, directions, buffers = zip(*own, strict=True)
            keys = [direction.key for direction in directions]
            indices = [direction.indices for direction in directions]
            # In a group either all directions have indices or none does.
            batch = Batch(params, keys, None if indices[0] is None else indices)
            write_each_(batch, writes, buffer=[own() for own in buffers] if stateful else None)

    def closed(self) -> list[Write]:
        """Combine all writes into one, without their rounding; later decays scale earlier writes.

        Raises:
            NotScriptedError: a write follows a rule that is not linear, so it cannot be summed.
        """
        left, total = 1.0, dict[int, float]()
        for write in reversed(self.writes):
            if write.rule != "none":
                raise NotScriptedError
            for draw, coefficient in zip(write.draws, write.coefficients, strict=True):
                total[draw] = total.get(draw, 0.0) + left * coefficient
            left *= write.decay
        total = {draw: total[draw] for draw in sorted(total) if total[draw]}
        if not total and left == 1.0:
            return []
        return [Write(tuple(total), tuple(total.values()), left)]


class Script(Passes):
    """A queue that only collects writes: for each stand-in, in order."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        super().__init__()
        self._kinds = {id(kind.stand_in): kind for kind in kinds}

    def takes(self, theta: Tensor) -> bool:
        """Always: every parameter here is a stand-in."""
        return True

    def put(
        self,
        operation: str | Callable[..., Any],
        theta: Tensor,
        key: NoiseKey,
        progress: Progress,
        *,
        indices: Tensor | None = None,
        beside: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> bool:
        """Store the operation as a `Write`."""
        if not isinstance(operation, str) or operation not in _WRITES:
            raise NotScriptedError
        if beside and operation != "momentum":
            raise NotScriptedError
        if not progress.done:
            self._kinds[id(theta)].writes.append(_WRITES[operation](**options))
            progress.finish()
        return True

    def made_apart(self) -> None:
        """Refuse operations that cannot be queued."""
        raise NotScriptedError

    def make(self) -> None:
        """Do nothing: `Kind.make` applies the writes later."""

    def clear(self) -> None:
        """Do nothing: writes that were put stay, and `Kind.make` applies them."""


def _rounded_by(rounding: str, draw: int) -> int | None:
    return draw if rounding == "stochastic" else None


def _apply(
    *, coefficients: Sequence[float], draws: Sequence[int], decay: float, rounding: str
) -> Write:
    last = draws[-1] if draws else 0  # Without draws it rounds to nearest.
    return Write(tuple(draws), tuple(coefficients), decay, _rounded_by(rounding, last))


def _descend(
    *,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    shape: Shape,
    rule: Rule,
    decay: float,
    rounding: str,
    rounding_draw: int,
) -> Write:
    """Drop the terms with coefficient 0 from each sum: adding 0 could change the sign of a zero."""
    if shape.kind != "plain" or rule.kind != "sign":
        raise NotScriptedError
    [step_size] = rule.numbers
    own = {d: c for d, c in zip(draws, coefficients, strict=True) if c}
    estimate = {d: g for d, g in zip(draws, gradients, strict=True) if g}
    return Write(
        tuple(own),
        tuple(own.values()),
        decay,
        _rounded_by(rounding, rounding_draw),
        "sign",
        tuple(estimate),
        tuple(estimate.values()),
        step_size=step_size,
    )


def _adam_window(
    *,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    closes: Sequence[bool],
    draws: Sequence[int],
    eps: float,
    step_size: float,
    decay: float,
    rounding: str,
) -> Write:
    draws = tuple(draws)
    return Write(
        draws,
        tuple(coefficients),
        decay,
        _rounded_by(rounding, draws[-1]),
        "adam",
        draws,
        tuple(gradients),
        tuple(first),
        tuple(second),
        tuple(map(bool, closes)),
        step_size,
        eps,
    )


def _momentum(
    *,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    momentum: float,
    step_size: float,
    decay: float,
    rounding: str,
) -> Write:
    draws = tuple(draws)
    return Write(
        draws,
        tuple(coefficients),
        decay,
        _rounded_by(rounding, draws[-1]),
        "momentum",
        draws,
        tuple(gradients),
        step_size=step_size,
        momentum=momentum,
    )


_WRITES: dict[str, Callable[..., Write]] = {
    "apply": _apply,
    "momentum": _momentum,
    "descend": _descend,
    "adam_window": _adam_window,
}


class Scripted:
    """Takes an optimizer's steps on a stand-in; the optimizer's weights are written later.

    Args:
        optimizer: an optimizer without pending probes.

    Raises:
        NotScriptedError: its parameters have state other than a momentum buffer on the CPU, or
            their directions are not plain noise.

    Attributes:
        stand_in: an optimizer of the same class, over one element of each kind.
        kinds: see `Kind`.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        if not optimizer.scripted or any(map(is_sharded, optimizer._params())):
            raise NotScriptedError
        self._optimizer = optimizer
        kinds: dict[Any, Kind] = {}
        groups: list[dict[str, Any]] = [{"params": [], "names": []} for _ in optimizer.param_groups]
        for number, group, param, name in named_params(optimizer.param_groups):
            if not param.numel():
                continue
            block = block_of(group.get("blocks"), number, name)
            place = (number, block, param.dtype, param.requires_grad)
            if place not in kinds:
                own = torch.nn.Parameter(torch.zeros(1, dtype=param.dtype), param.requires_grad)
                kinds[place] = Kind(own)
                groups[number]["params"].append(own)
                groups[number]["names"].append(name)
            if param.requires_grad:
                direction = self._direction(param, group, name)
                if direction is not None:
                    buffer = functools.partial(self._buffer, param, group, name)
                    stores = bool(optimizer.declared_state(param, group))
                    kinds[place].params.append((param, direction, buffer if stores else None))
        if not all(group["params"] for group in groups):
            raise NotScriptedError
        self.kinds = list(kinds.values())
        if not share_no_memory(param for kind in self.kinds for param, *_ in kind.params):
            # Tied by their data: their writes take turns, step by step.
            raise NotScriptedError
        self.stand_in = self._stand_in(groups)
        script = Script(self.kinds)
        self.stand_in._queue = lambda: script

    def _direction(self, param: Tensor, group: Any, name: str | int) -> Noise | None:
        """The parameter's direction; None if the parameter is not perturbed."""
        optimizer = self._optimizer
        declared = optimizer.declared_state(param, group)
        if declared and (declared.keys() != {"momentum_buffer"} or dispatch.launches(param)):
            raise NotScriptedError
        virtual = optimizer._virtual(param, group)
        direction = optimizer._direction(param, group, stream(name), virtual=virtual)
        if direction is not None and type(direction) not in (Noise, Indexed):
            raise NotScriptedError
        assert direction is None or isinstance(direction, Noise)
        return direction

    def _buffer(self, param: Tensor, group: Any, name: str | int) -> Tensor:
        """The parameter's momentum buffer, which is made if it is missing."""
        self._optimizer._ready_state(param, group, stream(name))
        buffer: Tensor = self._optimizer._state(param, group)["momentum_buffer"]
        return buffer

    def _stand_in(self, groups: list[dict[str, Any]]) -> ZerothOrderOptimizer:
        named = [
            list(zip(group["names"], group["params"], strict=True))
            if "param_names" in own
            else group["params"]
            for group, own in zip(groups, self._optimizer.param_groups, strict=True)
        ]
        cls: Callable[..., ZerothOrderOptimizer] = type(self._optimizer)
        stand_in = cls([{"params": params} for params in named])
        for group, own in zip(stand_in.param_groups, self._optimizer.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key not in _THEIRS})
            if isinstance(own.get("mask"), str):
                group["mask"] = own["mask"]
        for name in _COUNTED:
            setattr(stand_in, name, getattr(self._optimizer, name))
        return stand_in

    def settled(self, *, exact: bool) -> list[tuple[Kind, list[Write]]]:
        """Copy the stand-in's progress to the optimizer after a step; its weights do not change.

        Args:
            exact: return each write of the run; False: all combined into one.

        Returns:
            The writes that remain to be applied to the weights.

        Raises:
            NotScriptedError: the writes cannot be combined.
        """
        made = [(kind, list(kind.writes) if exact else kind.closed()) for kind in self.kinds]
        for kind in self.kinds:
            kind.writes.clear()
            for *_, buffer in kind.params if kind.stand_in in self.stand_in.state else ():
                if buffer is not None:
                    buffer()
        for group, own in zip(
            self.stand_in.param_groups, self._optimizer.param_groups, strict=True
        ):
            own.update({key: value for key, value in group.items() if key not in _THEIRS})
        for name in _COUNTED:
            setattr(self._optimizer, name, getattr(self.stand_in, name))
        return made


#: Attributes of an optimizer that a run changes, besides its groups, weights and state.
_COUNTED = ("last_step", "skipped_probes", "_judged", "_coarse")
