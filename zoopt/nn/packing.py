"""Integers of 3, 4 or 8 bits in bytes: eight codes are as many bytes as a code has bits."""

from __future__ import annotations

import torch
from torch import Tensor

#: Codes that are packed together, which fill whole bytes at any width.
RUN = 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in [0, 2^bits), uint8 (m, n) -> uint8 (m, ceil(n / 8) bits), the first in the lowest
    bits."""
    m, n = codes.shape
    padded = codes.new_zeros(m, -(-n // RUN) * RUN, dtype=torch.int64)
    padded[:, :n] = codes
    shifts = torch.arange(RUN, device=codes.device) * bits
    word = padded.view(m, -1, RUN).bitwise_left_shift_(shifts).sum(-1, keepdim=True)
    places = torch.arange(bits, device=codes.device) * 8
    return (word >> places & 0xFF).to(torch.uint8).view(m, -1)


def unpack(packed: Tensor, n: int, bits: int) -> Tensor:
    """The codes, uint8 (m, n), of what `pack` has made of them; perhaps a view of `packed`."""
    m = packed.shape[0]
    if bits == 8:
        return packed[:, :n]
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).view(m, -1)[:, :n]
    places = torch.arange(bits, device=packed.device) * 8
    word = (packed.view(m, -1, bits).long() << places).sum(-1, keepdim=True)
    shifts = torch.arange(RUN, device=packed.device) * bits
    codes = word >> shifts & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(m, -1)[:, :n]
