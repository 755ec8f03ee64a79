"""As data: what is installed, which kernels run and why, and what else to install."""

from __future__ import annotations

import dataclasses
import os
import platform

import torch

import zoopt
from zoopt import noise
from zoopt.doctor import machine
from zoopt.kernels import dispatch
from zoopt.kernels.runtime import threads as cpu_threads

#: Optional packages: the extra that brings each, and what it is for.
PACKAGES = {
    "numba": ("cpu", "fast kernels on the CPU, with the same bits"),
    "triton": ("gpu", "kernels on a GPU"),
    "rich": ("cli", "this command line"),
    "matplotlib": ("cli", "charts of the benchmarks"),
    "psutil": ("cli", "memory of processes"),
    "transformers": ("demo", "ZOTrainer, named models in plans and benchmarks"),
    "peft": ("demo", "LoRA, in the benchmarks' baselines"),
    "accelerate": ("demo", "ZOTrainer"),
}
#: Families whose implementation is chosen separately: name, one of its functions, label.
FAMILIES = (
    ("noise", "weighted_sum", "noise"),
    ("adam", "adam", "Adam"),
    ("product", "add_product", "low-rank"),
)


@dataclasses.dataclass(frozen=True)
class Active:
    """Which implementation runs an operation on a device.

    Attributes:
        impl: `"reference"`, `"numba"` or `"triton"` (float64 takes the reference everywhere).
        reason: why it was chosen.
    """

    device: str
    operation: str
    impl: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Advice:
    """Something to install or to set: its benefit, and how to do it."""

    package: str
    gain: str
    remedy: str


def versions() -> dict[str, str | None]:
    """The versions of zoopt, its noise, Python, torch and the optional packages."""
    return {
        "zoopt": zoopt.__version__,
        "noise": str(noise.NOISE_VERSION),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": machine.version("numpy"),
        **{package: machine.version(package) for package in PACKAGES},
        "commit": machine.commit(),
    }


def devices() -> dict[str, str]:
    """The CPU and every GPU, in words."""
    found = {"cpu": f"{machine.cpu_model()}, {machine.cores()} cores"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, "
            f"compute capability {gpu.major}.{gpu.minor}, driver {machine.driver()}"
        )
    return found


def active() -> list[Active]:
    """Which implementation runs each family of operations, for each device."""
    rows = []
    for device in devices():
        theta = torch.empty(0, device=device)
        for family, function, operation in FAMILIES:
            module = getattr(dispatch.choose(theta, None, family), function).__module__
            impl = _impl_of(module)
            rows.append(Active(device, operation, impl, _reason(device, impl)))
    return rows


def _impl_of(module: str) -> str:
    """The implementation to which a kernels module belongs, for example numba."""
    prefix = module.rpartition(".")[2].partition("_")[0]
    return {"cpu": "numba", "gpu": "triton"}.get(prefix, "reference")


def _reason(device: str, impl: str) -> str:
    package = "triton" if device.startswith("cuda") else "numba"
    if package == "triton" and impl == "reference":
        obstacle = dispatch.triton_obstacle(torch.device(device).index or 0)
        if obstacle is not None:
            return obstacle
    installed = machine.version(package)
    if impl == "numba":
        return f"numba {installed} is installed; {cpu_threads.kind()}"
    if impl != "reference":
        return f"{impl} {installed} is installed"
    if installed is None:
        return f"{package} is not installed"
    return f"there is no {package} kernel for it"


def compiled_kernels() -> dict[str, str]:
    """Where the CPU kernels' machine code is kept on disk; removes damaged files and names them.

    Kernels that have not been used yet are not listed.
    """
    if machine.version("numba") is None:
        return {}
    from zoopt.kernels.runtime import cache

    found = {str(folder): "kept here" for folder in cache.directories()}
    repaired = cache.repair()
    found |= {str(path): "was damaged; removed" for path in repaired.removed}
    found |= {str(path): "cannot be read; remove it" for path in repaired.left}
    return found or {"nowhere": "set NUMBA_CACHE_DIR to a directory that can be written to"}


def advice() -> list[Advice]:
    """Whatever is missing or not set, and would help on this machine."""
    rows = []
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        gain = (
            "speed beside other programs: else OpenMP's waiting threads spin, and take their cores"
        )
        rows.append(Advice("OMP_WAIT_POLICY", gain, "export OMP_WAIT_POLICY=PASSIVE before Python"))
    if torch.version.cuda is None and torch.version.hip is None and machine.driver() is not None:
        rows.append(
            Advice("torch with CUDA", "the GPU of this machine", "install a CUDA build of torch")
        )
    for package, (extra, gain) in PACKAGES.items():
        if machine.version(package) is None and (package != "triton" or torch.cuda.is_available()):
            rows.append(Advice(package, gain, f"pip install 'zoopt-torch[{extra}]'"))
    return rows
