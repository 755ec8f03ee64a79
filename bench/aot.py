"""Compile the Triton kernels ahead of time, for a GPU that need not be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zoopt.kernels.noise import gpu, gpu_kernels
from zoopt.kernels.sm3 import gpu as gpu_sm3
from zoopt.kernels.sm3 import gpu_kernels as gpu_sm3_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KERNELS = {
    "perturb": gpu_kernels.perturb_kernel,
    "apply": gpu_kernels.apply_kernel,
    "add": gpu_kernels.apply_kernel,
    "momentum": gpu_kernels.momentum_kernel,
    "adam_window": gpu_kernels.adam_kernel,
    "perturb_rows": gpu_kernels.rows_kernel,
    "sm3": gpu_sm3_kernels.sm3_kernel,
    "sm3_momentum": gpu_sm3_kernels.sm3_kernel,
}
#: Kernels without a direction, hence of one distribution only.
_NOISELESS = ("sm3", "sm3_momentum")
_TYPES = {
    "buffer": "*fp32",
    "addend": "*fp32",
    "coefficients": "*fp32",
    "gradients": "*fp32",
    "first_weights": "*fp32",
    "second_weights": "*fp32",
    "closes": "*i32",
    "draws": "*i32",
    "rows": "*i64",
    "row": "*i32",
    "column": "*i32",
    "new_row": "*i32",
    "new_column": "*i32",
    "alpha": "fp32",
    "keep": "fp32",
    "gain": "fp32",
    "decay": "fp32",
    "momentum": "fp32",
    "complement": "fp32",
    "step_size": "fp32",
    "eps": "fp32",
    "numel": "i64",
    "first": "i64",
    "offset": "i64",
}
#: What a launch on a whole tensor specialises: pointers, and the size of all but the last blocks.
_DIVISIBLE = {"theta", "out", "weight", "buffer", "addend", "numel"}
_DIVISIBLE |= {"coefficients", "gradients", "draws"}
_DIVISIBLE |= {"gradient", "row", "column", "new_row", "new_column", "n"}
_DISTRIBUTIONS = ("normal", "rademacher", "masked normal", "masked rademacher")
#: Kernels that can round stochastically.
_ROUNDED = ("apply", "add", "momentum", "adam_window", *_NOISELESS)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: its name, theta's dtype, and the constants that shape it.

    `distribution` begins with "masked" where the density is below 1, and is "none" of kernels
    without directions.
    """

    kernel: str
    dtype: str
    distribution: str
    rounding: str

    @property
    def block(self) -> int:
        """Elements a program."""
        adam = gpu.ADAM_BLOCK[self.masked]
        own = {"perturb_rows": gpu.ROW_BLOCK, "adam_window": adam}
        own |= dict.fromkeys(_NOISELESS, gpu_sm3.BLOCK)
        return own.get(self.kernel, gpu.BLOCK)

    def num_warps(self, target: str) -> int:
        """Warps a program."""
        if self.kernel in _NOISELESS:
            return gpu_sm3.NUM_WARPS
        return gpu.NUM_WARPS[TARGETS[target].backend]

    @property
    def bytes_per_element(self) -> int:
        """What is read and written of tensors of theta's size."""
        item = _DTYPES[self.dtype].itemsize
        beside = {"momentum": 8, "add": 4, "sm3": item, "sm3_momentum": item + 8}
        return 2 * item + beside.get(self.kernel, 0)

    @property
    def masked(self) -> bool:
        """Whether the density is below 1."""
        return self.distribution.startswith("masked")

    def compile(self, target: str) -> Any:
        """The compiled kernel, with its `asm`, `metadata` and (on CUDA) cubin.

        Args:
            target: a key of `TARGETS`.
        """
        function = _KERNELS[self.kernel]
        constants = {
            "NORMAL": self.distribution.endswith("normal"),
            "MASKED": self.masked,
            "STOCHASTIC": self.rounding == "stochastic",
            "ALIGNED": True,
            "BACKEND": TARGETS[target].backend,
            "BLOCK": self.block,
            "STRIDE": 1,
            "ROWS": gpu_sm3.ROWS,
        }
        if self.kernel == "apply":
            constants["addend"] = None
        if self.kernel in _NOISELESS:
            constants["rows"] = None
        if self.kernel == "sm3":
            constants["buffer"] = None
        return compile_for(
            target,
            function,
            {name: self._type(name) for name in function.arg_names},
            constants,
            _DIVISIBLE,
            self.num_warps(target),
        )

    def _type(self, name: str) -> str:
        if name in ("theta", "out", "weight", "gradient"):
            return f"*{self.dtype}"
        return _TYPES.get(name, "i32")


def compile_for(
    target: str,
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    num_warps: int,
) -> Any:
    """A kernel compiled for a key of `TARGETS`.

    Args:
        types: each argument's, where it is not constant.
        constants: constant arguments; those that the kernel lacks are left out.
        divisible: arguments that are multiples of 16, as launches on whole tensors specialise.
    """
    names = function.arg_names
    constants = {name: constants[name] for name in names if name in constants}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in divisible and name not in constants
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[target], options=options)


def variants() -> Iterator[Variant]:
    """Every variant of every kernel that a launch can ask for on a whole tensor."""
    for kernel in _KERNELS:
        for dtype in _DTYPES:
            for distribution in ("none",) if kernel in _NOISELESS else _DISTRIBUTIONS:
                yield Variant(kernel, dtype, distribution, "nearest")
                if kernel in _ROUNDED and dtype != "fp32":
                    yield Variant(kernel, dtype, distribution, "stochastic")
