"""Arithmetic on vectors in the machine code of kernels, written in LLVM.

LLVM makes vectors of a loop too, but keeps few of them in progress at a time. Long chains of
operations, such as the rounds of Philox, then wait for each other. Here the code says how many
elements are worked on together, and LLVM cuts them to the machine's width.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from zoopt.kernels.runtime.width import bits

INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


def words_together() -> int:
    """How many 32-bit elements fill the registers of the machine well: four or two of them."""
    return 64 if bits() == 512 else 16


class Vector:
    """A value of a vector type in a function that is being built.

    Operators are those of C on each element; the other operand is a vector, or a number for all
    elements. `*` and `+` of floats are rounded each.
    """

    def __init__(self, builder, value) -> None:
        self.builder, self.value = builder, value

    @classmethod
    def load(cls, builder, element, count, address, place=0):
        """`count` elements at an address, which is `place` bytes further on."""
        pointer = _pointer(builder, ir.VectorType(element, count), address, place)
        return cls(builder, builder.load(pointer, align=4))

    @classmethod
    def filled(cls, builder, scalar, count):
        """A vector whose elements are all the scalar."""
        empty = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
        first = builder.insert_element(empty, scalar, INT32(0))
        zeros = ir.Constant(ir.VectorType(INT32, count), [0] * count)
        return cls(builder, builder.shuffle_vector(first, empty, zeros))

    @classmethod
    def loaded(cls, builder, element, count, address, place=0):
        """A vector whose elements are all the number at an address."""
        pointer = _pointer(builder, element, address, place)
        return cls.filled(builder, builder.load(pointer, align=4), count)

    def store(self, address, place=0) -> None:
        """Write the elements to an address."""
        pointer = _pointer(self.builder, self.value.type, address, place)
        self.builder.store(self.value, pointer, align=4)

    def __add__(self, other):
        floating = self.value.type.element == FLOAT
        return self._with(self.builder.fadd if floating else self.builder.add, other)

    def __mul__(self, other):
        floating = self.value.type.element == FLOAT
        return self._with(self.builder.fmul if floating else self.builder.mul, other)

    def __and__(self, other):
        return self._with(self.builder.and_, other)

    def __or__(self, other):
        return self._with(self.builder.or_, other)

    def __xor__(self, other):
        return self._with(self.builder.xor, other)

    def __lshift__(self, other):
        return self._with(self.builder.shl, other)

    def __rshift__(self, other):
        return self._with(self.builder.lshr, other)

    def fma(self, factor, addend):
        """self factor + addend, rounded once."""
        kind = self.value.type
        name = f"llvm.fma.v{kind.count}f32"
        signature = ir.FunctionType(kind, [kind] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        terms = [self.value, self._same(factor), self._same(addend)]
        return Vector(self.builder, self.builder.call(function, terms))

    def differs(self, other):
        """Whether elements differ, as a vector of bits for `where`."""
        return self.builder.icmp_unsigned("!=", self.value, self._same(other))

    def where(self, condition, other):
        """The elements of self where the bit is set, else those of other."""
        kept = self.builder.select(condition, self.value, self._same(other))
        return Vector(self.builder, kept)

    def floats(self):
        """int32 -> float32."""
        return Vector(self.builder, self.builder.sitofp(self.value, self._of(FLOAT)))

    def as_floats(self):
        """The float32 with these bits."""
        return Vector(self.builder, self.builder.bitcast(self.value, self._of(FLOAT)))

    def as_int32(self):
        """The bits of float32, or the halves of int64, as int32."""
        count = self.value.type.count * (2 if self.value.type.element == INT64 else 1)
        kind = ir.VectorType(INT32, count)
        return Vector(self.builder, self.builder.bitcast(self.value, kind))

    def _of(self, element):
        return ir.VectorType(element, self.value.type.count)

    def _same(self, other):
        if isinstance(other, Vector):
            return other.value
        kind = self.value.type
        number = float(other) if kind.element == FLOAT else other
        return ir.Constant(kind, [number] * kind.count)

    def _with(self, operation, other):
        return Vector(self.builder, operation(self.value, self._same(other)))


def _pointer(builder, kind, address, place):
    if place:
        address = builder.add(address, INT64(place))
    return builder.inttoptr(address, kind.as_pointer())
