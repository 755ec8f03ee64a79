"""Chooses the implementation: Triton on a GPU, numba on the CPU, the reference everywhere else."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zoopt.dtypes import NARROW
from zoopt.warn import warn

Number = TypeVar("Number", bool, int, float)
Impl = Literal["reference", "numba", "triton"]

_MODULES = {"reference": "reference", "numba": "cpu", "triton": "gpu"}
_REMEDY = {"numba": "pip install 'zoopt-torch[cpu]'", "triton": "pip install 'zoopt-torch[gpu]'"}
#: The oldest Triton that is supported, as the extra `gpu` requires.
LEAST_TRITON = (3, 2)
#: The least compute capability of an NVIDIA GPU for which every kernel compiles.
LEAST_CAPABILITY = (7, 0)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, hence on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape but no values (torch's FakeTensor). Nothing can be computed
    with it, but its memory can be counted."""
    return isinstance(tensor, FakeTensor)


def known(value: Tensor, otherwise: Number) -> Number:
    """The value of a tensor of one element, converted to the type of `otherwise`; `otherwise`
    itself if the tensor is a fake one without a value."""
    return otherwise if is_fake(value) else type(otherwise)(value.item())


def all_known(values: Tensor, otherwise: Number) -> list[Number]:
    """`known` of every element of a vector: they are read at once."""
    if is_fake(values):
        return [otherwise] * len(values)
    return [type(otherwise)(value) for value in values.tolist()]


#: Whether fake tensors stand for those of a GPU.
_planning = False


@contextlib.contextmanager
def planning_a_gpu(gpu: bool) -> Iterator[None]:
    """A context in which fake tensors stand for those of a GPU with kernels, or of a CPU."""
    global _planning
    before, _planning = _planning, gpu
    try:
        yield
    finally:
        _planning = before


def launches(theta: Tensor) -> bool:
    """Whether operations on theta are kernel launches: then one large batch beats many small
    ones."""
    if is_fake(theta):
        return _planning and theta.dtype != torch.float64
    return _best(theta) == "triton"


def waits(value: Tensor) -> bool:
    """Whether reading the value has to wait for a device that runs asynchronously."""
    return value.is_cuda and not is_fake(value)


def on_gpu(tensor: Tensor) -> bool:
    """Whether the tensor lies on a GPU, whose BLAS multiplies 16-bit matrices with float32 sums."""
    return tensor.is_cuda or (_planning and is_fake(tensor))


def native_bfloat16(tensor: Tensor) -> bool:
    """Whether the tensor is of bfloat16 and its device multiplies such matrices natively: 2 to 4
    times as fast as after a conversion to float32."""
    if tensor.dtype != torch.bfloat16:
        return False
    return on_gpu(tensor) or (tensor.device.type == "cpu" and _cpu_multiplies_bfloat16())


def multiplies_into_float32(tensor: Tensor) -> bool:
    """Whether a product of matrices of the tensor's 16-bit dtype can be returned in float32, by
    `torch.mm(..., out_dtype=torch.float32)`: on NVIDIA's GPUs, from torch 2.8 on, but for those
    that have refused it."""
    if not (on_gpu(tensor) and tensor.dtype in NARROW and _mm_has_out_dtype()):
        return False
    if is_fake(tensor):  # whose product torch refuses on a machine without a GPU
        return False
    return (tensor.device, tensor.dtype) not in _REFUSED


#: Devices and dtypes of matrices whose product could not be returned in float32.
_REFUSED: set[tuple[torch.device, torch.dtype]] = set()


def mm_into_float32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor | None:
    """The product of two matrices of one 16-bit dtype, in float32; None if this device refuses
    that, after which `multiplies_into_float32` is false there."""
    try:
        product: Tensor = torch.mm(a, b, out_dtype=torch.float32, out=out)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # NotImplementedError is one.
        _REFUSED.add((a.device, a.dtype))
        return None
    return product


def _mm_has_out_dtype() -> bool:
    return torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    # These are private to torch and may be missing; products are widened then.
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _package_obstacle() -> str | None:
    """Why the installed Triton cannot compile the kernels; None if it can."""
    found = _triton_version() if _installed("triton") else "none"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) >= LEAST_TRITON:
        return None
    return f"Triton {'.'.join(map(str, LEAST_TRITON))} or newer is needed, got {found}"


@functools.cache
def _triton_version() -> str:
    """That of the package by its own account, for the names of its distributions differ."""
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:
        return f"one that cannot be imported ({type(error).__name__})"


@functools.cache
def _device_obstacle(index: int) -> str | None:
    """Why there are no kernels for a GPU; None if there are."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    own, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
    return f"compute capability {least} or higher is needed, and cuda:{index} has {own}"


def triton_obstacle(index: int) -> str | None:
    """Why Triton's kernels cannot run on that GPU; None if they can."""
    return _package_obstacle() or _device_obstacle(index)


@functools.cache
def _runs_triton(index: int) -> bool:
    """Whether Triton's kernels run on that GPU. The first time that they do not, it warns."""
    obstacle = triton_obstacle(index)
    if obstacle is not None:
        _warn_once(obstacle)
    return obstacle is None


@functools.cache
def _warn_once(obstacle: str) -> None:
    remedy = _REMEDY["triton"]
    if obstacle != _package_obstacle():
        remedy = f"train on a GPU of capability {'.'.join(map(str, LEAST_CAPABILITY))} or higher"
    warn(
        f"{obstacle}, so PyTorch operations do what the GPU kernels do, many times slower; "
        f"remedy: {remedy}"
    )


def available_impls() -> tuple[Impl, ...]:
    """The implementations that can run in this process, best last.

    `"triton"` needs the triton package (3.2 or newer) and a GPU, or the environment variable
    TRITON_INTERPRET=1 (set before triton is first imported), which runs the kernels slowly on the
    CPU.
    """
    impls: list[Impl] = ["reference"]
    if _installed("numba"):
        impls.append("numba")
    if (torch.cuda.is_available() or interpreting()) and _package_obstacle() is None:
        impls.append("triton")
    return tuple(impls)


def choose(theta: Tensor, impl: str | None, family: str = "noise") -> ModuleType:
    """The module whose functions run on `theta`.

    Args:
        family: which operations, for example `"adam"`; default: those on noise.

    Raises:
        ValueError: `impl` is unknown, not available, or cannot take this tensor.
    """
    if is_fake(theta):
        return _module("fake")
    if impl is None:
        impl = _best(theta)
    elif impl not in get_args(Impl):
        known = ", ".join(map(repr, get_args(Impl)))
        raise ValueError(f"impl must be None or one of {known}, got {impl!r}")
    elif impl not in available_impls():
        remedy = _REMEDY[impl]
        if impl == "triton" and _package_obstacle() is None:
            remedy = "use a machine with a GPU, or set TRITON_INTERPRET=1 before importing triton"
        raise ValueError(f"impl={impl!r} is not available here; remedy: {remedy}, or impl=None")
    elif impl != "reference" and theta.dtype == torch.float64:
        raise ValueError(f"impl={impl!r} has no float64 kernel; use impl='reference' or impl=None")
    elif impl == "numba" and theta.device.type != "cpu":
        raise ValueError(f"impl='numba' needs a CPU tensor, got one on {theta.device}")
    elif impl == "triton" and not (on_gpu(theta) or interpreting()):
        raise ValueError(f"impl='triton' needs a CUDA tensor, got one on {theta.device}")
    elif impl == "triton" and on_gpu(theta) and not interpreting():
        obstacle = triton_obstacle(theta.get_device())
        if obstacle is not None:
            raise ValueError(f"impl='triton' cannot run: {obstacle}; use impl=None")
    return _module(f"{family}.{_MODULES[impl]}")


def takes_batches(backend: ModuleType) -> bool:
    """Whether an implementation works on a whole batch at once."""
    return bool(getattr(backend, "BATCHES", False))


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"zoopt.kernels.{name}")


def _best(theta: Tensor) -> Impl:
    if theta.dtype != torch.float64:
        if on_gpu(theta):
            return "triton" if _runs_triton(theta.get_device()) else "reference"
        if theta.is_cpu and _installed("numba"):
            return "numba"
    return "reference"
