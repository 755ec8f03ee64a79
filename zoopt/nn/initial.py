"""Initial values from the noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoopt.kernels.noise.philox import halfwords
from zoopt.noise import stream

#: Elements of a dense (rows, n) intermediate, or of noise, that exist at a time.
CHUNK = 1 << 20


@torch.no_grad()
def kaiming_uniform_(tensor: Tensor, fan_in: int, *, seed: int, name: str) -> None:
    """Fill with U(+-1 / sqrt(fan_in)), as nn.Linear does.

    Each element uses 16 random bits that depend on seed and name alone. Meta tensors are not
    changed.
    """
    if tensor.is_meta:
        return
    bound = 1.0 / math.sqrt(fan_in)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        index = torch.arange(start, start + part.numel(), device=tensor.device)
        bits = halfwords(index, seed=seed, stream=stream(f"initial {name}"), draw=0)
        part.copy_((bits.double() + 0.5) * (bound / 32768) - bound)
