"""Integers of 3, 4 or 8 bits in bytes: eight codes are as many bytes as a code has bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Codes that are packed together, which fill whole bytes at any width.
RUN = 8


class Packed(nn.Module):
    """A module of packed codes. Its state dict says how they are read, which a load compares: the
    tensors of other groups or of another form of the scales can have the same shapes.

    Attributes:
        bits: of a code.
        group_size: how many of a row share a scale.
        form: of the scales, "linear" or "log".
    """

    bits: int
    group_size: int
    form: str

    def get_extra_state(self) -> Tensor:
        """int64, (3,): bits, group size, and whether the scales are logarithms."""
        return torch.tensor([self.bits, self.group_size, self.form == "log"], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: it has been compared."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: Any, *lists: Any
    ) -> None:
        missing, _, errors = lists
        own, saved = self.get_extra_state(), state_dict.get(f"{prefix}_extra_state")
        if saved is not None and saved.tolist() != own.tolist():
            errors.append(
                f"{prefix.removesuffix('.')!r} must have the bits, the group size and the form (1: "
                f"'log') of its codes, {own.tolist()}, got {saved.tolist()}; convert the model as "
                f"the one that was saved"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        if saved is None and f"{prefix}_extra_state" in missing:
            missing.remove(f"{prefix}_extra_state")


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
