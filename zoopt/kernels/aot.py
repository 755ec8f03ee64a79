"""Compile the Triton kernels ahead of time, for a GPU that need not be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zoopt.kernels import gpu

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KERNELS = {
    "perturb": gpu.perturb_kernel,
    "apply": gpu.apply_kernel,
    "momentum": gpu.momentum_kernel,
    "perturb_rows": gpu.rows_kernel,
}
_TYPES = {
    "buffer": "*fp32",
    "coefficients": "*fp32",
    "gradients": "*fp32",
    "draws": "*i32",
    "rows": "*i64",
    "alpha": "fp32",
    "decay": "fp32",
    "momentum": "fp32",
    "step_size": "fp32",
    "numel": "i64",
    "first": "i64",
    "offset": "i64",
}
#: What a launch on a whole tensor specialises: pointers, and the size of all but the last blocks.
_DIVISIBLE = {"theta", "out", "weight", "buffer", "coefficients", "gradients", "draws", "numel"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: its name, theta's dtype, and the constants that shape it."""

    kernel: str
    dtype: str
    distribution: str
    rounding: str

    @property
    def block(self) -> int:
        """Elements a program."""
        return gpu.ROW_BLOCK if self.kernel == "perturb_rows" else gpu.BLOCK

    def compile(self, target: str) -> Any:
        """The compiled kernel, with its `asm`, `metadata` and (on CUDA) cubin.

        Args:
            target: a key of `TARGETS`.
        """
        function = _KERNELS[self.kernel]
        constants = {
            "NORMAL": self.distribution == "normal",
            "STOCHASTIC": self.rounding == "stochastic",
            "ALIGNED": True,
            "BACKEND": TARGETS[target].backend,
            "BLOCK": self.block,
        }
        constants = {name: constants[name] for name in function.arg_names if name in constants}
        signature = {name: self._type(name, constants) for name in function.arg_names}
        attributes = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(function.arg_names)
            if name in _DIVISIBLE
        }
        source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": gpu.NUM_WARPS[TARGETS[target].backend], "enable_fp_fusion": False}
        return triton.compile(source, target=TARGETS[target], options=options)

    def _type(self, name: str, constants: dict[str, Any]) -> str:
        if name in constants:
            return "constexpr"
        if name in ("theta", "out", "weight"):
            return f"*{self.dtype}"
        return _TYPES.get(name, "i32")


def variants() -> Iterator[Variant]:
    """Every variant of every kernel that a launch can ask for on a whole tensor."""
    for kernel in _KERNELS:
        for dtype in _DTYPES:
            for distribution in ("normal", "rademacher"):
                yield Variant(kernel, dtype, distribution, "nearest")
                if kernel in ("apply", "momentum") and dtype != "fp32":
                    yield Variant(kernel, dtype, distribution, "stochastic")
