"""A step on fake tensors, cut into parts that methods share, so that each part runs once.

Layers repeat: parts run on models of a few layers, and continue to the whole one's (see
`zoopt.memory.timeline`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from zoopt.memory.depth import shortened, stacks_of
from zoopt.memory.estimate import Estimate, parabola
from zoopt.memory.grouped import run
from zoopt.memory.meter import Run, StorageMeter
from zoopt.memory.methods import Method
from zoopt.memory.recall import Recall
from zoopt.memory.spec import ModelSpec
from zoopt.memory.step import (
    Inputs,
    allocate_state,
    backprop,
    loss_of,
    repeated_shapes,
    run_steps,
    tensors_of,
)
from zoopt.memory.tape import Tape, Unplayable
from zoopt.memory.timeline import Part, Timeline, extended
from zoopt.optimizer import DeclaredStateOptimizer

#: Repeated layers of the smaller model: the first, one that follows it, and the last.
_LAYERS = 3


@contextlib.contextmanager
def fake(dtype: torch.dtype) -> Iterator[FakeTensorMode]:
    """Tensors made inside have no values, and this dtype where none is asked for."""
    before = torch.get_default_dtype()
    # The garbage collector could free tensors at any operator, so it waits.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with FakeTensorMode() as mode:
            torch.set_default_dtype(dtype)
            yield mode
    finally:
        torch.set_default_dtype(before)
        if collecting:
            gc.enable()


_INFERENCE = Method("inference", "inference", lambda model: None)  # type: ignore[arg-type, return-value]
_PLAIN = dataclasses.replace(_INFERENCE, kind="backprop")


class Parts:
    """The parts of steps of one model, under `fake`, each run once.

    Backpropagation does not depend on the optimizer: it runs once for all of them. Updates of
    parameters of one shape take the same memory: one of them runs.
    """

    def __init__(self, spec: ModelSpec, model: nn.Module, recall: Recall | None) -> None:
        """The model's tensors are on the meta device; it stays as it is.

        Args:
            recall: what is known of operators; with None all of them run, in each step.
        """
        self.spec, self._meta, self._shared = spec, model, recall is not None
        self._run: Run = run if recall is None else recall
        self._plain = self._made(_PLAIN)
        self._adapted: dict[str, nn.Module] = {}
        self._tapes: dict[tuple[int, int], Tape | None] = {}

    def forward_only(self, method: Method, batch: int, seq: int) -> Timeline:
        """Whole steps of a method that never has the gradients of all parameters."""
        tape = self._tape(batch, seq) if method.kind == "zeroth-order" and not method.graph else None
        try:
            return self._steps(method, batch, seq, tape)
        except Unplayable:
            return self._steps(method, batch, seq, None)

    def _steps(self, method: Method, batch: int, seq: int, tape: Tape | None) -> Timeline:
        meter = StorageMeter(keep_events=True, run=self._run)
        inputs = self.spec.inputs(batch, seq)
        trained = [param for param in self._plain.parameters() if param.requires_grad]

        def played(model: nn.Module, inputs: Inputs) -> Any:
            return loss_of(model, inputs) if tape is None else tape.play(meter)

        # A method that keeps its own graph makes its state in the first step: run a second.
        steps = 2 if method.graph else 1
        try:
            with meter:
                optimizer = run_steps(
                    self._plain, inputs, method, meter, steps=steps, forward=played
                )
            timeline = _timeline(meter)  # The optimizer's state is there at its end.
            del optimizer
        finally:
            for param in trained:
                param.requires_grad_()
        return timeline

    def _tape(self, batch: int, seq: int) -> Tape | None:
        """The model's forward pass; None if it has to run each time."""
        if (batch, seq) not in self._tapes:
            self._tapes[batch, seq] = None
            if self._shared:
                with contextlib.suppress(Unplayable):
                    tape = Tape(self._plain, self.spec.inputs(batch, seq), self._run)
                    self._tapes[batch, seq] = tape
        return self._tapes[batch, seq]

    def passes(self, method: Method, batch: int, seq: int) -> Timeline:
        """Forward and backward, without any optimizer."""
        model = self._model(method)
        model.train()
        meter = StorageMeter(keep_events=True, run=self._run)
        inputs = self.spec.inputs(batch, seq)
        freed = [
            param.register_post_accumulate_grad_hook(_free)  # type: ignore[no-untyped-call]
            for param in model.parameters()
            if method.fused and param.requires_grad
        ]
        with meter:
            meter.track([*model.parameters(), *model.buffers()], "parameters")
            meter.track(tensors_of(inputs), "activations")
            backprop(model, inputs, meter, meter.enter_phase)
        for hook in freed:
            hook.remove()
        model.zero_grad()
        return _timeline(meter)

    def update(self, method: Method) -> Timeline:
        """One update, with all state and all gradients in memory (fused: one gradient)."""
        model = self._model(method)
        optimizer = method.build(model)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        meter = StorageMeter(keep_events=True, run=self._run)
        with meter:
            meter.enter_phase("update")
            meter.track([*model.parameters(), *model.buffers()], "parameters")
            gradients = [torch.empty_like(param) for param in params]
            meter.track(gradients, "gradients")
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            repeated = repeated_shapes(optimizer)
            for param in repeated:
                param.grad = None
            if isinstance(optimizer, DeclaredStateOptimizer):
                allocate_state(optimizer, meter)
            else:
                optimizer.step()
                for param, like in repeated.items():
                    optimizer.state[param] = _copies(optimizer.state[like])
                meter.track(tensors_of(list(optimizer.state.values())), "optimizer state")
                # torch's keep temporaries of one parameter until the next one has its own.
                for param, gradient in zip(params, gradients, strict=True):
                    param.grad = gradient
            meter.forget_peaks()
            optimizer.step()
            model.zero_grad()
        return _timeline(meter)

    def _made(self, method: Method) -> nn.Module:
        """The model that the method trains."""
        with _disable_current_modes(), torch.device("meta"):
            model = shortened(self._meta, [])
            model = model if method.adapter is None else method.adapter(model)
        return _faked(model)

    def _model(self, method: Method) -> nn.Module:
        if method.adapter is None:
            return self._plain
        if method.name not in self._adapted:
            self._adapted[method.name] = self._made(method)
        return self._adapted[method.name]


class Simulation:
    """The steps of one model, under `fake`.

    Args:
        spec, checkpointing, seq: what is planned.
        whole: run every layer of the model, where the default is a few of those that repeat.
    """

    def __init__(
        self, spec: ModelSpec, checkpointing: bool, seq: int, *, whole: bool = False
    ) -> None:
        self.spec, self.seq, self.whole = spec, seq, whole
        # The whole model's simulation is the yardstick: there every operator runs.
        self._recall = None if whole else Recall()
        with _disable_current_modes(), torch.device("meta"):
            self._meta = spec.build(checkpointing)
        self.parameters = sum(param.numel() for param in self._meta.parameters())
        self._whole: Parts | None = None
        self._short: dict[int, tuple[Parts, list[tuple[Parts, int]]] | None] = {}
        self._parts: dict[tuple[str, bool, int, int], Part] = {}
        self._updates: dict[Method, Part] = {}

    def estimate(self, method: Method, batch: int) -> Estimate:
        """The method's memory at that batch."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backward = method.kind == "backprop" or method.graph
            if method.kind == "backprop":
                part, state = self._backprop(method, batch)
            elif method.kind == "inference":
                part, state = self._inference(batch, self.seq), 0
            else:
                part = self._part("forward_only", method, batch, self.seq)
                state = part.last["optimizer state"]
            per_example, per_token = self._growth(backward, batch)
        if method.kind == "zeroth-order":
            for name in ("forward +", "forward -"):
                per_example = per_example | {name: per_example["forward"]}
                per_token = per_token | {name: per_token["forward"]}
        return Estimate(
            method.name,
            method.kind,
            part.peak,
            part.categories,
            part.phases,
            state,
            per_example,
            per_token,
        )

    def _passes(self, method: Method, batch: int, seq: int) -> Part:
        key = (method.name if method.adapter else "", method.fused, batch, seq)
        if key not in self._parts:
            self._parts[key] = self._part("passes", method, batch, seq)
        return self._parts[key]

    def _inference(self, batch: int, seq: int) -> Part:
        key = ("inference", False, batch, seq)
        if key not in self._parts:
            self._parts[key] = self._part("forward_only", _INFERENCE, batch, seq)
        return self._parts[key]

    def _part(self, name: str, method: Method, *sizes: int) -> Part:
        """A part of the whole model's step: of `Parts`, the method of that name."""
        short = self._shortened(_LAYERS + method.layers)
        if short is not None:
            base, deeper = short
            timeline = extended(
                getattr(base, name)(method, *sizes),
                [(getattr(parts, name)(method, *sizes), more) for parts, more in deeper],
            )
            if timeline is not None:
                return timeline.part
        if self._whole is None:
            self._whole = Parts(self.spec, self._meta, self._recall)
        whole: Timeline = getattr(self._whole, name)(method, *sizes)
        return whole.part

    def _shortened(self, units: int) -> tuple[Parts, list[tuple[Parts, int]]] | None:
        """The parts of a model with that many of each repeated layer; and for each kind of them,
        of one with one more, and how many more the whole one has. None if layers do not repeat."""
        if units not in self._short:
            families = [] if self.whole else stacks_of(self._meta, units + 2)
            self._short[units] = None
            if families:
                made = []
                for deeper in (None, *range(len(families))):
                    cut = [
                        (stack, units + (number == deeper))
                        for number, family in enumerate(families)
                        for stack in family
                    ]
                    with _disable_current_modes():
                        model = shortened(self._meta, cut)
                    made.append(Parts(self.spec, model, self._recall))
                more = [family[0].units - units for family in families]
                self._short[units] = made[0], list(zip(made[1:], more, strict=True))
        return self._short[units]

    def _backprop(self, method: Method, batch: int) -> tuple[Part, int]:
        passes = self._passes(method, batch, self.seq)
        # Fused or not, an optimizer's update is the same.
        optimizer = dataclasses.replace(method, name="", fused=False)
        if optimizer not in self._updates:
            self._updates[optimizer] = self._part("update", method)
        update = self._updates[optimizer]
        state = update.last["optimizer state"]
        phases = {name: peak + state for name, peak in passes.phases.items()}
        phases["update"] = update.peak
        categories, peak = passes.categories | {"optimizer state": state}, passes.peak + state
        if method.fused:
            # Updates run while backward does.
            workspace = update.categories["workspace"]
            categories, peak = categories | {"workspace": workspace}, peak + workspace
            phases["update"] = update.peak - update.categories["gradients"]
        elif update.peak > peak:
            categories, peak = update.categories, update.peak
        return Part(categories, phases, peak, update.last), state

    def _growth(
        self, backward: bool, batch: int
    ) -> tuple[dict[str, int], dict[str, tuple[float, float]]]:
        """What an example and a token add to each pass over the model, see `Estimate`.

        They are the plain model's: adapters and frozen layers change them little.
        """

        def phases(batch: int, seq: int) -> dict[str, int]:
            part = self._passes(_PLAIN, batch, seq) if backward else self._inference(batch, seq)
            return part.phases

        # Shorter ones: twice as long could be more than the model's positions.
        sizes = [self.seq, max(1, self.seq // 2), max(1, self.seq // 4)]
        here, half, quarter = (phases(batch, seq) for seq in sizes)
        wider = phases(2 * batch, self.seq)
        per_example, per_token = {}, {}
        for phase in here.keys() - {"load"}:
            per_example[phase] = (wider[phase] - here[phase]) // batch
            per_token[phase] = parabola(sizes, [here[phase], half[phase], quarter[phase]])
        return per_example, per_token


def _timeline(meter: StorageMeter) -> Timeline:
    meter.enter_phase(meter.phase)  # What was freed last is part of it.
    assert meter.events is not None
    return Timeline.of(meter.events)


def _faked(model: nn.Module) -> nn.Module:
    """The model with fake tensors, on the CPU, for its meta tensors, tied where those are."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if param not in made:
                    empty = torch.empty(param.shape, dtype=param.dtype)
                    made[param] = nn.Parameter(empty, requires_grad=param.requires_grad)
                module._parameters[name] = made[param]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def _copies(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


def _free(param: torch.Tensor) -> None:
    param.grad = None
