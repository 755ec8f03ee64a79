"""Runs PTX instructions on arrays, one by one, with the bits that a GPU has.

Only what `zoopt.kernels.runtime.gpu_ptx` uses. A register is a uint32 array, a predicate a bool
one. What a GPU computes approximately is off by as many units as a test wishes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Register = Any


def floats(register: Register) -> Any:
    """A register's bits as float32."""
    return np.asarray(register, np.uint32).view(np.float32)


def bits(values: Any) -> Register:
    """float32 numbers' bits; of NaNs those that a GPU makes."""
    values = np.asarray(values, np.float32)
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), values.view(np.uint32))


def fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c with one rounding: the product is exact in float64, and the sum is rounded to odd
    there, so that rounding it again is harmless."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = (total.view(np.uint64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    exact = (error == 0) | ~np.isfinite(error)
    return np.where(exact | ~even, total, odd).astype(np.float32)


def prmt(a: Register, b: Register, selector: int) -> Register:
    """The four bytes of the result, each one of the eight of a and b, or its sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both)
    for i in range(4):
        which = selector >> 4 * i & 15
        byte = both >> np.uint64(8 * (which & 7)) & np.uint64(255)
        if which & 8:
            byte = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def _off(values: Any, units: int) -> Any:
    """Finite numbers that many units in the last place further on."""
    shifted = (values.view(np.uint32) + np.uint32(units & 0xFFFFFFFF)).view(np.float32)
    return np.where(np.isfinite(values) & (values != 0), shifted, values)


def _flushed(values: Any) -> Any:
    tiny = np.abs(values) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def function(name: str, units: int) -> Callable[..., Register]:
    """What an instruction computes of registers."""

    def of_floats(function: Callable[..., Any]) -> Callable[..., Register]:
        return lambda *registers: bits(function(*map(floats, registers)))

    one = np.float32(1)
    return {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "add": np.add,
        "sub": np.subtract,
        "mov": lambda a: a,
        "shl": np.left_shift,
        "shr": np.right_shift,
        "abs": lambda a: a & np.uint32(0x7FFFFFFF),
        "neg": lambda a: a ^ np.uint32(0x80000000),
        "mul.rn": of_floats(np.multiply),
        "add.rn": of_floats(np.add),
        "sub.rn": of_floats(np.subtract),
        "div.rn": of_floats(np.divide),
        "sqrt.rn": of_floats(np.sqrt),
        "fma.rn": of_floats(fma),
        "rsqrt.approx.ftz": of_floats(lambda a: _off(one / np.sqrt(_flushed(a)), units)),
        "rcp.approx.ftz": of_floats(lambda a: _flushed(_off(one / _flushed(a), units))),
        "setp.eq": np.equal,
        "setp.lt": lambda a, b: floats(a) < floats(b),
    }[name]


def run(asm: str, inputs: Sequence[Any], outputs: int, *, units: int = 0) -> list[Register]:
    """The output registers of inline assembly.

    Args:
        asm: instructions, in which registers are $0, $1 ...: outputs, and then inputs.
        inputs: uint32 arrays.
        outputs: how many outputs there are.
        units: by how much approximations are off.
    """
    inputs = [np.asarray(value, np.uint32) for value in inputs]
    registers: dict[str, Register] = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    # What has been jumped over, and to where.
    skipped, label = np.zeros(inputs[0].shape, bool), ""

    def value(operand: str) -> Register:
        if operand in registers:
            return registers[operand]
        if operand.startswith("0f"):
            return np.full(inputs[0].shape, int(operand[2:], 16), np.uint32)
        return np.full(inputs[0].shape, int(operand, 0), np.uint32)

    for line in re.split(r"[;{}\n]", asm):
        words = line.strip().replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        if words[0].endswith(":"):
            assert words[0][:-1] == label
            skipped, label = np.zeros_like(skipped), ""
            continue
        active = ~skipped
        if words[0].startswith("@"):
            active = active & registers[words.pop(0)[1:]]
        name, *operands = words
        if name == "bra":
            skipped, label = skipped | active, operands[0]
            continue
        if name.startswith("prmt"):
            a, b = map(value, operands[1:3])
            result = prmt(a, b, int(operands[3], 0))
        else:
            computes = function(re.sub(r"\.(b32|f32|u32)$", "", name), units)
            result = computes(*map(value, operands[1:]))
        old = registers.get(operands[0], np.zeros_like(result))
        registers[operands[0]] = np.where(active, result, old).astype(result.dtype)
    assert not label
    return [registers[f"${i}"] for i in range(outputs)]
