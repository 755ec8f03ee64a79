"""A GPU without a GPU: kernels that Triton compiled for one, run on a CPU by their PTX, on arrays.

All threads of all programs go together; where their ways part, those that are furthest behind go
first. Memory is this process's own, so operations on CPU tensors compute what they would on a GPU.
Accesses outside tensors raise, as does a barrier or an exchange that some threads do not reach.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.stub_gpu import stub_gpu
from tests.ptx import bits, floats, function, prmt
from zoopt.kernels.operands import settled

Register = Any
_WARP = 32
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@contextlib.contextmanager
def emulated_gpu(target: str = "sm_90", *, units: int = 0) -> Iterator[None]:
    """Make zoopt launch Triton kernels on CPU tensors, and carry the launches out.

    Args:
        target: a key of `TARGETS`, of NVIDIA.
        units: by how many units in the last place approximations are off.
    """
    compile_ = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_(self, *args, grid=grid, warmup=warmup, **kwargs)
        device = triton.runtime.driver.active.get_current_device()
        bound, _, _ = self.device_caches[device][-1](*args, **kwargs)
        alive = [each for each in gc.get_objects() if type(each) is Tensor and settled(each)]
        with np.errstate(all="ignore"):
            _Kernel(kernel, grid, bound, alive, units).run()
        return kernel

    with stub_gpu(target), mock.patch.object(JITFunction, "run", run):
        yield


def _arguments(kernel: Any, bound: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a kernel is passed, in order, as (type, value): constants of the compiler are not."""

    def flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(kind, tuple):
            for own_kind, own in zip(kind, value, strict=True):
                yield from flat(own_kind, own)
        elif kind != "constexpr":
            yield kind, value

    for name, kind in kernel.src.signature.items():
        yield from flat(kind, bound[name])


class _Kernel:
    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        bound: dict[str, Any],
        tensors: Iterable[Tensor],
        units: int,
    ) -> None:
        self.warps, self.units = kernel.metadata.num_warps, units
        self.shape = (int(np.prod(grid)) * self.warps, _WARP)  # (all warps, lanes)
        self.parameters: list[Any] = []
        memory = list(tensors)
        for kind, value in _arguments(kernel, bound):
            if isinstance(value, Tensor):
                memory.append(value)
                self.parameters.append(np.uint64(value.data_ptr()))
            elif kind == "fp32":
                self.parameters.append(np.float32(value).view(np.uint32))
            else:
                size = 64 if kind.endswith("64") else 32
                self.parameters.append(_SIGNED[size](value).view(_UNSIGNED[size]))
        self.parameters += [np.uint64(0)] * 2  # Triton's own, unused.
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in memory if t.nbytes)
        self.starts = np.array([start for start, _ in ranges], np.uint64)
        self.ends = np.maximum.accumulate(np.array([end for _, end in ranges], np.uint64))
        self.base = int(self.starts[0]) & ~15
        shared = max(8, kernel.metadata.shared)
        self.shared = np.zeros((self.shape[0] // self.warps, shared), np.uint8)
        self.code, self.labels = _parsed(kernel.asm["ptx"])
        self.registers: dict[str, Register] = {}
        self.active = np.ones(self.shape, bool)

    def run(self) -> None:
        place = np.zeros(self.shape, np.int64)
        end = len(self.code)
        while (now := int(place.min())) < end:
            self.active = place == now
            guard, name, operands = self.code[now]
            if guard:
                taken = self.registers[guard.lstrip("!")]
                self.active = self.active & (~taken if guard[0] == "!" else taken)
            place[place == now] = now + 1
            if name.startswith("bra"):
                place[self.active] = self.labels[operands[0]]
            elif name == "ret":
                place[self.active] = end
            else:
                self.step(name.split("."), operands)

    def value(self, operand: str, size: int = 32) -> Register:
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("%"):
            return self.special(operand)
        if operand == "global_smem":
            number = 0
        elif operand.startswith("0f"):
            number = int(operand[2:], 16)
        else:
            number = int(operand.rstrip("U"), 0)
        return np.full(self.shape, number & (1 << size) - 1, _UNSIGNED[size])

    def special(self, name: str) -> Register:
        warp = np.arange(self.shape[0], dtype=np.uint32)[:, None]
        lane = np.arange(_WARP, dtype=np.uint32)[None, :]
        values = {
            "%laneid": lane,
            "%tid.x": warp % np.uint32(self.warps) * np.uint32(_WARP) + lane,
            "%ctaid.x": warp // np.uint32(self.warps),
        }
        return np.broadcast_to(values[name], self.shape).copy()

    def write(self, name: str, value: Register) -> None:
        if name == "_":
            return
        if self.active.all():
            self.registers[name] = value
        else:
            old = self.registers.get(name, np.zeros_like(value))
            self.registers[name] = np.where(self.active, value, old).astype(value.dtype)

    def step(self, name: list[str], operands: list[str]) -> None:
        kind = name[0]
        if kind in ("ld", "st"):
            self.access(name, operands)
        elif kind in ("shfl", "redux"):
            self.exchange(name, operands)
        elif kind == "bar":
            together = self.active.reshape(-1, self.warps * _WARP)
            assert (together.all(1) | ~together.any(1)).all()
        elif kind == "mov":
            self.move(operands)
        else:
            self.write(operands[0], self.compute(name, operands))

    def move(self, operands: list[str]) -> None:
        """Registers may be joined or split: {a, b}, the lowest first."""
        source = _parts(operands[1])
        target = _parts(operands[0])
        if len(source) == len(target):
            wide = operands[0].startswith("%rd")
            for to, own in zip(target, source, strict=True):
                self.write(to, self.value(own, 64 if wide else 32))
        elif len(target) > 1:
            whole = self.value(source[0])
            size = whole.dtype.itemsize * 8 // len(target)
            for i, to in enumerate(target):
                part = whole >> whole.dtype.type(size * i)
                self.write(to, part.astype(_UNSIGNED[size]))
        else:
            parts = [self.value(own, 16) for own in source]
            size = parts[0].dtype.itemsize * 8
            out = np.zeros(self.shape, _UNSIGNED[size * len(parts)])
            for i, part in enumerate(parts):
                out |= part.astype(out.dtype) << out.dtype.type(size * i)
            self.write(target[0], out)

    def access(self, name: list[str], operands: list[str]) -> None:
        """Loads and stores, of parameters and of memory."""
        if name[1] == "param":
            number = self.parameters[int(re.findall(r"_param_(\d+)", operands[1])[0])]
            if name[2] == "s32" and operands[0].startswith("%rd"):
                number = number.view(np.int32).astype(np.int64).view(np.uint64)
            self.write(operands[0], np.full(self.shape, number))
            return
        loads = name[0] == "ld"
        registers, place = operands if loads else operands[::-1]
        base, _, offset = place.strip("[] ").partition("+")
        count = next((int(part[1]) for part in name if re.fullmatch(r"v\d", part)), 1)
        size = int(re.sub(r"\D", "", name[-1])) // 8
        address = self.value(base.strip(), 64).astype(np.uint64) + np.uint64(int(offset or 0))
        own = address[self.active]
        assert not (own % np.uint64(size * count)).any(), "misaligned"
        if name[1] == "global":
            found = np.searchsorted(self.starts, own, "right") - 1
            inside = (found >= 0) & (own + np.uint64(size * count) <= self.ends[found])
            assert inside.all(), "outside memory"
        dtype = _UNSIGNED[8 * size]
        for i, register in enumerate(_parts(registers)):
            at = own + np.uint64(size * i)
            if name[1] == "shared":
                memory = self.shared.view(dtype)
                warp = np.broadcast_to(np.arange(self.shape[0])[:, None], self.shape)
                where: Any = (warp[self.active] // self.warps, at // np.uint64(size))
            else:
                memory = np.asarray(_Memory(self.base, int(self.ends[-1]), size))
                where = (at - np.uint64(self.base)) // np.uint64(size)
            if loads:
                value = np.zeros(self.shape, dtype)
                value[self.active] = memory[where]
                # Bytes are loaded into registers of 16 bits.
                self.write(register, value.astype(np.uint16) if size == 1 else value)
            else:
                memory[where] = self.value(register, 8 * size)[self.active].astype(dtype)

    def exchange(self, name: list[str], operands: list[str]) -> None:
        """Between the lanes of a warp."""
        assert (self.active.all(1) | ~self.active.any(1)).all()
        value = self.value(operands[1])
        if name[0] == "redux":
            signed = value.view(np.int32) if name[-1] == "s32" else value
            most = np.broadcast_to(signed.max(1, keepdims=True), self.shape)
            self.write(operands[0], most.astype(signed.dtype).view(np.uint32))
            return
        lane = np.broadcast_to(np.arange(_WARP), self.shape)
        by, limits = (self.value(operand).astype(np.int64) for operand in operands[2:4])
        segment = limits >> 8 & 31
        if name[2] == "bfly":
            source = lane ^ by & 31
        else:
            assert name[2] == "idx"
            source = lane & segment | by & 31 & ~segment
        most = lane & segment | limits & 31 & ~segment
        source = np.where(source <= most, source, lane)
        self.write(operands[0], np.take_along_axis(value, source, 1))

    def compute(self, name: list[str], operands: list[str]) -> Register:
        kind, last = name[0], name[-1]
        size = int(re.sub(r"\D", "", last) or 32) if last != "bf16x2" else 32
        if kind == "cvt":
            return self.convert(name, operands)
        if kind == "selp":
            a, b = (self.value(operand, size) for operand in operands[1:3])
            return np.where(self.value(operands[3]), a, b)
        if last == "pred":
            a, b = (self.truth(operand) for operand in operands[1:])
            return {"and": a & b, "or": a | b, "xor": a ^ b}[kind]
        values = [self.value(operand, size) for operand in operands[1:3]]
        wide = name[:2] == ["mad", "wide"]
        values += [self.value(operand, 64 if wide else size) for operand in operands[3:]]
        if kind == "setp":
            return self.compare(name, last, values)
        if last.startswith("f"):
            return self.floating(name, values)
        if kind == "prmt":
            return prmt(values[0], values[1], int(operands[3].rstrip("U"), 0))
        return self.integer(name, last, size, values)

    def truth(self, operand: str) -> Register:
        if operand in self.registers:
            return self.registers[operand]
        return np.full(self.shape, int(operand, 0) != 0)

    def compare(self, name: list[str], last: str, values: Sequence[Register]) -> Register:
        if last.startswith("f"):
            numbers = [floats(value) for value in values[:2]]
            nan = np.isnan(numbers[0]) | np.isnan(numbers[1])
            if name[1] in ("num", "nan"):
                result = nan if name[1] == "nan" else ~nan
            elif name[1] in _COMPARISONS:
                result = _COMPARISONS[name[1]](*numbers) & ~nan
            else:
                result = _COMPARISONS[name[1].removesuffix("u")](*numbers) | nan
        else:
            numbers = [_as(value, last) for value in values[:2]]
            result = _COMPARISONS[name[1]](*numbers)
        if len(values) > 2:
            assert name[2] in ("and", "or")
            result = result & values[2] if name[2] == "and" else result | values[2]
        return result

    def floating(self, name: list[str], values: Sequence[Register]) -> Register:
        kind = name[0]
        if kind in ("max", "min"):
            a, b = map(floats, values)
            chosen = np.fmax if kind == "max" else np.fmin
            if "NaN" in name:
                chosen = np.maximum if kind == "max" else np.minimum
            # Of zeros the positive one is the larger.
            larger = np.where((a == 0) & (b == 0), floats(values[0] & values[1]), chosen(a, b))
            return bits(larger)
        return function(".".join(name[:-1]), self.units)(*values)

    def integer(
        self, name: list[str], last: str, size: int, values: Sequence[Register]
    ) -> Register:
        kind = name[0]
        if kind in ("mul", "mad"):
            return self.product(name, last, size, values)
        if kind in ("min", "max"):
            chosen = np.minimum if kind == "min" else np.maximum
            return chosen(*(_as(value, last) for value in values)).view(_UNSIGNED[size])
        if kind == "bfe":
            value, start, length = values
            above = np.uint32(32) - length
            return (_as(value << above - start, last) >> _as(above, last)).view(np.uint32)
        value = values[0]
        if kind in ("not", "neg"):
            return ~value if kind == "not" else (-_as(value, "s32")).view(value.dtype)
        if kind in ("shl", "shr", "shf"):
            return _shifted(name, last, values)
        return {
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "add": np.add,
            "sub": np.subtract,
        }[kind](value, values[1].astype(value.dtype))

    def product(
        self, name: list[str], last: str, size: int, values: Sequence[Register]
    ) -> Register:
        a, b = (_as(value, last) for value in values[:2])
        if name[1] in ("wide", "hi"):
            assert size == 32
            a, b = (factor.astype(np.int64).view(np.uint64) for factor in (a, b))
        product = a * b
        if name[1] == "hi":
            product = (product >> np.uint64(32)).astype(np.uint32)
        if name[0] == "mad":
            product = product.view(values[2].dtype) + values[2]
        return product.view(_UNSIGNED[product.dtype.itemsize * 8])

    def convert(self, name: list[str], operands: list[str]) -> Register:
        """Between integers, from them to float32, and between that and 16 bits, to nearest."""
        source, target = name[-1], name[-2]
        narrow = {"bf16": _bfloat16, "f16": _float16}
        if target.removesuffix("x2") in narrow:
            parts = [narrow[target.removesuffix("x2")](self.value(own)) for own in operands[1:]]
            return parts[0] << np.uint32(16) | parts[1] if len(parts) > 1 else _low(parts[0])
        if source == "bf16":
            return self.value(operands[1], 16).astype(np.uint32) << np.uint32(16)
        if source == "f16":
            return bits(self.value(operands[1], 16).view(np.float16).astype(np.float32))
        value = self.value(operands[1], int(source[1:]))
        if target == "f32":
            return bits(_as(value, source).astype(np.float32))
        number = _as(value, source)
        return number.astype((_SIGNED if source[0] == "s" else _UNSIGNED)[int(target[1:])]).view(
            _UNSIGNED[int(target[1:])]
        )


def _bfloat16(pattern: Register) -> Register:
    """float32 bits rounded to the nearest bfloat16; NaNs as a GPU makes them."""
    odd = pattern >> np.uint32(16) & np.uint32(1)
    near = pattern + np.uint32(0x7FFF) + odd >> np.uint32(16)
    return np.where(np.isnan(floats(pattern)), np.uint32(0x7FFF), near)


def _float16(pattern: Register) -> Register:
    near = floats(pattern).astype(np.float16)
    return np.where(np.isnan(near), np.uint16(0x7FFF), near.view(np.uint16)).astype(np.uint32)


def _low(pattern: Register) -> Register:
    return pattern.astype(np.uint16)


def _shifted(name: list[str], last: str, values: Sequence[Register]) -> Register:
    """Shifts by a number's bits or more leave nothing, or the sign."""
    value, by = values[0], values[-1].astype(np.int64)
    size = value.dtype.itemsize * 8
    if name[0] == "shf":
        assert name[1:3] == ["r", "wrap"]
        both = value.astype(np.uint64) | values[1].astype(np.uint64) << np.uint64(32)
        return (both >> (by & 31).astype(np.uint64)).astype(np.uint32)
    number = _as(value, last)
    inside = np.minimum(by, size - 1).astype(number.dtype)
    result = number << inside if name[0] == "shl" else number >> inside
    if not last.startswith("s"):
        result = np.where(by < size, result, 0).astype(value.dtype)
    return result.view(value.dtype)


def _as(value: Register, kind: str) -> Register:
    """A register's bits as integers of a PTX type."""
    return value.view(_SIGNED[value.dtype.itemsize * 8]) if kind.startswith("s") else value


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


class _Memory:
    """This process's memory from an address on, as an array of words of so many bytes."""

    def __init__(self, start: int, end: int, size: int) -> None:
        self.__array_interface__ = {
            "data": (start, False),
            "shape": ((end - start) // size,),
            "typestr": f"<u{size}",
            "version": 3,
        }


Code = list[tuple[str, str, list[str]]]


def _parsed(text: str) -> tuple[Code, dict[str, int]]:
    """The instructions of a program, as (predicate, name, operands), and its labels' places."""
    code: Code = []
    labels: dict[str, int] = {}
    scopes: list[dict[str, str]] = []
    text = re.sub(r"//.*|/\*.*?\*/", "", text)
    body = text[text.index("\n{") + 2 :]
    count = 0

    def own(name: str) -> str:
        return next((scope[name] for scope in reversed(scopes) if name in scope), name)

    for line in re.split(r"[;\n]|(?<=:)|(?<=^{)", body):
        words = line.strip()
        if words == "{":
            count += 1
            # Registers and labels of a scope are its own.
            scopes.append({"DONE": f"DONE.{count}"})
        elif words == "}":
            if not scopes:
                break
            scopes.pop()
        elif words.endswith(":"):
            labels[own(words[:-1])] = len(code)
        elif words.startswith(".reg") and scopes:
            _, _, names = words.split(maxsplit=2)
            scopes[-1] |= {name.strip(): f"{name.strip()}.{count}" for name in names.split(",")}
        elif words and words[0] != ".":
            guard = ""
            if words[0] == "@":
                guard, words = words[1:].split(maxsplit=1)
                guard = ("!" if guard[0] == "!" else "") + own(guard.lstrip("!"))
            name, _, rest = re.sub(r"\s+", " ", words).partition(" ")
            operands = [own(operand.strip()) for operand in re.split(r",(?![^{]*})", rest)]
            code.append((guard, name, operands))
    return code, labels
