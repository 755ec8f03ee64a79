"""The noise: z(seed, stream, draw, index), one float32, the same bits everywhere.

Nothing here has state. The same arguments give the same numbers on every device and from every
implementation, in any order and from any offset, and torch's generators are not involved.
`zoopt.kernels.noise.philox` defines it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from zoopt.checks import check_positive_int
from zoopt.kernels import perturb
from zoopt.kernels.noise.key import Distribution, NoiseKey, check_unsigned
from zoopt.kernels.noise.philox import NOISE_VERSION, philox4x32

__all__ = ["NOISE_VERSION", "mask", "normal", "philox4x32", "rademacher", "stream"]


def stream(name_or_position: str | int) -> int:
    """The 32-bit stream of a parameter.

    Args:
        name_or_position: the parameter's name, which is hashed (BLAKE2b), or its position over
            all param groups, which is the stream itself.

    Raises:
        TypeError, ValueError: neither a str nor an int in [0, 2^32).
    """
    if isinstance(name_or_position, str):
        digest = hashlib.blake2b(name_or_position.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")
    if isinstance(name_or_position, bool) or not isinstance(name_or_position, int):
        raise TypeError(f"name_or_position must be a str or an int, got {name_or_position!r}")
    check_unsigned("position", name_or_position, 32)
    return name_or_position


def normal(
    numel: int,
    *,
    seed: int,
    stream: int,
    draw: int,
    offset: int = 0,
    device: torch.device | str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Standard normals z(seed, stream, draw, offset ... offset + numel - 1): float32, (numel,).

    Args:
        numel: how many, at least 0.
        seed: the run, 64 bits.
        stream: the tensor, 32 bits.
        draw: the direction, 32 bits.
        offset: row-major position of the first element in the whole, unsharded tensor.
        device: the result's; default, torch's default device.
        impl: as for `zoopt.kernels.perturb`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    return _fill(numel, "normal", seed, stream, draw, offset, device, impl)


def rademacher(
    numel: int,
    *,
    seed: int,
    stream: int,
    draw: int,
    offset: int = 0,
    device: torch.device | str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Random signs, +1 or -1: float32, (numel,). Arguments and errors as for `normal`."""
    return _fill(numel, "rademacher", seed, stream, draw, offset, device, impl)


def mask(
    numel: int,
    *,
    seed: int,
    stream: int,
    draw: int,
    density: float,
    offset: int = 0,
    device: torch.device | str | None = None,
    impl: str | None = None,
) -> Tensor:
    """The elements that a direction of this density moves, as True: bool, (numel,).

    Independent of the direction's numbers; each element is True with probability `density`.

    Args:
        density: in [2^-17, 1], rounded to a multiple of 2^-16.
        numel, seed, stream, draw, offset, device, impl: as for `normal`.

    Raises:
        TypeError, ValueError: an argument out of range.
    """
    return _fill(numel, "rademacher", seed, stream, draw, offset, device, impl, density) != 0


def _fill(
    numel: int,
    distribution: Distribution,
    seed: int,
    stream: int,
    draw: int,
    offset: int,
    device: torch.device | str | None,
    impl: str | None,
    density: float = 1.0,
) -> Tensor:
    if numel != 0:
        check_positive_int("numel", numel)
    zeros = torch.zeros(numel, dtype=torch.float32, device=device)
    # z is never 0, so 0 + 1 z has the bits of z.
    return perturb(
        zeros,
        1.0,
        key=NoiseKey(seed, stream, offset, distribution, density),
        draw=draw,
        out=zeros,
        impl=impl,
    )
