"""Simulates a step on fake tensors. Methods share the parts of a step, so that each runs once.

Because layers repeat, parts run on models of a few layers. The results are extrapolated to the
whole model (see `zoopt.memory.timeline`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from zoopt.memory.depth import shortened, stacks_of
from zoopt.memory.estimate import Estimate, parabola
from zoopt.memory.methods import Method
from zoopt.memory.parts import Parts, whole_model
from zoopt.memory.recall import Recall
from zoopt.memory.shards import in_shards
from zoopt.memory.spec import ModelSpec
from zoopt.memory.timeline import Part, Timeline, extended
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.windows import WINDOW_BYTES

#: Repeated layers of the smaller model: the first, one in the middle, and the last.
_LAYERS = 3


@contextlib.contextmanager
def fake(dtype: torch.dtype) -> Iterator[FakeTensorMode]:
    """Tensors created inside have no values; their default dtype is the given one."""
    before = torch.get_default_dtype()
    # The garbage collector could free tensors at any operator, so it is disabled meanwhile.
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


def window_bytes(params: Sequence[Tensor], model: nn.Module) -> int:
    """How many bytes more than the temporaries of one operator a GPU holds at once, for parameters
    whose temporaries are made ahead.

    A buffer is of WINDOW_BYTES, or of one larger parameter, whose operator needs it all. A weight
    may end one buffer and its bias begin the next: both live as long as their operator.
    """
    several = any(len(module._parameters) > 1 for module in model.modules())
    total = sum(param.nbytes for param in params if param.nbytes < WINDOW_BYTES)
    return min(WINDOW_BYTES * (2 if several else 1), total)


class Simulation:
    """The steps of one model, under `fake`.

    Args:
        spec, checkpointing, seq: the model and sequence length to plan.
        gpu: count what only GPUs have: buffers of temporaries of forward passes, and of matrices
            that are updated together.
        processes: over how many FSDP2 divides the parameters; the step is that of one of them.
        whole: run every layer of the model; by default only a few of the repeated layers run.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpointing: bool,
        seq: int,
        *,
        gpu: bool = False,
        processes: int = 1,
        whole: bool = False,
    ) -> None:
        self.spec, self.seq, self.gpu, self.whole = spec, seq, gpu, whole
        self.processes = processes
        # A simulation of the whole model serves as the reference, so every operator runs there.
        self._recall = None if whole else Recall()
        with _disable_current_modes(), torch.device("meta"):
            self._meta = spec.build(checkpointing)
        self.parameters = sum(param.numel() for param in self._meta.parameters())
        self._whole: Parts | None = None
        self._short: dict[int, tuple[Parts, list[tuple[Parts, int]]] | None] = {}
        self._parts: dict[tuple[str, bool, int, int], Part] = {}
        self._updates: dict[Method, Part] = {}

    def estimate(self, method: Method, batch: int) -> Estimate:
        """Estimate the method's memory at that batch size."""
        if self.processes > 1:
            in_shards(method)  # It raises before anything runs.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backward = method.kind == "backprop" or method.graph
            if method.kind == "backprop":
                part, state = self._backprop(method, batch)
            elif method.kind == "inference":
                part, state = self._inference(batch, self.seq), 0
            else:
                # Shards have no temporaries: forward passes read what is gathered.
                buffers = self._buffers(method) if self.gpu and self.processes == 1 else 0
                part = self._part("forward_only", method, batch, self.seq, buffers=buffers)
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
        own = method.adapter or method.wrapping
        key = (method.name if own else "", method.fused, batch, seq)
        if key not in self._parts:
            self._parts[key] = self._part("passes", method, batch, seq)
        return self._parts[key]

    def _inference(self, batch: int, seq: int) -> Part:
        key = ("inference", False, batch, seq)
        if key not in self._parts:
            self._parts[key] = self._part("forward_only", _INFERENCE, batch, seq)
        return self._parts[key]

    def _buffers(self, method: Method) -> int:
        """The bytes of a GPU's temporaries beyond those of one operator, in a forward pass."""
        model = method.prepare(whole_model(self._meta))
        optimizer = method.build(model)
        if not isinstance(optimizer, ZerothOrderOptimizer):
            return 0
        return window_bytes(optimizer.in_windows(), model)

    def _part(self, name: str, method: Method, *sizes: int, buffers: int = 0) -> Part:
        """A part of the whole model's step; `name` is a method of `Parts`.

        Args:
            buffers: bytes that forward passes hold besides.
        """
        return self._timeline(name, method, *sizes).buffered("forward", buffers).part

    def _timeline(self, name: str, method: Method, *sizes: int) -> Timeline:
        # A GPU updates matrices of all layers together, up to a window: no layer is like the next.
        together = self.gpu and name == "update" and not method.fused
        short = None if together else self._shortened(_LAYERS + method.layers)
        if short is not None:
            base, deeper = short
            timeline = extended(
                getattr(base, name)(method, *sizes),
                [(getattr(parts, name)(method, *sizes), more) for parts, more in deeper],
            )
            if timeline is not None:
                return timeline
        if self._whole is None:
            self._whole = self._new_parts(self._meta)
        whole: Timeline = getattr(self._whole, name)(method, *sizes)
        return whole

    def _shortened(self, units: int) -> tuple[Parts, list[tuple[Parts, int]]] | None:
        """The parts of a model with `units` of each repeated layer. For each kind of layer, also
        the parts of a model with one layer more, and how many more layers the whole model has.
        None if layers do not repeat."""
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
                    made.append(self._new_parts(model))
                more = [family[0].units - units for family in families]
                self._short[units] = made[0], list(zip(made[1:], more, strict=True))
        return self._short[units]

    def _new_parts(self, model: nn.Module) -> Parts:
        return Parts(self.spec, model, self._recall, gpu=self.gpu, processes=self.processes)

    def _backprop(self, method: Method, batch: int) -> tuple[Part, int]:
        passes = self._passes(method, batch, self.seq)
        # On a CPU an optimizer's update is the same whether it is fused or not. A GPU's fused one
        # is that of a layer.
        optimizer = dataclasses.replace(method, name="", fused=self.gpu and method.fused)
        if optimizer not in self._updates:
            self._updates[optimizer] = self._part("update", method)
        update = self._updates[optimizer]
        state = update.last["optimizer state"]
        phases = {name: peak + state for name, peak in passes.phases.items()}
        phases["update"] = update.peak
        categories, peak = passes.categories | {"optimizer state": state}, passes.peak + state
        if method.fused:
            # Updates run during the backward pass.
            workspace = update.categories["workspace"]
            categories, peak = categories | {"workspace": workspace}, peak + workspace
            phases["update"] = update.peak - update.categories["gradients"]
        elif update.peak > peak:
            categories, peak = update.categories, update.peak
        return Part(categories, phases, peak, update.last), state

    def _growth(
        self, backward: bool, batch: int
    ) -> tuple[dict[str, int], dict[str, tuple[float, float]]]:
        """What each example and each token add to the memory of each pass (see `Estimate`).

        The figures are those of the plain model. Adapters and frozen layers change them little.
        """

        def phases(batch: int, seq: int) -> dict[str, int]:
            part = self._passes(_PLAIN, batch, seq) if backward else self._inference(batch, seq)
            return part.phases

        # Use shorter sequences: twice the length could exceed the model's positions.
        sizes = [self.seq, max(1, self.seq // 2), max(1, self.seq // 4)]
        here, half, quarter = (phases(batch, seq) for seq in sizes)
        wider = phases(2 * batch, self.seq)
        per_example, per_token = {}, {}
        for phase in here.keys() - {"load"}:
            per_example[phase] = (wider[phase] - here[phase]) // batch
            per_token[phase] = parabola(sizes, [here[phase], half[phase], quarter[phase]])
        return per_example, per_token
