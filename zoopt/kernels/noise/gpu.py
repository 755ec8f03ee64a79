"""The operations on the GPU: Triton, one read and one write of theta, the noise in registers.

Launches pass enable_fp_fusion=False: a product is rounded before it is added, except in the
explicit fused multiply-adds of the noise. A program handles BLOCK elements that begin at a Philox
block, so that a thread's eight neighbouring elements come from one Philox call and are loaded and
stored 128 bits at a time. There is no autotuning: it would apply an update several times.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from zoopt.kernels.dispatch import interpreting
from zoopt.kernels.noise.gpu_kernels import (
    adam_kernel,
    apply_kernel,
    momentum_kernel,
    perturb_kernel,
    rows_kernel,
)
from zoopt.kernels.noise.key import NoiseKey

#: Elements a program, and its warps: 32 elements a thread spread the key schedule's cost.
BLOCK = 4096
NUM_WARPS = {"cuda": 4, "hip": 2, "interpreter": 1}
#: Elements a program of the Adam kernel without and with a mask: all that fit in registers.
ADAM_BLOCK = {False: 2048, True: 1024}
#: Elements of one row that a program of the embedding kernel handles.
ROW_BLOCK = 1024
#: Blocks of 128 signs or 8 normals begin at multiples of this.
_ALIGNMENT = {"normal": 8, "rademacher": 128}


def _int32(word: int) -> int:
    """A 32-bit word as the int32 that Triton's argument has."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _spans(key: NoiseKey, numel: int) -> list[tuple[int, int, dict[str, Any]]]:
    """Launches that cover the tensor: element from and to, and the arguments that place them.

    A tensor that starts at a Philox block is cut before its last partial block, so that the mask
    of the main launch never divides a vector.
    """
    alignment = _ALIGNMENT[key.distribution]
    skipped = key.offset % alignment
    cut = numel if skipped else numel - numel % 128
    spans = []
    for start, stop in ((0, cut), (cut, numel)):
        if start < stop:
            place = {
                "numel": stop - start + skipped,
                "first": key.offset - skipped + start,
                "skipped": skipped,
                "ALIGNED": skipped == 0,
            }
            spans.append((start, stop, place))
    return spans


def backend_name() -> str:
    """What the kernels run on."""
    return "interpreter" if interpreting() else "hip" if torch.version.hip else "cuda"


def _noise(key: NoiseKey) -> dict[str, Any]:
    backend = backend_name()
    return {
        "stream": _int32(key.stream),
        "k0": _int32(key.seed & 0xFFFFFFFF),
        "k1": _int32(key.seed >> 32),
        "threshold": key.threshold or 0,
        "NORMAL": key.distribution == "normal",
        "MASKED": key.threshold is not None,
        "BACKEND": backend,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS[backend],
        "enable_fp_fusion": False,
    }


def _grid(place: dict[str, Any], block: int = BLOCK) -> tuple[int]:
    return (triton.cdiv(place["numel"], block),)


def _scalars(device: torch.device, *rows: Sequence[float]) -> Tensor:
    """Sequences of numbers of one length, on the device: float32, (len(rows), length)."""
    return torch.tensor(rows, dtype=torch.float32).to(device)


def _draws(device: torch.device, draws: Sequence[int]) -> Tensor:
    """Draws on the device: int32, (len(draws),)."""
    return torch.tensor([_int32(draw) for draw in draws], dtype=torch.int32).to(device)


def weighted_sum(
    theta: Tensor,
    out: Tensor,
    coefficients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    key: NoiseKey,
    rounding_draw: int | None,
    addend: Tensor | None = None,
) -> None:
    """See reference.weighted_sum."""
    plain = len(draws) == 1 and decay == 1.0 and rounding_draw is None and addend is None
    with torch.cuda.device_of(theta):
        if theta.data_ptr() != out.data_ptr() or plain:
            [alpha], [draw] = coefficients, draws
            for start, stop, place in _spans(key, theta.numel()):
                perturb_kernel[_grid(place)](
                    theta[start:stop],
                    out[start:stop],
                    alpha,
                    draw=_int32(draw),
                    **place,
                    **_noise(key),
                )
            return
        [scalars], numbers = _scalars(theta.device, coefficients), _draws(theta.device, draws)
        for start, stop, place in _spans(key, theta.numel()):
            apply_kernel[_grid(place)](
                theta[start:stop],
                None if addend is None else addend[start:stop],
                scalars,
                numbers,
                len(draws),
                decay,
                rounding_draw=_int32(rounding_draw or 0),
                STOCHASTIC=rounding_draw is not None,
                **place,
                **_noise(key),
            )


def momentum_sum(
    theta: Tensor,
    buffer: Tensor,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    decay: float,
    momentum: float,
    step_size: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.momentum_sum."""
    with torch.cuda.device_of(theta):
        scalars = _scalars(theta.device, coefficients, gradients)
        numbers = _draws(theta.device, draws)
        for start, stop, place in _spans(key, theta.numel()):
            momentum_kernel[_grid(place)](
                theta[start:stop],
                buffer[start:stop],
                scalars[0],
                scalars[1],
                numbers,
                len(draws),
                decay,
                momentum,
                step_size,
                rounding_draw=_int32(rounding_draw or 0),
                STOCHASTIC=rounding_draw is not None,
                **place,
                **_noise(key),
            )


def adam_window(
    theta: Tensor,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    closes: Sequence[bool],
    draws: Sequence[int],
    decay: float,
    step_size: float,
    eps: float,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """See reference.adam_window."""
    with torch.cuda.device_of(theta):
        scalars = _scalars(theta.device, coefficients, gradients, first, second)
        ends, numbers = _draws(theta.device, closes), _draws(theta.device, draws)
        block = ADAM_BLOCK[key.threshold is not None]
        for start, stop, place in _spans(key, theta.numel()):
            adam_kernel[_grid(place, block)](
                theta[start:stop],
                *scalars,
                ends,
                numbers,
                len(draws),
                decay,
                step_size,
                eps,
                rounding_draw=_int32(rounding_draw or 0),
                STOCHASTIC=rounding_draw is not None,
                **place,
                **{**_noise(key), "BLOCK": block},
            )


def gather_rows(
    weight: Tensor, rows: Tensor, out: Tensor, alpha: float, key: NoiseKey, draw: int
) -> None:
    """See reference.gather_rows."""
    d = weight.shape[1]
    blocks = triton.cdiv(d + _ALIGNMENT[key.distribution] - 1, ROW_BLOCK)
    with torch.cuda.device_of(weight):
        rows_kernel[(rows.numel(), blocks)](
            weight,
            rows,
            out,
            alpha,
            d,
            key.offset,
            draw=_int32(draw),
            **{**_noise(key), "BLOCK": ROW_BLOCK},
        )
