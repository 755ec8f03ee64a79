"""Instructions of NVIDIA's GPUs that Triton's language has no name for, as functions of tensors.

Each does in a few instructions what other backends do in more; callers have the other form beside
it. `tests/test_ptx.py` runs the instructions below one by one, and compares their bits.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

#: Which bytes of two words a permutation takes: the lowest of each, the signs of each in all bits,
#: the lower half of each.
_LOW, _SIGN, _JOIN = "0x0040", "0x00fb", "0x5410"


def _code(*lines: str) -> str:
    """Instructions, one a line."""
    return "".join(f"\n    {line};" for line in lines) + "\n"


def _scope(*lines: str) -> str:
    """Instructions with registers of their own."""
    return "{" + _code(*lines) + "}"


def _floats(word: str, first: int) -> list[str]:
    """Outputs first ... first + 3: the bytes b of a word as the float32 numbers 2^23 + b."""
    return [f"prmt.b32 ${first + i}, {word}, 0x4b000000, 0x744{i}" for i in range(4)]


def _gathered(out: str, parts: Sequence[str], first: int, selector: str) -> list[str]:
    """out: a byte of each of the operands first ... first + 3. parts: two registers to work in."""
    a, b = parts
    return [
        f"prmt.b32 {a}, ${first}, ${first + 1}, {selector}",
        f"prmt.b32 {b}, ${first + 2}, ${first + 3}, {selector}",
        f"prmt.b32 {out}, {a}, {b}, {_JOIN}",
    ]


#: Two bfloat16 numbers in a word, as float32.
WIDEN = tl.constexpr(_code("shl.b32 $0, $2, 16", "and.b32 $1, $2, 0xffff0000"))
#: The two halves of a word.
SPLIT = tl.constexpr(_code("prmt.b32 $0, $2, 0, 0x4410", "prmt.b32 $1, $2, 0, 0x4432"))
#: The four bytes of a word b, as the float32 numbers 2^23 + b: a byte becomes the low bits of the
#: mantissa.
BYTES = tl.constexpr(_code(*_floats("$4", 0)))
#: The same of signed bytes c: 2^23 + 128 + c.
SIGNED_BYTES = tl.constexpr(
    _scope(".reg .b32 w", "xor.b32 w, $4, 0x80808080", *_floats("w", 0)),
)
#: The bits of a finite float32 number plus a small integer; of others the number itself.
CARRY = tl.constexpr(
    _scope(
        ".reg .pred p",
        ".reg .f32 a",
        "abs.f32 a, $1",
        "setp.lt.f32 p, a, 0f7F800000",
        "mov.b32 $0, $1",
        "@p add.u32 $0, $0, $2",
    )
)
#: The low bytes of four words, in one.
PACK = tl.constexpr(_scope(".reg .b32 a, b", *_gathered("$0", "ab", 1, _LOW)))
#: The same of magnitudes below 128, negated where the float32 numbers that follow are negative:
#: bytes s of -1 or 0 replicate the signs, and (l ^ s) - s + 128 is positive, so that none borrows
#: from the next one.
PACK_SIGNED = tl.constexpr(
    _scope(
        ".reg .b32 a, b, s",
        *_gathered("a", "ab", 1, _LOW),
        *_gathered("b", "bs", 5, _SIGN),
        "xor.b32 a, a, b",
        "sub.u32 a, a, b",
        "add.u32 a, a, 0x80808080",
        "xor.b32 $0, a, 0x80808080",
    )
)
#: Eight numbers of 4 bits, four for the lower halves of bytes and then four for the upper halves.
PACK_HALVES = tl.constexpr(
    _scope(
        ".reg .b32 a, b, c",
        *_gathered("a", "ab", 1, _LOW),
        *_gathered("b", "bc", 5, _LOW),
        "shl.b32 b, b, 4",
        "or.b32 $0, a, b",
    )
)
#: The same of magnitudes below 8 with the signs of eight float32 numbers, 8 added to each: with a
#: sign's four bits s, (l ^ s) - s + 8.
PACK_SIGNED_HALVES = tl.constexpr(
    _scope(
        ".reg .b32 a, b, c, s",
        *_gathered("a", "ab", 1, _LOW),
        *_gathered("b", "bc", 5, _LOW),
        "shl.b32 b, b, 4",
        "add.u32 a, a, b",
        *_gathered("s", "sc", 9, _SIGN),
        *_gathered("b", "bc", 13, _SIGN),
        "and.b32 s, s, 0x0f0f0f0f",
        "and.b32 b, b, 0xf0f0f0f0",
        "or.b32 s, s, b",
        "xor.b32 a, a, s",
        "sub.u32 a, a, s",
        "add.u32 $0, a, 0x88888888",
    )
)


def _look_up(*level: str) -> str:
    """What the lower and the upper halves of four bytes stand for. Each lane makes the number f of
    one code, that of its own number c modulo 16, times the scale and a factor. Of 16 lanes next to
    each other, a shuffle takes that of the lane which the lowest four bits name.

    So 16 lanes' first bytes have to share a scale, as their second, third and fourth ones. They do
    if a thread has at most four bytes in a row: those are 64 bytes or less, which one scale serves.
    """
    lines = [
        ".reg .b32 c, h",
        ".reg .f32 f, m, t0, t1, t2, t3",
        "mov.u32 c, %laneid",
        "and.b32 c, c, 15",
        "cvt.rn.f32.u32 f, c",
        *level,
    ]
    for i in range(4):
        lines += [f"mul.rn.f32 t{i}, f, ${9 + i}", f"mul.rn.f32 t{i}, t{i}, ${13 + i}"]
    for i in range(8):
        lines.append(f"shr.u32 h, $8, {4 * i}")
        to = f"${i // 2 + 4 * (i % 2)}"
        lines.append(f"shfl.sync.idx.b32 {to}, t{i // 2}, h, 0x101f, -1")
    return _scope(*lines)


#: Of signed codes (c - 8) |c - 8| / 49, and of unsigned ones (c + 1)^2.
LOOK_UP_SIGNED = tl.constexpr(
    _look_up(
        "add.rn.f32 f, f, 0fC1000000",
        "abs.f32 m, f",
        "mul.rn.f32 f, f, m",
        "mul.rn.f32 f, f, 0f3CA72F05",
    )
)
LOOK_UP = tl.constexpr(_look_up("add.rn.f32 f, f, 0f3F800000", "mul.rn.f32 f, f, f"))
#: 1 / sqrt(x), approximately, with denormal numbers taken for zeros.
INVERSE_ROOT = tl.constexpr("rsqrt.approx.ftz.f32 $0, $1;")


def _quotients(count: int) -> str:
    """a / (sqrt(v) + eps) of `count` elements, each operation rounded to nearest.

    Newton's steps give the rounded root and the rounded quotient, as the compiler's own code does,
    if no number on the way is too large or too small. That holds if a and v lie in [2^-101, 2^27)
    and eps lies below 2: the root is then in [2^-51, 2^14), the quotient in [2^-115, 2^78), and the
    remainder of a division is a multiple of 2^-148. Bit 30 of a number's bits less those of 2^-101
    says so, whatever its sign. Otherwise, as for zeros, the slower instructions follow. The
    compiler would branch twice for each element.
    """
    lines = [".reg .pred p;", ".reg .b32 t, u, w;", ".reg .f32 r, y, h, d, b, n, e, q;"]
    out, a, v, eps = ([f"${k * count + i}" for i in range(count)] for k in range(4))
    lines.append(f"mov.b32 w, {eps[0]};")
    for i in range(count):
        lines += [
            f"add.u32 t, {v[i]}, 0xf3000000;",
            f"add.u32 u, {a[i]}, 0xf3000000;",
            "or.b32 t, t, u;",
            "or.b32 w, w, t;",
            f"rsqrt.approx.ftz.f32 r, {v[i]};",
            f"mul.rn.f32 y, {v[i]}, r;",
            "mul.rn.f32 h, r, 0f3F000000;",
            "neg.f32 n, y;",
            f"fma.rn.f32 d, n, y, {v[i]};",
            "fma.rn.f32 y, d, h, y;",
            f"add.rn.f32 b, y, {eps[i]};",
            "rcp.approx.ftz.f32 r, b;",
            "neg.f32 n, b;",
            "fma.rn.f32 e, n, r, 0f3F800000;",
            "fma.rn.f32 r, r, e, r;",
            f"mul.rn.f32 q, {a[i]}, r;",
            f"fma.rn.f32 e, n, q, {a[i]};",
            f"fma.rn.f32 {out[i]}, e, r, q;",
        ]
    lines += ["and.b32 w, w, 0x40000000;", "setp.eq.u32 p, w, 0;", "@p bra DONE;"]
    for i in range(count):
        lines += [
            f"sqrt.rn.f32 y, {v[i]};",
            f"add.rn.f32 b, y, {eps[i]};",
            f"div.rn.f32 {out[i]}, {a[i]}, b;",
        ]
    return "{\n" + "\n".join(lines) + "\nDONE:\n}"


QUOTIENTS = tl.constexpr(_quotients(8))
#: c / x of an x that is 0 or at least 2^-110, by the steps of a division of c / 4 by x / 4, whose
#: reciprocal is a normal number even for the largest x. A NaN for 0, infinities and NaNs.
INVERSE = tl.constexpr(
    _scope(
        ".reg .f32 b, n, r, e, q",
        "mul.rn.f32 b, $1, 0f3E800000",
        "rcp.approx.ftz.f32 r, b",
        "neg.f32 n, b",
        "fma.rn.f32 e, n, r, 0f3F800000",
        "fma.rn.f32 r, r, e, r",
        "mul.rn.f32 q, $2, r",
        "fma.rn.f32 e, n, q, $2",
        "fma.rn.f32 $0, e, r, q",
    )
)
#: A number at an address, if a third one is not 0.
STORE = tl.constexpr(
    _scope(
        ".reg .pred p",
        "setp.ne.s32 p, $3, 0",
        "@p st.global.b32 [$1], $2",
        "mov.b32 $0, 0",
    )
)


@triton.jit
def wide_bfloat16(x):
    """bfloat16 numbers as float32."""
    return tl.inline_asm_elementwise(WIDEN, "=&r,=&r,r", [x], tl.float32, is_pure=True, pack=2)


@triton.jit
def word_halves(words):
    """The lower and the upper 16 bits of words: uint32."""
    return tl.inline_asm_elementwise(
        SPLIT, "=&r,=&r,r", [words], (tl.uint32, tl.uint32), is_pure=True, pack=1
    )


@triton.jit
def carried(x, bits):
    """The bits of finite float32 numbers plus integers, uint32; of others the number's: uint32."""
    return tl.inline_asm_elementwise(CARRY, "=&r,f,r", [x, bits], tl.uint32, is_pure=True, pack=1)


@triton.jit
def byte_floats(codes, SIGNED: tl.constexpr):
    """2^23 + b of bytes, or 2^23 + 128 + c of signed ones: float32."""
    return tl.inline_asm_elementwise(
        SIGNED_BYTES if SIGNED else BYTES,
        "=&r,=&r,=&r,=&r,r",
        [codes],
        tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def looked_up(codes, scales, factor, SIGNED: tl.constexpr):
    """The numbers for the lower and the upper halves of bytes, times scales, float32 of their
    shape, times a factor. A thread has at most four bytes in a row."""
    return tl.inline_asm_elementwise(
        LOOK_UP_SIGNED if SIGNED else LOOK_UP,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,f,f,f,f,f,f,f,f",
        [codes, scales, factor],
        (tl.float32, tl.float32),
        is_pure=True,
        pack=4,
    )


@triton.jit
def word_floats(words):
    """2^23 + b of each of the four bytes of words, the lowest first: float32."""
    return tl.inline_asm_elementwise(
        BYTES,
        "=&r,=&r,=&r,=&r,r",
        [words],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def packed_bytes(low, x, SIGNED: tl.constexpr):
    """The low bytes of int32 numbers, uint8; if SIGNED, magnitudes with the signs of x, int8."""
    if SIGNED:
        return tl.inline_asm_elementwise(
            PACK_SIGNED, "=r,r,r,r,r,r,r,r,r", [low, x], tl.int8, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(PACK, "=r,r,r,r,r", [low], tl.uint8, is_pure=True, pack=4)


@triton.jit
def packed_halves(first, second, x_first, x_second, SIGNED: tl.constexpr):
    """Bytes of two 4-bit numbers each, the first in the lower half: uint8. If SIGNED they are
    magnitudes that take the signs of x, and 8 is added."""
    if SIGNED:
        return tl.inline_asm_elementwise(
            PACK_SIGNED_HALVES,
            "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [first, second, x_first, x_second],
            tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            PACK_HALVES,
            "=r,r,r,r,r,r,r,r,r",
            [first, second],
            tl.uint8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def quotients(a, v, eps):
    """a / (sqrt(v) + eps), each operation rounded to nearest: float32."""
    return tl.inline_asm_elementwise(
        QUOTIENTS,
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
        [a, v, eps],
        tl.float32,
        is_pure=True,
        pack=8,
    )


@triton.jit
def inverses(x, DIVIDEND: tl.constexpr):
    """DIVIDEND / x, rounded to nearest, of numbers x from 2^-110 on; of others a NaN: float32."""
    quarter = tl.full(x.shape, DIVIDEND / 4, tl.float32)
    return tl.inline_asm_elementwise(
        INVERSE, "=&f,f,f", [x, quarter], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def stored(pointers, x, inside):
    """Store float32 numbers where they are inside, each by all the threads that have it: without
    the exchange by which Triton finds one thread for each."""
    tl.inline_asm_elementwise(
        STORE,
        "=r,l,r,r",
        [pointers.to(tl.int64), x, inside.to(tl.int32)],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def inverse_roots(x):
    """1 / sqrt(x), approximately: one instruction, which takes denormal numbers for zeros."""
    return tl.inline_asm_elementwise(INVERSE_ROOT, "=f,f", [x], tl.float32, is_pure=True, pack=1)
