"""The parts of a simulated step. Methods share them, so that each runs once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from zoopt.first_order.gathering import Gathered, layers_of
from zoopt.groups import all_params
from zoopt.kernels.dispatch import planning_a_gpu
from zoopt.memory.depth import shortened
from zoopt.memory.grouped import run
from zoopt.memory.meter import Run, StorageMeter
from zoopt.memory.methods import Method
from zoopt.memory.recall import Recall
from zoopt.memory.shards import divide, gathered_bytes, in_shards
from zoopt.memory.spec import ModelSpec
from zoopt.memory.step import (
    Inputs,
    allocate_state,
    backprop,
    loss_of,
    repeated_shapes,
    run_steps,
    state_tensors,
    tensors_of,
)
from zoopt.memory.tape import Tape, Unplayable
from zoopt.memory.timeline import Timeline
from zoopt.optimizer import DeclaredStateOptimizer


class Parts:
    """The parts of a step of one model, under `fake`. Each part runs once.

    Backpropagation does not depend on the optimizer, so it runs once for all of them. Updates of
    parameters of one shape take the same memory, so only one of them runs.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: nn.Module,
        recall: Recall | None,
        *,
        gpu: bool = False,
        processes: int = 1,
    ) -> None:
        """Copy the model, whose tensors are on the meta device; the model itself is not changed.

        Args:
            recall: cache of operators' results; None: every operator runs in every step.
            gpu: whether the step is one on a GPU, where parameters are updated together.
            processes: over how many FSDP2 divides the parameters.
        """
        self._processes = processes
        self.spec, self._meta, self._shared, self._gpu = spec, model, recall is not None, gpu
        self._run: Run = run if recall is None else recall
        self._plain = whole_model(model)
        self._adapted: dict[str, nn.Module] = {}
        self._tapes: dict[tuple[int, int], Tape | None] = {}

    def forward_only(self, method: Method, batch: int, seq: int) -> Timeline:
        """Whole steps of a method that never holds the gradients of all parameters."""
        if self._processes > 1 and method.kind == "zeroth-order":
            return self._steps_in_shards(in_shards(method), batch, seq)
        # What is recorded is a forward pass of the plain model.
        plain = method.kind == "zeroth-order" and method.adapter is None and not method.graph
        tape = self._tape(batch, seq) if plain else None
        try:
            return self._steps(method, batch, seq, tape)
        except Unplayable:
            return self._steps(method, batch, seq, None)

    def _steps_in_shards(self, method: Method, batch: int, seq: int) -> Timeline:
        """Whole steps on one process's shards, in which forward passes read what is gathered."""
        meter = StorageMeter(keep_events=True, run=self._run)
        inputs, tape = self.spec.inputs(batch, seq), self._tape(batch, seq)
        shards = whole_model(self._meta)
        divide(shards, self._processes)
        gathered = gathered_bytes(self._plain, self._processes)
        trained = [param for param in self._plain.parameters() if param.requires_grad]

        def played(_: nn.Module, inputs: Inputs) -> Any:
            held = torch.empty(gathered, dtype=torch.uint8)
            meter.track([held], "parameters")
            return loss_of(self._plain, inputs) if tape is None else tape.play(meter)

        for param in trained:
            param.requires_grad_(False)  # Nothing perturbs what is gathered.
        # What is gathered stands for them.
        meter.overlook([*self._plain.parameters(), *self._plain.buffers()])
        try:
            with meter, torch.no_grad():
                optimizer = run_steps(shards, inputs, method, meter, steps=1, forward=played)
            timeline = _timeline(meter)  # Before the optimizer's state is freed.
            del optimizer
        finally:
            for param in trained:
                param.requires_grad_()
        return timeline

    def _steps(self, method: Method, batch: int, seq: int, tape: Tape | None) -> Timeline:
        meter = StorageMeter(keep_events=True, run=self._run)
        inputs = self.spec.inputs(batch, seq)
        model = self._model(method)
        adapted = dataclasses.replace(method, adapter=None)
        trained = [param for param in model.parameters() if param.requires_grad]

        def played(model: nn.Module, inputs: Inputs) -> Any:
            return loss_of(model, inputs) if tape is None else tape.play(meter)

        # A method with its own graph creates its state in the first step, so measure a second one.
        steps = 2 if method.graph else 1
        try:
            with meter:
                optimizer = run_steps(model, inputs, adapted, meter, steps=steps, forward=played)
            timeline = _timeline(meter)  # Before the optimizer's state is freed.
            del optimizer
        finally:
            for param in trained:
                param.requires_grad_()
        return timeline

    def _tape(self, batch: int, seq: int) -> Tape | None:
        """The recorded forward pass; None if the pass cannot be recorded."""
        if (batch, seq) not in self._tapes:
            self._tapes[batch, seq] = None
            if self._shared:
                with contextlib.suppress(Unplayable):
                    tape = Tape(self._plain, self.spec.inputs(batch, seq), self._run)
                    self._tapes[batch, seq] = tape
        return self._tapes[batch, seq]

    def passes(self, method: Method, batch: int, seq: int) -> Timeline:
        """Forward and backward pass, without an optimizer."""
        model, wrapping = self._model(method), method.wrapping
        model.train()
        wrapper = None
        if wrapping is not None:
            wrapper = wrapping.simulate(model, method.build(model))
        meter = StorageMeter(keep_events=True, run=self._run)
        inputs = self.spec.inputs(batch, seq)
        gathers = method.fused and self._gpu and self._processes == 1
        layers, gathered = layers_of(model) if gathers else {}, Gathered()

        def free(param: torch.Tensor) -> None:
            gradient, param.grad = param.grad, None
            if not gathers or gradient is None:
                return
            meter.track([gradient], "gradients")
            if not gathered.belongs(layers.get(param)):
                gathered.clear()
            gathered.add(param, gradient, layers.get(param))
            if gathered.full:
                gathered.clear()

        freed = [
            param.register_post_accumulate_grad_hook(free)  # type: ignore[no-untyped-call]
            for param in model.parameters()
            if method.fused and param.requires_grad
        ]
        with meter:
            meter.track([*model.parameters(), *model.buffers()], "parameters")
            meter.track(tensors_of(inputs), "activations")
            kept = wrapping.kept(model) if wrapping is not None else []
            meter.track(kept, "gradients")
            backprop(model, inputs, meter, meter.enter_phase)
            gathered.clear()
        for hook in freed:
            hook.remove()
        model.zero_grad()
        timeline = _timeline(meter)
        if wrapping is not None:
            wrapping.undo(wrapper)
        return timeline

    def update(self, method: Method) -> Timeline:
        """One update, with all state and all gradients in memory. On a GPU all matrices
        of a shape are updated together, or those of a layer where backward is fused."""
        model, wrapping = self._model(method), method.wrapping
        optimizer = method.build(model)
        params = all_params(optimizer.param_groups)
        meter = StorageMeter(keep_events=True, run=self._run)
        wrapper = None
        if wrapping is not None:
            if wrapping.rotates and isinstance(optimizer, DeclaredStateOptimizer):
                allocate_state(optimizer, meter)
            wrapper = wrapping.simulate(model, optimizer)
        params = [param for param in params if param.requires_grad]
        with meter:
            meter.enter_phase("update")
            meter.track([*model.parameters(), *model.buffers()], "parameters")
            kept = wrapping.kept(model) if wrapping is not None else []
            gradients = [torch.empty_like(param) for param in params]
            meter.track([*kept, *gradients], "gradients")
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            together = self._gpu and not method.fused
            layers = layers_of(model) if self._gpu and method.fused else {}
            repeated = {}
            if not together and wrapping is None:
                repeated = repeated_shapes(optimizer, layers.get)
            for param in repeated:
                param.grad = None
            if isinstance(optimizer, DeclaredStateOptimizer):
                allocate_state(optimizer, meter)
            else:
                optimizer.step()
                for param, like in repeated.items():
                    optimizer.state[param] = _copies(optimizer.state[like])
                meter.track(state_tensors(optimizer), "optimizer state")
                # torch's optimizers keep one parameter's temporaries until the next allocates its
                # own, so all parameters take part.
                for param, gradient in zip(params, gradients, strict=True):
                    param.grad = gradient
            meter.forget_peaks()
            with planning_a_gpu(self._gpu):
                if wrapping is None:
                    optimizer.step()
                else:
                    wrapping.step(optimizer, wrapper)
            meter.track(state_tensors(optimizer), "optimizer state")
            model.zero_grad()
        timeline = _timeline(meter)
        if wrapping is not None:
            wrapping.undo(wrapper)
        return timeline

    def _model(self, method: Method) -> nn.Module:
        if method.adapter is None:
            return self._plain
        if method.name not in self._adapted:
            self._adapted[method.name] = whole_model(self._meta, method.adapter)
        return self._adapted[method.name]


def whole_model(
    meta: nn.Module, adapter: Callable[[nn.Module], nn.Module] | None = None
) -> nn.Module:
    """The model that is trained, of fake tensors; that on the meta device stays as it is."""
    with _disable_current_modes(), torch.device("meta"):
        model = shortened(meta, [])
        model = model if adapter is None else adapter(model)
    return _faked(model)


def _timeline(meter: StorageMeter) -> Timeline:
    meter.enter_phase(meter.phase)  # Record an event, so that the last frees are included.
    assert meter.events is not None
    return Timeline.of(meter.events)


def _faked(model: nn.Module) -> nn.Module:
    """Replace the model's meta tensors with fake CPU tensors; tied parameters stay tied."""
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
