"""First-order steps compared with torch's fused AdamW, fused backward, and planned memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import zoopt
from zoopt.bench import common, methods, models
from zoopt.bench.galore_floor import Floor
from zoopt.doctor.gpu import rows
from zoopt.doctor.gpu.rows import Emit
from zoopt.doctor.gpu.scale import Scale
from zoopt.memory.measure import measure_here
from zoopt.memory.methods import Method
from zoopt.memory.plan import plan
from zoopt.memory.step import loss_of
from zoopt.nn.modules import linear_layers

SECTION, FUSED, PLAN = "first-order steps", "fused backward", "planned memory"
SETTING = "step"
#: torch's AdamW, the reference for all methods, and the floor of GaLore's steps.
REFERENCE, FLOOR = "torch.optim.AdamW(fused=True)", "GaLore's floor"
NEAREST = "GaLoreAdamW, to nearest"
OURS = (
    *("zoopt.AdamW", "zoopt.AdamW, bfloat16 state", "zoopt.AdamW, int8 state"),
    *("zoopt.AdamW, int4 state", "SM3", "GaLoreAdamW", "GaLoreAdamW, int8 state"),
    *("Apollo", "ApolloMini", "Fira"),
)
#: The two ways to step, in the order in which they are measured.
UNFUSED, IN_BACKWARD = "forward, backward and step", "step in backward"
FUSED_METHODS = ("zoopt.AdamW, int8 state", "GaLoreAdamW, int8 state")
PLANNED = ("MeZO", "zoopt.AdamW, int8 state", "GaLoreAdamW, int8 state, fused backward")
#: An update gap so long that no timed step computes a new subspace.
NEVER = 1 << 30


def measure(scale: Scale, device: torch.device, emit: Emit) -> None:
    """Time the optimizer's step alone, one method at a time, each with its own state and peak."""
    model, inputs = _model(scale, device)
    loss_of(model, inputs).backward()  # type: ignore[no-untyped-call]
    reference = _step(model, Method(REFERENCE, "backprop", _fused_adamw), scale, device, emit)
    known = {method.name: method for method in _methods(scale)}
    floor = Method(FLOOR, "backprop", _floor(scale.rank))
    ours = [known[name] for name in OURS]
    for method in (*ours, _nearest(known), floor, *methods.peers(scale.rank)):
        _step(model, method, scale, device, emit, to=reference)


def measure_fused(scale: Scale, device: torch.device, emit: Emit) -> None:
    """Time forward, backward and update, with the update after the backward pass or within it."""
    model, inputs = _model(scale, device)
    known = {method.name: method for method in _methods(scale)}
    for name in FUSED_METHODS:
        with _told(emit, FUSED, name, IN_BACKWARD):
            times: dict[str, list[float]] = {}
            for kind in (UNFUSED, IN_BACKWARD):
                optimizer = _still(known[name].build(model))
                fusion = contextlib.nullcontext() if kind == UNFUSED else _fuse(model, optimizer)
                with fusion:
                    step = {kind: lambda o=optimizer: _whole_step(model, inputs, o)}
                    times |= common.round_robin(step, device, scale.repeats, name)
                del optimizer, step
                rows.forget(device)
            for kind, seconds in times.items():
                emit(rows.timed(FUSED, name, kind, seconds, to=times[UNFUSED]))


def measure_plan(scale: Scale, device: torch.device, emit: Emit) -> None:
    """The peak of two steps, as planned and as allocated (on a CPU: as counted)."""
    spec = models.spec(scale.model)
    known = {method.name: method for method in _methods(scale)}
    for name in PLANNED:
        with _told(emit, PLAN, name, "measured", unit="bytes"):
            planned = plan(spec, optimizers=[known[name]], seq=scale.seq, dtype="bfloat16")
            emit(rows.counted(PLAN, name, "planned", planned.estimates[0].peak, "bytes"))
            found = measure_here(
                *(spec, known[name]), batch=1, seq=scale.seq, dtype=torch.bfloat16,
                device=device.type,
            )  # fmt: skip
            peak = found.allocated or found.peak
            ratio = planned.estimates[0].peak / peak
            emit(rows.counted(PLAN, name, "measured", peak, "bytes", ratio=ratio))
        rows.forget(device)


def _model(scale: Scale, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    spec = models.spec(scale.model)
    model = models.build(spec, torch.bfloat16, device)
    return model, models.inputs_on(spec, 1, scale.seq, device)


def _methods(scale: Scale) -> list[Method]:
    return [entry.method for entry in methods.table(scale.rank).values() if not entry.checkpointing]


def _nearest(known: dict[str, Method]) -> Method:
    """GaLore that rounds weights to nearest."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = known["GaLoreAdamW"].build(model)
        for group in optimizer.param_groups:
            group["rounding"] = "nearest"
        return optimizer

    return Method(NEAREST, "backprop", build)


def _fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=methods.LR, fused=True)


def _floor(rank: int) -> Callable[[nn.Module], Any]:
    """The minimal work of a GaLore step, and torch's fused AdamW for parameters not projected."""

    class Floors:
        def __init__(self, model: nn.Module) -> None:
            layers = linear_layers(model, "linear").values()
            weights = [p for layer in layers if isinstance(p := layer.weight, nn.Parameter)]
            projected = {id(weight) for weight in weights}
            self.param_groups: list[dict[str, Any]] = []
            self._floors = [Floor(w.detach(), rank, w.grad) for w in weights]
            rest = [param for param in model.parameters() if id(param) not in projected]
            self._rest = torch.optim.AdamW(rest, lr=methods.LR, fused=True)

        def step(self) -> None:
            for floor in self._floors:
                floor()
            self._rest.step()

    return Floors


def _step(
    model: nn.Module,
    method: Method,
    scale: Scale,
    device: torch.device,
    emit: Emit,
    to: list[float] | None = None,
) -> list[float] | None:
    """Durations of the method's steps with the existing gradients; None if it fails."""
    seconds = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _told(emit, SECTION, SETTING, method.name):
        # A separate function, so that the state is freed when it ends, even if memory ran out.
        seconds = _durations(model, method, scale, device)
        cuda = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if cuda else None
        emit(rows.timed(SECTION, SETTING, method.name, seconds, to=to or seconds, peak=peak))
    rows.forget(device)
    return seconds


def _durations(model: nn.Module, method: Method, scale: Scale, device: torch.device) -> list[float]:
    optimizer = _still(method.build(model))
    return common.round_robin({"": optimizer.step}, device, scale.repeats, method.name)[""]


def _still(optimizer: Any) -> Any:
    """The optimizer with a tiny learning rate, and a subspace that is never updated."""
    for group in optimizer.param_groups:
        rate = group["lr"]
        group["lr"] = (
            torch.full_like(rate, methods.LR) if isinstance(rate, torch.Tensor) else methods.LR
        )
        for name, value in (("update_proj_gap", NEVER), ("stagger", False)):
            if name in group:
                group[name] = value
    if type(optimizer).__module__.startswith("galore_torch"):
        _fix_bases(optimizer)
    return optimizer


def _fix_bases(optimizer: Any) -> None:
    """Give the published GaLore zero bases of the right size; otherwise each would take an SVD."""
    projector_class = sys.modules["galore_torch.galore_projector"].GaLoreProjector
    for group in optimizer.param_groups:
        for param in group["params"] if "rank" in group else ():
            m, n = param.shape
            rank = group["rank"]
            projector = projector_class(rank, update_proj_gap=NEVER, scale=group["scale"])
            shape = (rank, n) if m >= n else (m, rank)
            projector.ortho_matrix = torch.zeros(shape, device=param.device, dtype=param.dtype)
            optimizer.state[param] = {"step": 1, "projector": projector}


def _fuse(model: nn.Module, optimizer: Any) -> Any:
    return zoopt.fuse_backward(model, optimizer)


def _whole_step(model: nn.Module, inputs: dict[str, Any], optimizer: Any) -> None:
    loss_of(model, inputs).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def _told(emit: Emit, section: str, setting: str, method: str, unit: str = "ms") -> Iterator[None]:
    """Turn an error into a row, so that the other methods are still measured."""
    try:
        yield
    except Exception as error:
        emit(rows.failed(section, setting, method, unit, error))
