"""The noise, defined: z(seed, stream, draw, index) as a pure function, in PyTorch.

Every other implementation must return the bits that this file returns.

1. *Words.* Philox4x32-10 (Salmon et al., 2011) turns a 128-bit counter under a 64-bit key into
   four 32-bit words. The key is the seed. The counter is

       c0 = block mod 2^32    c1 = block div 2^32 + purpose * 2^24    c2 = draw    c3 = stream

   so tensors (`stream`), directions (`draw`) and uses (`purpose`) never share a word.
2. *Bits.* The words of blocks 0, 1, 2, ... laid end to end, least significant bit first, are one
   long string of bits. Element `index` owns bits 16 index ... 16 index + 15 where 16 bits are
   needed (normals, stochastic rounding, masks: eight elements a block) and bit `index` where one
   is (Rademacher signs: 128 elements a block).
3. *Signs.* A set bit is -1, a clear bit +1.
4. *Normals.* The 16 bits, read as a signed integer h, are mapped through an approximation of the
   normal quantile Phi^-1((h + 32768.5) / 65536). With X = h + 1/2 and q = X^2 - 2^30,

       z = X (p(u) + c(f))

   where u is an affine image of q's bit pattern read as an integer (a piecewise linear logarithm
   of the distance to the tails), f in [1, 2) is q's significand, and p and c are polynomials of
   degree 4 and 3. It costs 15 instructions, and only integer operations, IEEE additions and
   multiplications, and fused multiply-adds that are fused on every backend: hence equal bits.
   The 65,536 values have mean 0, variance 1 to 2e-8, excess kurtosis -9e-4, and reach 4.35;
   their distribution function is nowhere further than 8e-5 from Phi.
5. *Masks.* At a density below 1, z is 0 wherever the 16 bits of the purpose "mask" are not below
   density * 2^16. Where the mask is 0 nothing is added, so the sum keeps its bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

NOISE_VERSION = 1

#: Uses of the noise, distinguished by the top byte of the counter's second word.
PURPOSE_DIRECTION = 0
PURPOSE_ROUNDING = 1
PURPOSE_MASK = 2
PURPOSE_MOMENTS = 3

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

NORMALS_PER_BLOCK = 8
SIGNS_PER_BLOCK = 128

#: u = bits(q) * U_SCALE + U_SHIFT lies in [-0.9376, 0.9375].
U_SCALE, U_SHIFT = 2.0**-26, 13.3125
Q_SHIFT = -(2.0**30)
#: Minimax in the weight max(phi(z), 0.002), then scaled to unit variance; float32 exactly.
P1, P2, P3, P4 = (
    float.fromhex(h)
    for h in (
        "-0x1.a380600000000p-15",
        "-0x1.89eb820000000p-17",
        "-0x1.affa7c0000000p-22",
        "0x1.662cd00000000p-18",
    )
)
C0, C1, C2, C3 = (
    float.fromhex(h)
    for h in (
        "0x1.a3adc20000000p-14",
        "-0x1.f44dfa0000000p-17",
        "0x1.0118420000000p-17",
        "-0x1.35b1400000000p-20",
    )
)

_MASK32 = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32 on int64 tensors that hold uint32 values.

    Args:
        counter: int64, (..., 4).
        key: int64, (..., 2), broadcast against `counter`.

    Returns:
        int64, (..., 4): the four words of each counter.
    """
    c0, c1, c2, c3 = counter.unbind(-1)  # each (...)
    k0, k1 = key.unbind(-1)  # each (...)
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, and the mask undoes the arithmetic shift's sign.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        high_0, high_1 = product_0 >> 32 & _MASK32, product_1 >> 32 & _MASK32
        c0, c1, c2, c3 = (
            high_1 ^ c1 ^ k0,
            product_1 & _MASK32,
            high_0 ^ c3 ^ k1,
            product_0 & _MASK32,
        )
        k0, k1 = k0 + WEYL_0 & _MASK32, k1 + WEYL_1 & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def words(
    blocks: Tensor, *, seed: int, stream: int, draw: int, purpose: int = PURPOSE_DIRECTION
) -> Tensor:
    """The words of the given blocks: int64 (...) -> int64 (..., 4)."""
    counter = torch.stack(
        (
            blocks & _MASK32,
            (blocks >> 32) + (purpose << 24),
            torch.full_like(blocks, draw),
            torch.full_like(blocks, stream),
        ),
        dim=-1,
    )
    key = torch.tensor([seed & _MASK32, seed >> 32], dtype=torch.int64, device=blocks.device)
    return philox4x32(counter, key)


def halfwords(
    index: Tensor, *, seed: int, stream: int, draw: int, purpose: int = PURPOSE_DIRECTION
) -> Tensor:
    """The 16 bits of each element of a run of indices: int64 (n,) -> int64 (n,) in [0, 65536).

    `index` must be consecutive integers: whole blocks are generated and the ends cut off.
    """
    first, last = int(index[0]), int(index[-1])
    block = first // NORMALS_PER_BLOCK
    blocks = torch.arange(block, last // NORMALS_PER_BLOCK + 1, device=index.device)
    w = words(blocks, seed=seed, stream=stream, draw=draw, purpose=purpose)  # (b, 4)
    halves = torch.stack((w & 0xFFFF, w >> 16), dim=-1).flatten()  # (8 b,)
    return halves[first - block * NORMALS_PER_BLOCK :][: index.numel()]


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """A fused multiply-add on float32 (n,): the product is exact in float64.

    Rounding the sum to float64 and then to float32 could differ from a single rounding, but does
    not for any of the 65,536 arguments that occur here (a test compares with the C library's fmaf).
    """
    b = b.double() if isinstance(b, Tensor) else b
    c = c.double() if isinstance(c, Tensor) else c
    return (a.double() * b + c).float()


@functools.cache
def normal_table(device: torch.device | None = None) -> Tensor:
    """The 65,536 normals in the order of their 16 bits: float32, (65536,)."""
    bits = torch.arange(65536, dtype=torch.int32)
    x = torch.where(bits < 32768, bits, bits - 65536).float() + 0.5
    q = _fma(x, x, Q_SHIFT).view(torch.int32)
    u = _fma(q.float(), U_SCALE, U_SHIFT)
    f = (q & 0x7FFFFF | 0x3F800000).view(torch.float32)
    c = _fma(_fma(_fma(torch.full_like(f, C3), f, C2), f, C1), f, C0)
    p = _fma(_fma(_fma(torch.full_like(u, P4), u, P3), u, P2), u, P1)
    return (x * _fma(p, u, c)).to(device)


def normal(index: Tensor, *, seed: int, stream: int, draw: int) -> Tensor:
    """Standard normals of consecutive indices: int64 (n,) -> float32 (n,)."""
    bits = halfwords(index, seed=seed, stream=stream, draw=draw)
    return normal_table(index.device)[bits]


def rademacher(index: Tensor, *, seed: int, stream: int, draw: int) -> Tensor:
    """Signs of consecutive indices, +1 or -1: int64 (n,) -> float32 (n,)."""
    first, last = int(index[0]), int(index[-1])
    block = first // SIGNS_PER_BLOCK
    blocks = torch.arange(block, last // SIGNS_PER_BLOCK + 1, device=index.device)
    w = words(blocks, seed=seed, stream=stream, draw=draw)  # (b, 4)
    bits = w.unsqueeze(-1) >> torch.arange(32, device=index.device) & 1  # (b, 4, 32)
    return (1 - 2 * bits.flatten()[first - block * SIGNS_PER_BLOCK :][: index.numel()]).float()


def mask(index: Tensor, *, seed: int, stream: int, draw: int, threshold: int) -> Tensor:
    """Which of consecutive indices a direction moves: int64 (n,) -> bool (n,).

    `threshold` is density * 2^16, an int.
    """
    bits = halfwords(index, seed=seed, stream=stream, draw=draw, purpose=PURPOSE_MASK)
    return bits < threshold
