"""How wide the vectors of the CPU kernels are.

For some processors with AVX-512, LLVM chooses vectors of 256 bits, half of the full width. On an
Emerald Rapids that makes the kernels 50 % slower. The kernels set a width of their own, as an
attribute of each function, so that other code that numba compiles in the process is not affected.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import functools
import time

import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core import compiler, lowering, typed_passes
from numba.core.compiler_machinery import register_pass
from numba.core.registry import cpu_target

from zoopt.kernels.runtime import cache

#: How much faster the full width must be to be chosen against LLVM's preference.
MARGIN = 1.1
_FULL, _HALF = 512, 256
#: A sum of 512-bit vectors, which LLVM cuts to the width that it prefers.
_SUM = """
define void @sum(ptr %a, ptr %b) "min-legal-vector-width"="0" {
  %x = load <16 x float>, ptr %a
  %y = load <16 x float>, ptr %b
  %z = fadd <16 x float> %x, %y
  store <16 x float> %z, ptr %a
  ret void
}
"""


@functools.cache
def preferred() -> int | None:
    """The kernels' width in bits, or None where LLVM uses the machine's full width anyway."""
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    if not _has_512(features) or not halved(cpu, features):
        return None
    full, half = measured(_FULL), measured(_HALF)
    return _HALF if full > half * MARGIN else _FULL


def bits() -> int:
    """The kernels' width in bits, where LLVM chooses it too: 512, or less."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return _FULL if _has_512(features) and preferred() != _HALF else _HALF


def _has_512(features: str) -> bool:
    return "+avx512f" in features.split(",")


def halved(cpu: str, features: str) -> bool:
    """Whether LLVM makes vectors of 256 bits for a processor that has 512."""
    cpu_target.target_context.codegen()  # numba registers LLVM's targets.
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
    return "%zmm" not in machine.emit_assembly(llvm.parse_assembly(_SUM))


def measured(width: int) -> float:
    """Seconds that a loop of typical kernel work takes with vectors of this width."""
    loop = numba.njit(pipeline_class=_pipeline(width), error_model="numpy", nogil=True)(_loop)
    cache.keep(loop, lambda: width)
    values, words = np.zeros(1 << 14, np.float32), np.arange(1 << 14, dtype=np.uint32)
    least = np.inf
    # The first calls compile, and settle the core at the clock rate that such vectors allow.
    for _ in range(200):
        start = time.perf_counter()
        loop(values, words)
        least = min(least, time.perf_counter() - start)
    return float(least)


def _loop(values, words):
    """Philox's multiplications, and polynomials of their results."""
    for j in range(len(words)):
        word = words[j]
        for _ in range(4):
            product = np.uint64(word) * np.uint64(0xD2511F53)
            word = np.uint32(np.uint32(product >> np.uint64(32)) ^ np.uint32(product))
        x = np.float32(np.int32(word))
        p = np.float32(np.float32(x * np.float32(1e-10)) + np.float32(0.5))
        for _ in range(4):
            p = np.float32(np.float32(p * x) + np.float32(0.25))
        values[j] = p


def set_width(function, width):
    """Have LLVM make an llvmlite function's vectors this wide; None leaves it the choice."""
    if width is not None:
        # llvmlite's own `add` accepts only attributes without a value.
        set.add(function.attributes, f'"prefer-vector-width"="{width}"')


@functools.cache
def _pipeline(width):
    """numba's compiler with vectors of this width, or of the `preferred` one."""

    class Lower(lowering.Lower):
        def setup_function(self, fndesc):
            super().setup_function(fndesc)
            set_width(self.function, width or preferred())

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(typed_passes.NativeLowering):
        _name = f"zoopt_native_lowering_{width}"

        @property
        def lowering_class(self):
            return Lower

    class Compiler(compiler.CompilerBase):
        def define_pipelines(self):
            manager = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
            manager.passes = [
                (Lowering, what) if kind is typed_passes.NativeLowering else (kind, what)
                for kind, what in manager.passes
            ]
            manager.finalize()
            return [manager]

    return Compiler


#: The compiler of the kernels.
Compiler = _pipeline(None)
