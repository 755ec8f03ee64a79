"""A stub GPU: runs Triton's launcher, from the binder to the compiler, without a device.

`stub_gpu(target)` makes zoopt launch Triton kernels on CPU tensors. Nothing is executed, so results
mean nothing. `launches(function)` counts the requests of a call to the device. Use it in a separate
process, because a process has only one Triton driver.

    with stub_gpu("sm_90"):
        recorded = launches(lambda: optimizer.step(closure))
    assert len(recorded.launches) == 3 and recorded.copies == 0 and recorded.waits == 1
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from zoopt.kernels import dispatch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Triton caches compiled kernels by device number, so use numbers that no real GPU has.
_FIRST_DEVICE = 1000


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, grid, arguments and options, and the compiled kernel.

    `specialization` is Triton's key for variants. `compiled` is None unless requested.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    specialization: str
    compiled: Any


@dataclasses.dataclass
class Recorded:
    """The requests of one call to the device.

    Attributes:
        launches: the launches in order.
        copies: tensors created from Python numbers; each needs a copy to the device.
        waits: tensor values that Python read (`.item()`, `bool(tensor)`); each waits for the
            device.
        others: torch's own operations that compute something; each is at least one launch.
            Operations on int64 () counters are left out, which are on the CPU in real runs too.
    """

    launches: list[Launch] = dataclasses.field(default_factory=list)
    copies: int = 0
    waits: int = 0
    others: list[str] = dataclasses.field(default_factory=list)

    def of(self, kernel: str) -> list[Launch]:
        """The launches of one kernel."""
        return [launch for launch in self.launches if launch.kernel == kernel]


class _Driver:
    """A driver that answers Triton's questions for a target."""

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target]
        self.index = _FIRST_DEVICE + list(TARGETS).index(target)
        self.stream = 0
        self.launcher_cls = lambda src, metadata: lambda *args: None
        self.utils = types.SimpleNamespace(
            # 227 KiB a block on sm_90; kernels here use little.
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "warpSize": 32},
            load_binary=lambda name, binary, shared, device: (0, 0, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int | None = None) -> int:
        return self.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def another_stream() -> Iterator[None]:
    """Inside `stub_gpu`: what is launched goes to another stream."""
    driver = triton.runtime.driver.active
    driver.stream += 1
    try:
        yield
    finally:
        driver.stream -= 1


@contextlib.contextmanager
def stub_gpu(target: str = "sm_90") -> Iterator[None]:
    """Make zoopt treat CPU tensors as a GPU's; `target` is a key of `TARGETS`."""

    def best(theta: Tensor) -> str:
        return "reference" if theta.dtype == torch.float64 else "triton"

    driver = _Driver(target)
    hip = "stub" if driver.target.backend == "hip" else None
    config = triton.runtime.driver
    before, config._active = config._active, driver
    try:
        with (
            mock.patch.object(dispatch, "_best", best),
            mock.patch.object(dispatch, "waits", return_value=True),
            mock.patch.object(dispatch, "on_gpu", return_value=True),
            mock.patch.object(torch, "mm", _mm),
            mock.patch.object(torch.version, "hip", hip),
        ):
            yield
    finally:
        config._active = before


_torch_mm = torch.mm


def _mm(a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Tensor | None = None) -> Tensor:
    """torch.mm, extended for CPU tensors by the products that only a GPU's torch.mm supports."""
    if out_dtype is None:
        return _torch_mm(a, b, out=out)
    if a.dtype not in (torch.float16, torch.bfloat16) or b.dtype != a.dtype:
        raise RuntimeError("out_dtype needs two matrices of one 16-bit dtype")
    mode = _METERS[-1] if _METERS else None
    with contextlib.nullcontext() if mode is None else mode.paused():
        product = _torch_mm(a.to(out_dtype), b.to(out_dtype), out=out)
    if mode is not None:
        mode.recorded.others.append("mm into float32")
    return product


def launches(function: Callable[[], Any], *, compiled: bool = False) -> Recorded:
    """Call the function, and return its requests to the stub GPU.

    Args:
        compiled: also compile each kernel for the stub's target. By default launches stop before
            the compiler, which takes most of the time.
    """
    recorded, run = Recorded(), JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        device = triton.runtime.driver.active.get_current_device()
        bound, specialization, options = self.device_caches[device][-1](*args, **kwargs)
        recorded.launches.append(
            Launch(self.__name__, grid, bound, options, repr(specialization), kernel)
        )
        return kernel

    knob = triton.knobs.runtime
    before, knob.jit_cache_hook = knob.jit_cache_hook, None if compiled else (lambda **_: True)
    try:
        meter = _Meter(recorded)
        _METERS.append(meter)
        with mock.patch.object(JITFunction, "run", record), meter, _Reads(recorded):
            function()
    finally:
        knob.jit_cache_hook = before
        _METERS.clear()
    return recorded


#: The meter of the current call, if any.
_METERS: list[_Meter] = []


class _Reads(TorchFunctionMode):
    """Counts reads of whole tensors; each waits once."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.recorded = recorded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func in (Tensor.tolist, Tensor.cpu, Tensor.numpy) and args[0].dim()
        self.recorded.waits += bool(reads)
        return func(*args, **(kwargs or {}))


#: Operations that only allocate or refer to memory.
_MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh"}
_MEMORY |= {"_local_scalar_dense", "is_set_to", "_unsafe_view", "set_", "resize_"}
_MEMORY |= {"_record_function_enter_new", "_record_function_exit"}


class _Meter(TorchDispatchMode):
    """Counts copies to the device, waits for it, and torch's own operations."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.recorded, self.counts = recorded, True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count operations inside."""
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.counts or _counter(args[:1]):
            pass
        elif func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default):
            self.recorded.copies += 1
        elif func is torch.ops.aten._local_scalar_dense.default:
            self.recorded.waits += 1
        elif not (func.is_view or func._opname in _MEMORY):
            self.recorded.others.append(func._opname)
        return func(*args, **(kwargs or {}))


def _counter(args: Any) -> bool:
    """Whether the first argument is a counter, which is on the CPU."""
    return any(
        isinstance(value, Tensor) and value.dtype == torch.int64 and not value.dim()
        for value in args
    )
