"""What the GPU kernels' assembly computes, instruction by instruction, beside plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptx import bits, floats, fma, run
from zoopt.kernels.runtime import gpu_ptx as ptx

# Infinities and NaNs are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
RANDOM = np.random.default_rng(1)


def words(count: int, low: int = 0, high: int = 1 << 32) -> Any:
    return RANDOM.integers(low, high, count, np.uint64).astype(np.uint32)


def bytes_of(word: Any) -> list[Any]:
    return [word >> np.uint32(8 * i) & np.uint32(255) for i in range(4)]


def test_a_fused_multiply_add_is_rounded_once() -> None:
    """Beside exact integers: (2^12 + 1)^2 = 2^24 + 2^13 + 1, of which the last bit decides."""
    a = np.float32(2**12 + 1)
    assert fma(a, a, np.float32(-(2.0**24))) == 2**13 + 1
    assert fma(np.float32(1 + 2**-23), np.float32(1 + 2**-23), np.float32(2.0**-60)) == np.float32(
        1 + 2**-22
    )
    # Half a unit and a little more: rounded twice it would stay.
    assert fma(np.float32(2.0**-24), np.float32(1), np.float32(1)) == 1
    more, half = np.float32(1 + 2**-23), np.float32(2.0**-24)
    assert fma(more, half, np.float32(1)) == more


def test_parts_of_words() -> None:
    word = words(1000)
    low, high = run(ptx.SPLIT.value, [word], 2)
    assert (low == word & 0xFFFF).all()
    assert (high == word >> 16).all()
    low, high = run(ptx.WIDEN.value, [word], 2)
    assert (low == word << 16).all()
    assert (high == word & 0xFFFF0000).all()
    for got, byte in zip(run(ptx.BYTES.value, [word], 4), bytes_of(word), strict=True):
        assert (floats(got) == 2.0**23 + byte).all()
    for got, byte in zip(run(ptx.SIGNED_BYTES.value, [word], 4), bytes_of(word), strict=True):
        assert (floats(got) == 2.0**23 + 128 + byte.astype(np.int8)).all()


def test_codes_are_packed() -> None:
    """What lies above the low bytes is left out, as are the numbers' magnitudes."""
    upper, x = np.uint32(0x4B000000), [words(1000) for _ in range(8)]
    negative = [value >> np.uint32(31) == 1 for value in x]
    codes = [words(1000, 0, 256) for _ in range(4)]
    [packed] = run(ptx.PACK.value, [upper + code for code in codes], 1)
    assert all((a == b).all() for a, b in zip(bytes_of(packed), codes, strict=True))

    codes = [words(1000, 0, 128) for _ in range(4)]
    [packed] = run(ptx.PACK_SIGNED.value, [*(upper + code for code in codes), *x[:4]], 1)
    for got, code, below in zip(bytes_of(packed), codes, negative, strict=False):
        signed = code.astype(np.int64)
        assert (got.astype(np.int8) == np.where(below, -signed, signed)).all()

    codes = [words(1000, 0, 16) for _ in range(8)]
    [packed] = run(ptx.PACK_HALVES.value, [upper + code for code in codes], 1)
    for i, got in enumerate(bytes_of(packed)):
        assert (got == (codes[i] | codes[4 + i] << np.uint32(4))).all()

    codes = [words(1000, 0, 8) for _ in range(8)]
    [packed] = run(ptx.PACK_SIGNED_HALVES.value, [*(upper + code for code in codes), *x], 1)
    signed = [np.where(b, 8 - c.astype(int), 8 + c) for b, c in zip(negative, codes, strict=True)]
    for i, got in enumerate(bytes_of(packed)):
        assert (got == (signed[i] | signed[4 + i] << 4)).all()


def test_random_bits_are_added_to_finite_numbers() -> None:
    special = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7FC00000, 0x7F7FFFFF, 0, 0x80000000]
    pattern = np.concatenate([words(1000), np.array(special, np.uint32)])
    carry = words(len(pattern), 0, 1 << 16)
    [got] = run(ptx.CARRY.value, [pattern, carry], 1)
    assert (got == np.where(np.isfinite(floats(pattern)), pattern + carry, pattern)).all()


@pytest.mark.parametrize("units", [-1, 0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1.5, 3.0])
def test_quotients_are_rounded_as_each_operation_is(units: int, eps: float) -> None:
    """All exponents, and what is no number: whatever the approximations are, which a GPU makes to
    a unit."""
    special = np.array([0, 0x80000000, 1, 0x00800000, 0x7F800000, 0x7FC00000], np.uint32)
    v = np.concatenate([words(20000, 0, 0x7F800000), words(20000, 0x30000000, 0x48000000)])
    a = np.concatenate([words(20000), words(20000, 0x30000000, 0x48000000)])
    v = np.concatenate([v, np.repeat(special, 6)]) & np.uint32(0x7FFFFFFF)
    a = np.concatenate([a, np.tile(special, 6)])
    columns = len(v) // 8
    a, v = a[: 8 * columns].reshape(8, columns), v[: 8 * columns].reshape(8, columns)
    e = np.full_like(a, bits(eps))
    got = run(ptx.QUOTIENTS.value, [*a, *v, *e], 8, units=units)
    expected = bits(floats(a) / (np.sqrt(floats(v)) + np.float32(eps)))
    assert (np.stack(got) == expected).all()


@pytest.mark.parametrize("units", [-1, 0, 1])
@pytest.mark.parametrize("top", [7, 16, 127, 256])
def test_inverses_of_scales_are_rounded_once(top: int, units: int) -> None:
    """From the least scale to the greatest number. Just below a power of two the reciprocal has to
    be the nearest, as it has for the compiler's own 256 / x, which takes the same steps."""
    least, infinity = bits(2.0**-110), 0x7F800000
    x = np.concatenate([words(50000, int(least), infinity), np.array([least, infinity - 1])])
    x = x.astype(np.uint32)
    x = x[(x & 0x7FFFFF != 0x7FFFFF) | (units == 0)]
    quarter = np.full_like(x, bits(top * top / 4))
    [got] = run(ptx.INVERSE.value, [x, quarter], 1, units=units)
    assert (got == bits(np.float32(top * top) / floats(x))).all()
    special = np.array([0, infinity, 0x7FC00000], np.uint32)
    [got] = run(ptx.INVERSE.value, [special, quarter[:3]], 1, units=units)
    assert np.isnan(floats(got)).all()


@pytest.mark.parametrize(("top", "base", "least"), [(127, 23, 0.25), (256, 0, 1.6)])
@pytest.mark.parametrize("units", [-2, 0, 2])
def test_an_approximate_root_leads_to_the_same_code(
    top: int, base: int, least: float, units: int
) -> None:
    """Next to the squares of levels too: `write_moment`, with a GPU's root."""
    base_value = np.float32(2.0**23 if base else 2.0**23 - 1)
    square = (np.arange(top + 1) ** 2.0).astype(np.float32)
    near = [np.nextafter(square, np.float32(end)) for end in (0, 1e9)]
    s = np.concatenate([square, *near, RANDOM.uniform(0, top**2, 4000).astype(np.float32)])
    s = np.minimum(np.concatenate([s, s * np.float32(1e-9)]), np.float32(top**2))
    random = words(len(s), 0, 256)
    clamped = np.maximum(s, np.float32(least))
    [root] = run(ptx.INVERSE_ROOT.value, [bits(clamped)], 1, units=units)
    shifted = fma(clamped, floats(root), base_value - np.float32(0.5))
    level = shifted - base_value
    below = (random + 0.5) * (2 * level + 1.0) / 256 - (s - level.astype(float) ** 2)
    got = (bits(shifted) + (below < 0)) & 255
    floor = np.minimum(np.floor(np.sqrt(s.astype(float))), top - 1)
    code = floor + (s - floor**2 > (random + 0.5) * (2 * floor + 1) / 256)
    assert (got == (code if base else np.maximum(code, 1) - 1)).all()
