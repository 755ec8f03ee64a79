"""A forward pass on fake tensors, recorded once and played for every optimizer.

Optimizers that only evaluate the loss differ in how parameters are read. A tape therefore runs just
the functions that read trained parameters. For all others it reports the recorded memory to a
meter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from zoopt.memory.meter import CATEGORIES, Event, Run, StorageMeter
from zoopt.memory.step import Inputs, loss_of, tensors_of
from zoopt.zeroth_order.engine.virtual import Interception

_PLAIN = (Tensor, int, float, bool, str, type(None), torch.dtype)


class Unplayable(Exception):
    """The pass cannot be recorded or played, so it has to run for each optimizer."""


@dataclasses.dataclass(frozen=True)
class _Read:
    """A function that reads parameters.

    Attributes:
        func, args, kwargs: the call. Of its tensors only the parameters are those of the pass;
            stand-ins replace the others.
        params: the parameters.
        first, last: the range of its events.
        before, after: bytes of activations when it began and when it ended.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    params: list[Tensor]
    first: int
    last: int
    before: int
    after: int


class Tape:
    """The forward pass of a model, without derivatives.

    Args:
        model, inputs: the model and its inputs, on fake tensors.
        run: runs the operators; as for `StorageMeter`.

    Raises:
        Unplayable: the pass cannot be recorded.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, run: Run) -> None:
        meter = StorageMeter(keep_events=True, run=run)
        model.eval()
        with meter:
            meter.track([*model.parameters(), *model.buffers()], "parameters")
            meter.track(tensors_of(inputs), "workspace")
            meter.enter_phase("forward")
            meter.forget_peaks()
            recorder = _Recorder(model.parameters(), meter)
            try:
                with torch.no_grad(), recorder:
                    loss_of(model, inputs)
            except Exception as error:
                raise Unplayable("recording failed") from error
        if meter.live["activations"]:
            raise Unplayable("the model keeps tensors of the pass")
        self._events = recorder.events
        self._reads = [
            dataclasses.replace(read, **_with_tensors({"args": read.args, "kwargs": read.kwargs}))
            for read in recorder.reads
        ]

    def play(self, meter: StorageMeter) -> None:
        """Play the pass to the meter.

        Raises:
            Unplayable: a read allocated other memory than in the recorded pass.
        """
        for read in self._reads:
            meter.overlook(tensors_of([read.args, read.kwargs]))
        start, position = meter.live["activations"], 0
        for read in self._reads:
            if not any(param.requires_grad for param in read.params):
                continue
            self._show(meter, start, position, read.first)
            meter.live["activations"] = before = start + read.before
            result = read.func(*read.args, **read.kwargs)
            made = meter.live["activations"] - before
            del result
            if made != read.after - read.before or meter.live["activations"] != before:
                raise Unplayable(f"{read.func} made {made} bytes")
            meter.live["activations"] = start + read.after
            position = read.last
        self._show(meter, start, position, len(self._events))
        meter.live["activations"] = start

    def _show(self, meter: StorageMeter, start: int, first: int, last: int) -> None:
        for event in self._events[first:last]:
            meter.live["activations"] = start + _activations(event)
            meter.record(event.name)


class _Recorder(Interception):
    """Records the calls that read parameters, without keeping their other tensors alive."""

    def __init__(self, parameters: Iterable[Tensor], meter: StorageMeter) -> None:
        # The list keeps their ids valid.
        self._parameters = list(parameters)
        super().__init__({id(param) for param in self._parameters})
        assert meter.events is not None
        self.events, self._live = meter.events, meter.live
        self.reads: list[_Read] = []

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = tree_leaves((args, kwargs))
        if not all(isinstance(leaf, _PLAIN) for leaf in leaves):
            raise Unplayable(f"{func} takes other arguments than tensors and numbers")
        params = [leaf for leaf in leaves if self._is_registered(leaf)]
        first, before = len(self.events), self._live["activations"]
        result = func(*args, **kwargs)
        storages = {param.untyped_storage()._cdata for param in params}
        if any(tensor.untyped_storage()._cdata in storages for tensor in tensors_of(result)):
            raise Unplayable(f"{func} returns a view, which keeps what is read beyond the call")
        last, after = len(self.events), self._live["activations"]
        args, kwargs = tree_map_only(Tensor, self._outlined, (args, kwargs))
        self.reads.append(_Read(func, args, kwargs, params, first, last, before, after))
        return result

    def _outlined(self, tensor: Tensor) -> Any:
        return tensor if self._is_registered(tensor) else _Outline.of(tensor)


@dataclasses.dataclass(frozen=True)
class _Outline:
    """What is needed to create a stand-in for a tensor of the pass."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> _Outline:
        return _Outline(tensor.shape, tensor.stride(), tensor.dtype)

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def _with_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = tree_map_only(_Outline, _Outline.tensor, arguments)
    return made


def _activations(event: Event) -> int:
    return event.live[CATEGORIES.index("activations")]
