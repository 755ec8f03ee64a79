"""Compile the Triton kernels of first-order optimizers ahead of time, as `aot` does the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from bench.aot import TARGETS, compile_for
from zoopt.kernels.adam import gpu as gpu_adam
from zoopt.kernels.adam.gpu_kernels import moments_kernel
from zoopt.kernels.adam.moments import Format
from zoopt.kernels.product import gpu as gpu_product
from zoopt.kernels.product.gpu_kernels import product_kernel

_DTYPES = ("fp32", "bf16", "fp16")
_CODES = {
    "float32": ("*fp32", "*fp32"),
    "bfloat16": ("*bf16", "*bf16"),
    "int8": ("*i8", "*u8"),
    "int4": ("*u8", "*u8"),
}
_ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
_INTEGERS = ("stream", "moment_draw", "rounding_draw", "k0", "k1", "m", "n")
_LONG = ("numel", "pairs", "first", "gradient_row")
_DIVISIBLE = {"theta", "gradient", "out", "first_codes", "first_scale", "second_codes"}
_DIVISIBLE |= {
    "second_scale",
    "direction_sums",
    "gradient_sums",
    "numel",
    "pairs",
    "n",
    "gradient_row",
}
_DIVISIBLE |= {"left", "right", "sign_left", "sign_right", "channel_scale"}
#: The rank that products are compiled with.
_RANK = 128


@dataclasses.dataclass(frozen=True)
class FirstOrderVariant:
    """One kernel as it is launched: its name, theta's dtype, the moments' format, the rounding.

    "adam" has a gradient of the dtype, in whose place its direction goes, and no theta;
    "adam_norms" sums squares as well, and its direction is float32. "product" is the product
    alone, "product_gradient" has both of the gradient's terms besides, and "scaled" a channel's
    scale alone; their format is "none".
    """

    kernel: str
    dtype: str
    format: str
    rounding: str

    @property
    def block(self) -> int:
        """Elements a program."""
        if self.format == "none":
            rows, columns = self._tile
            return rows * columns
        return gpu_adam.BLOCK

    @property
    def _tile(self) -> tuple[int, int]:
        """Rows and columns a program of a product."""
        if self.kernel == "scaled":
            return 1, gpu_product.PLAIN
        return gpu_product.NARROW_TILE if self._is_narrow else gpu_product.TILE

    @property
    def _is_narrow(self) -> bool:
        """Whether it is a product of factors of 16 bits, and nothing else."""
        return self.kernel == "product" and self.dtype != "fp32"

    def num_warps(self, target: str) -> int:
        """Warps a program."""
        warps = gpu_product.NUM_WARPS if self.format == "none" else gpu_adam.NUM_WARPS
        return warps[TARGETS[target].backend]

    @property
    def bytes_per_element(self) -> float:
        """What is read and written of tensors of theta's size."""
        item = _ITEM[self.dtype]
        if self.format == "none":
            return 2 * item + (0 if self.kernel == "product" else item)
        codes = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}[self.format]
        beside = {"adamw": 2 * item, "adam": item, "adam_norms": 4}[self.kernel]
        return 4 * codes + item + beside

    def compile(self, target: str) -> Any:
        """The compiled kernel, as by `aot.Variant.compile`."""
        common = {
            "STOCHASTIC": self.rounding == "stochastic",
            "ALIGNED": True,
            "BACKEND": TARGETS[target].backend,
        }
        constants = {**self._constants(), **common}
        function = product_kernel if self.format == "none" else moments_kernel
        types = {name: self._type(name) for name in function.arg_names}
        return compile_for(target, function, types, constants, _DIVISIBLE, self.num_warps(target))

    def _constants(self) -> dict[str, Any]:
        if self.format == "none":
            rows, columns = self._tile
            absent = {
                "product": ("gradient", "channel_scale", "sign_left", "sign_right"),
                "product_gradient": (),
                "scaled": ("left", "right", "sign_left", "sign_right"),
            }[self.kernel]
            k = gpu_product.NARROW_K if self._is_narrow else gpu_product.K
            shape = {"ROWS": rows, "COLUMNS": columns, "K": k, "NARROW": self.dtype != "fp32"}
            by = {"BY_ROW": True, "BY_COLUMN": False, "gradient_column": 1}
            return {**dict.fromkeys(absent), **shape, **by, "RANK": _RANK, "SIGN_RANK": _RANK}
        coded = self.rounding == "stochastic" and self.format != "float32"
        absent = ("out",) if self.kernel == "adamw" else ("theta",)
        if self.kernel != "adam_norms":
            absent += ("direction_sums", "gradient_sums")
        if self.format in ("float32", "bfloat16"):
            absent += ("first_scale", "second_scale")
        group = _RANK if self.kernel == "adam_norms" else 0
        own = {"FORMAT": self.format, "GROUP": group, "BLOCK": self.block, "CODED": coded}
        return {**dict.fromkeys(absent), **own}

    def _type(self, name: str) -> str:
        own = {"theta", "gradient"} | ({"out"} if self.kernel == "adam" else set())
        if name in own or (name in ("left", "right") and self.dtype != "fp32"):
            return f"*{self.dtype}"
        if name in ("first_codes", "second_codes"):
            return _CODES[self.format][name == "second_codes"]
        if name in _INTEGERS:
            return "i32"
        if name in _LONG:
            return "i64"
        return "*fp32" if name in _DIVISIBLE | {"out"} else "fp32"


def variants() -> Iterator[FirstOrderVariant]:
    """Every variant that a launch can ask for on a whole tensor."""
    for dtype in _DTYPES:
        for form in get_args(Format):
            for rounding in ("nearest", "stochastic"):
                if dtype != "fp32" or form != "float32" or rounding == "nearest":
                    yield FirstOrderVariant("adamw", dtype, form, rounding)
        for kernel in ("product", "product_gradient", "scaled"):
            yield FirstOrderVariant(kernel, dtype, "none", "nearest")
            if dtype != "fp32":
                yield FirstOrderVariant(kernel, dtype, "none", "stochastic")
    for form in get_args(Format):
        for kernel in ("adam", "adam_norms"):
            yield FirstOrderVariant(kernel, "fp32", form, "stochastic")
        yield FirstOrderVariant("adam", "bf16", form, "stochastic")
