"""A step on fake tensors, cut into parts that methods share, so that each part runs once."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from zoopt.memory.meter import CATEGORIES, Category, StorageMeter
from zoopt.memory.methods import Method
from zoopt.memory.models import ModelSpec
from zoopt.memory.step import (
    allocate_state,
    backprop,
    repeated_shapes,
    run_steps,
    tensors_of,
)
from zoopt.optimizer import DeclaredStateOptimizer


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The memory of one method.

    Attributes:
        name, kind: the method's.
        peak: bytes at the step's highest point.
        categories: what they are, at that point.
        phases: the peak of each phase of the step.
        state: bytes of optimizer state between steps.
        per_example: bytes that one more example adds to the peak of a phase.
        per_token: of the bytes that tokens in every example take in it, those that grow with their
            number and those that grow with its square.
    """

    name: str
    kind: str
    peak: int
    categories: dict[Category, int]
    phases: dict[str, int]
    state: int
    per_example: dict[str, int]
    per_token: dict[str, tuple[float, float]]

    def fits(self, budget: int) -> bool:
        """Whether the peak is within the budget, in bytes."""
        return self.peak <= budget

    def largest_batch(self, budget: int, batch: int) -> int:
        """The largest batch that fits a budget in bytes, or 0; peaks grow in proportion."""
        growth = {phase: (float(slope), 0.0) for phase, slope in self.per_example.items()}
        return self._largest(growth, budget, batch)

    def largest_seq(self, budget: int, seq: int) -> int:
        """The longest sequence that fits a budget in bytes, or 0."""
        return self._largest(self.per_token, budget, seq)

    def _largest(self, growth: dict[str, tuple[float, float]], budget: int, size: int) -> int:
        """The largest size at which no phase exceeds the budget."""

        def fits(other: int) -> bool:
            for phase, peak in self.phases.items():
                linear, square = growth.get(phase, (0.0, 0.0))
                grown = linear * (other - size) + square * (other * other - size * size)
                if peak + grown > budget:
                    return False
            return True

        low, high = 0, 1 << 30
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low


@contextlib.contextmanager
def fake(dtype: torch.dtype) -> Iterator[FakeTensorMode]:
    """Tensors made inside have no values, and this dtype where none is asked for."""
    before = torch.get_default_dtype()
    with FakeTensorMode() as mode:
        torch.set_default_dtype(dtype)
        try:
            yield mode
        finally:
            torch.set_default_dtype(before)


_INFERENCE = Method("inference", "inference", lambda model: None)  # type: ignore[arg-type, return-value]
_PLAIN = dataclasses.replace(_INFERENCE, kind="backprop")


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a meter saw in a part of the step."""

    categories: dict[Category, int]
    phases: dict[str, int]
    peak: int

    @staticmethod
    def of(meter: StorageMeter) -> _Part:
        return _Part(categories_of(meter), dict(meter.phases), meter.peak)


def categories_of(meter: StorageMeter) -> dict[Category, int]:
    """What the meter's peak was made of."""
    return {category: meter.at_peak.get(category, 0) for category in CATEGORIES}


class Simulation:
    """The steps of one model, under `fake`.

    Backpropagation does not depend on the optimizer, whose state is just there: it runs once for
    all. Updates of parameters of one shape take the same memory: one of them runs.
    """

    def __init__(self, spec: ModelSpec, checkpointing: bool, seq: int) -> None:
        self.spec, self.checkpointing, self.seq = spec, checkpointing, seq
        self._plain = self._build(lambda model: model)
        self.parameters = sum(param.numel() for param in self._plain.parameters())
        self._adapted: dict[str, nn.Module] = {}
        self._passes: dict[tuple[str, bool, int, int], _Part] = {}

    def estimate(self, method: Method, batch: int) -> Estimate:
        """The method's memory at that batch."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if method.kind == "backprop":
                return self._backprop(method, batch)
            part, state = self._forward_only(method, batch, self.seq)
            slopes = self._slopes(method, batch)
        return Estimate(
            method.name, method.kind, part.peak, part.categories, part.phases, state, *slopes
        )

    def _slopes(
        self, method: Method, batch: int
    ) -> tuple[dict[str, int], dict[str, tuple[float, float]]]:
        """What an example and a token add to each pass over the model, see `Estimate`.

        They are the plain model's: adapters and frozen layers change them little.
        """
        backward = method.kind == "backprop" or method.graph

        def phases(batch: int, seq: int) -> dict[str, int]:
            part = self._pass(_PLAIN, batch, seq) if backward else self._inference(batch, seq)
            return part.phases

        # Shorter ones: twice as long could be more than the model's positions.
        sizes = [self.seq, max(1, self.seq // 2), max(1, self.seq // 4)]
        here, half, quarter = (phases(batch, seq) for seq in sizes)
        wider = phases(2 * batch, self.seq)
        per_example, per_token = {}, {}
        for phase in here.keys() - {"load"}:
            per_example[phase] = (wider[phase] - here[phase]) // batch
            per_token[phase] = _parabola(sizes, [here[phase], half[phase], quarter[phase]])
        if method.kind == "zeroth-order":
            for name in ("forward +", "forward -"):
                per_example[name], per_token[name] = per_example["forward"], per_token["forward"]
        return per_example, per_token

    def _inference(self, batch: int, seq: int) -> _Part:
        key = ("inference", False, batch, seq)
        if key not in self._passes:
            self._passes[key] = self._forward_only(_INFERENCE, batch, seq)[0]
        return self._passes[key]

    def _forward_only(self, method: Method, batch: int, seq: int) -> tuple[_Part, int]:
        meter = StorageMeter()
        inputs = self.spec.inputs(batch, seq)
        trained = [param for param in self._plain.parameters() if param.requires_grad]
        with meter:
            # What keeps its own graph makes its state as it goes: it is there in a second step.
            steps = 2 if method.graph else 1
            optimizer = run_steps(self._plain, inputs, method, meter, steps=steps)
            state = meter.live["optimizer state"]
        for param in trained:
            param.requires_grad_()
        del optimizer
        return _Part.of(meter), state

    def _build(self, adapt: Callable[[nn.Module], nn.Module]) -> nn.Module:
        with _disable_current_modes(), torch.device("meta"):
            model = adapt(self.spec.build(self.checkpointing))
        return _faked(model)

    def _model(self, method: Method) -> nn.Module:
        if method.adapter is None:
            return self._plain
        if method.name not in self._adapted:
            self._adapted[method.name] = self._build(method.adapter)
        return self._adapted[method.name]

    def _pass(self, method: Method, batch: int, seq: int) -> _Part:
        """Forward and backward, without any optimizer."""
        key = (method.name if method.adapter else "", method.fused, batch, seq)
        if key not in self._passes:
            model = self._model(method)
            model.train()
            meter = StorageMeter()
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
            self._passes[key] = _Part.of(meter)
        return self._passes[key]

    def _backprop(self, method: Method, batch: int) -> Estimate:
        passes = self._pass(method, batch, self.seq)
        update, state = self._update(method)
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
        slopes = self._slopes(method, batch)
        return Estimate(method.name, method.kind, peak, categories, phases, state, *slopes)

    def _update(self, method: Method) -> tuple[_Part, int]:
        """One update, all state and all gradients being there (fused: one gradient)."""
        model = self._model(method)
        optimizer = method.build(model)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        meter = StorageMeter()
        with meter:
            meter.enter_phase("update")
            meter.track([*model.parameters(), *model.buffers()], "parameters")
            gradients = [torch.empty_like(param) for param in params]
            meter.track(gradients, "gradients")
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            if isinstance(optimizer, DeclaredStateOptimizer):
                allocate_state(optimizer, meter)
                for param in repeated_shapes(optimizer):
                    param.grad = None
            else:
                optimizer.step()
                meter.track(tensors_of(list(optimizer.state.values())), "optimizer state")
            state = meter.live["optimizer state"]
            meter.forget_peaks()
            optimizer.step()
            model.zero_grad()
        return _Part.of(meter), state


def _parabola(sizes: Sequence[int], values: Sequence[int]) -> tuple[float, float]:
    """The coefficients of s and of s^2 through three points; (0, 0) if two of them are one."""
    (a, b, c), (x, y, z) = sizes, values
    if len({a, b, c}) < 3:
        return 0.0, 0.0
    first, second = (x - y) / (a - b), (y - z) / (b - c)
    square = max(0.0, (first - second) / (a - c))
    return first - square * (a + b), square


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


def _free(param: torch.Tensor) -> None:
    param.grad = None
