"""A basis in half a byte an element: linear symmetric codes in groups with one scale each.

A group's scale s is its largest magnitude over 7, and a code c in [-7, 7] stands for s c: a value
is off by at most s / 2. The entries of a basis are all of about the same size, 1 / sqrt(n), so the
levels are evenly spaced; those of a moment are finer near 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoopt.optimizer import TensorSpec

#: Elements that share a scale, in row-major order (Q-GaLore's group).
GROUP = 256
#: Largest magnitude of a code.
LEVELS = 7


def int4_specs(name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """The state tensors that hold a basis of this shape: codes, two to a byte, and scales."""
    numel = math.prod(shape)
    return {
        name: TensorSpec((-(-numel // 2),), torch.uint8),
        f"{name}_scale": TensorSpec((-(-numel // GROUP),), torch.float32),
    }


def encode_int4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 (ceil(k / 2),), c + 8 with the first of two in the low half, and scales float32
    (ceil(k / 256),), of values with k elements in float32 or float64."""
    groups = -(-values.numel() // GROUP)
    padded = values.new_zeros(groups * GROUP)
    padded[: values.numel()] = values.reshape(-1)
    grouped = padded.view(groups, GROUP)
    scale = (grouped.abs().amax(1) / LEVELS).float()
    # A group of zeros has the scale 0, and the codes 0 / 0.
    levels = (grouped / scale.unsqueeze(1)).nan_to_num(0.0).round().clamp(-LEVELS, LEVELS)
    codes = (levels + 8.0).to(torch.uint8).view(-1)[: values.numel() + values.numel() % 2]
    return codes[0::2] | codes[1::2] << 4, scale


def decode_int4(codes: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The values of that shape and dtype that codes (..., c) and scales (..., g) stand for."""
    numel = math.prod(shape)
    halves = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    levels = halves[..., :numel].to(dtype) - 8.0
    spread = scale.to(dtype).repeat_interleave(GROUP, -1)[..., :numel]
    return (levels * spread).view(*codes.shape[:-1], *shape)
