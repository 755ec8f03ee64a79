"""Adam on the GPU: Triton, one read and one write of theta and of the moments as they are stored.

Launches are as in `gpu`: no contraction, no autotuning. A program handles whole blocks of codes.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from zoopt.kernels.adam.gpu_kernels import moments_kernel
from zoopt.kernels.adam.moments import BLOCK as CODE_BLOCK
from zoopt.kernels.adam.moments import Moment
from zoopt.kernels.adam.reference import Numbers
from zoopt.kernels.noise.gpu import _int32, backend_name
from zoopt.kernels.noise.key import NoiseKey

#: Elements a program, and its warps: 16 elements a thread are 128 bits of int8 codes.
BLOCK = 2048
NUM_WARPS = {"cuda": 4, "hip": 2, "interpreter": 1}
#: Elements of a block of codes of any format.
_UNIT = max(CODE_BLOCK.values())


def adam(
    gradient: Tensor,
    first: Moment,
    second: Moment,
    out: Tensor,
    numbers: Numbers,
    key: NoiseKey,
    moment_draw: int | None,
    norms: Tensor | None,
) -> None:
    """See reference_adam.adam."""
    group, sums = 0, None
    if norms is not None:
        # A group lies in one row, so what is left to sum is a few numbers a row.
        group = math.gcd(gradient.numel() // norms.shape[1], _UNIT)
        sums = torch.empty(2, gradient.numel() // group, dtype=torch.float32, device=out.device)
    _launch(None, gradient, out, first, second, 0.0, numbers, key, moment_draw, None, sums, group)
    if norms is not None and sums is not None:
        torch.sum(sums.view(2, norms.shape[1], -1), -1, out=norms)


def adamw(
    theta: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    decay: float,
    numbers: Numbers,
    key: NoiseKey,
    moment_draw: int | None,
    rounding_draw: int | None,
) -> None:
    """See reference_adam.adamw."""
    _launch(
        *(theta, gradient, None, first, second, decay, numbers, key, moment_draw, rounding_draw)
    )


def _launch(
    theta: Tensor | None,
    gradient: Tensor,
    out: Tensor | None,
    first: Moment,
    second: Moment,
    decay: float,
    numbers: Numbers,
    key: NoiseKey,
    moment_draw: int | None,
    rounding_draw: int | None,
    sums: Tensor | None = None,
    group: int = 0,
) -> None:
    backend = backend_name()
    with torch.cuda.device_of(gradient):
        for start, stop in _spans(gradient.numel()):
            moments = [stored.part(start, stop) for stored in (first, second)]
            parts = (None, None) if sums is None else sums[:, start // group :]
            moments_kernel[(triton.cdiv(stop - start, BLOCK),)](
                None if theta is None else theta[start:stop],
                gradient[start:stop],
                None if out is None else out[start:stop],
                *(tensor for stored in moments for tensor in (stored.codes, stored.scale)),
                *parts,
                decay,
                *numbers,
                stop - start,
                -(-(stop - start) // 2),
                key.offset + start,
                **_noise(key, moment_draw, rounding_draw),
                FORMAT=first.format,
                CODED=moment_draw is not None and first.format != "float32",
                STOCHASTIC=rounding_draw is not None,
                ALIGNED=key.offset % 8 == 0,
                GROUP=group,
                BACKEND=backend,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS[backend],
                enable_fp_fusion=False,
            )


def _noise(key: NoiseKey, moment_draw: int | None, rounding_draw: int | None) -> dict[str, Any]:
    return {
        "number": _int32(key.stream),
        "moment_draw": _int32(moment_draw or 0),
        "rounding_draw": _int32(rounding_draw or 0),
        "k0": _int32(key.seed & 0xFFFFFFFF),
        "k1": _int32(key.seed >> 32),
    }


def _spans(numel: int) -> list[tuple[int, int]]:
    """Launches that cover a tensor: whole blocks, whose masks never divide a vector, and the rest,
    which is not a single element of several."""
    rest = numel % _UNIT
    cut = numel - rest - (_UNIT if rest == 1 and numel > 1 else 0)
    return [(start, stop) for start, stop in ((0, cut), (cut, numel)) if start < stop]
