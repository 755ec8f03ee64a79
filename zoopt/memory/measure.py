"""The meter: the memory of real steps, by phase, each method in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from typing import Any

import torch

import zoopt
from zoopt.checks import check_choice, check_positive_int
from zoopt.memory import resident
from zoopt.memory.meter import Category, StorageMeter
from zoopt.memory.methods import Method, methods
from zoopt.memory.models import resolve
from zoopt.memory.plan import DTYPES, select
from zoopt.memory.spec import ModelSpec
from zoopt.memory.step import run_steps, state_tensors
from zoopt.memory.wrapped import COFI, GGPO_NOISE, sum_of


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The memory that steps of one method took.

    Attributes:
        name, kind: the method's.
        peak: bytes of tensors at the highest point, as the meter counts them on any device.
        categories: these bytes by category.
        phases: the peak of each phase: load, perturb, forward, backward, update ...
        state: bytes of optimizer state.
        resident: on the CPU, the growth of the process's resident memory since before the model was
            built; None on a GPU.
        allocated, reserved: on a GPU, the allocator's peaks; None on the CPU.
        allocated_phases: on a GPU, the allocator's peak of each phase.
    """

    name: str
    kind: str
    peak: int
    categories: dict[Category, int]
    phases: dict[str, int]
    state: int
    resident: int | None
    allocated: int | None
    reserved: int | None
    allocated_phases: dict[str, int]


def measure(
    model: str,
    optimizer: str,
    *,
    batch: int = 1,
    seq: int = 512,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    rank: int = 128,
    lora_rank: int = 8,
    device: str = "cpu",
    steps: int = 2,
) -> Measurement:
    """Run steps of a method in a new process, and measure their memory.

    Args:
        model, batch, seq, dtype, checkpointing, rank, lora_rank: as for `zoopt.memory.plan`; the
            weights are random.
        optimizer: the name of a method (see `zoopt.memory.methods`).
        device: `"cpu"` or `"cuda"`.
        steps: how many; the state exists from the second on.

    Returns:
        The measurement.

    Raises:
        TypeError, ValueError: as for `zoopt.memory.plan`.
        RuntimeError: the process failed; the message has the end of its output.
    """
    check_positive_int("steps", steps)
    check_choice("dtype", dtype, DTYPES)
    check_choice("device", device, ("cpu", "cuda"))
    [method] = select([optimizer], methods(rank, lora_rank))
    resolve(model)
    request = {
        "model": model,
        "optimizer": method.name,
        "batch": batch,
        "seq": seq,
        "dtype": dtype,
        "checkpointing": checkpointing,
        "rank": rank,
        "lora_rank": lora_rank,
        "device": device,
        "steps": steps,
    }
    command = [sys.executable, "-m", "zoopt.memory.measure", json.dumps(request)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
        raise RuntimeError(f"measuring {method.name} on {model} failed: {last[0]}")
    return Measurement(**json.loads(run.stdout.splitlines()[-1]))


def measure_here(
    spec: ModelSpec,
    method: Method,
    *,
    batch: int,
    seq: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
    device: str = "cpu",
    steps: int = 2,
) -> Measurement:
    """As `measure`, in this process; its other memory counts in `resident`, not in `peak`."""
    _load_kernels(device, dtype)
    before = resident.now()
    resident.forget_peak()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Made on the device itself, so that a large model need not fit on the CPU.
        with torch.device(device):
            model = spec.build(checkpointing)
        model = model.to(device)
    finally:
        torch.set_default_dtype(default)
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in spec.inputs(batch, seq).items()
    }
    cuda = device == "cuda"
    allocator = _Allocator() if cuda else None
    meter = StorageMeter()
    with meter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mark = allocator.enter if allocator is not None else None
        optimizer = run_steps(model, inputs, method, meter, steps=steps, mark=mark)
    state = 0
    if optimizer is not None:
        state = sum(tensor.nbytes for tensor in state_tensors(optimizer))
    if allocator is not None:
        allocator.enter("end")
    return Measurement(
        method.name,
        method.kind,
        meter.peak,
        meter.at_peak,
        dict(meter.phases),
        state,
        None if cuda else max(0, resident.peak() - before),
        max(allocator.phases.values()) if allocator is not None else None,
        torch.cuda.max_memory_reserved() if cuda else None,
        allocator.phases if allocator is not None else {},
    )


class _Allocator:
    """The CUDA allocator's peak of each phase."""

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self._phase = "load"
        torch.cuda.reset_peak_memory_stats()

    def enter(self, phase: str) -> None:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        self.phases[self._phase] = max(self.phases.get(self._phase, 0), peak)
        self._phase = phase
        torch.cuda.reset_peak_memory_stats()


def _load_kernels(device: str, dtype: torch.dtype) -> None:
    """Compile or load what the first step of a process would. A compilation keeps references to
    its callers' tensors for a while."""
    param = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    zoopt.MeZO([param], perturbation="inplace", seed=0).step(lambda: 0.0)
    param.grad = torch.ones_like(param)
    zoopt.AdamW([param], seed=0).step()
    layer = torch.nn.Linear(64, 64, device=device, dtype=dtype)
    layers = torch.nn.ModuleList([torch.nn.Sequential(layer)])
    optimizer = zoopt.AdamW(layers.named_parameters(), seed=0)
    for wrapping in (COFI, GGPO_NOISE):
        with wrapping.wrap(layers, optimizer, lambda: sum_of(layers)) as wrapper:
            sum_of(layers).backward()  # type: ignore[no-untyped-call]
            wrapping.step(optimizer, wrapper)


def _main(request: dict[str, Any]) -> None:
    [method] = select([request["optimizer"]], methods(request["rank"], request["lora_rank"]))
    measurement = measure_here(
        resolve(request["model"]),
        method,
        batch=request["batch"],
        seq=request["seq"],
        dtype=DTYPES[request["dtype"]],
        checkpointing=request["checkpointing"],
        device=request["device"],
        steps=request["steps"],
    )
    sys.stdout.write(json.dumps(dataclasses.asdict(measurement)) + "\n")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
