"""The Adam and low-rank product kernels that `zoopt bench kernels` times, and torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from zoopt import noise
from zoopt.kernels import NoiseKey, adam_, adamw_, add_product_
from zoopt.kernels.adam.moments import BLOCK, Format, Moment

RANK = 128
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
NUMBERS: dict[str, Any] = {"betas": (0.9, 0.999), "scale": -1e-6, "eps": 1e-8}


def _normal(theta: Tensor, shape: Sequence[int], stream: int) -> Tensor:
    """Normals of that shape, on theta's device."""
    numel = math.prod(shape)
    return noise.normal(numel, seed=0, stream=stream, draw=0, device=theta.device).view(*shape)


def moment(theta: Tensor, form: str, *, signed: bool) -> Moment:
    """A zero moment for theta's elements."""
    numel, device = theta.numel(), theta.device
    if form in ("float32", "bfloat16"):
        values = torch.zeros(numel, dtype=getattr(torch, form), device=device)
        return Moment(values, None, numel, signed)
    if form == "int4":
        codes = torch.zeros(-(-numel // 2), dtype=torch.uint8, device=device)
    else:
        codes = torch.zeros(numel, dtype=torch.int8 if signed else torch.uint8, device=device)
    scale = torch.zeros(-(-numel // BLOCK[form]), device=device)
    return Moment(codes, scale, numel, signed)


def first_order(theta: Tensor) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Names, what to time, and the bytes that it reads and writes for each element of theta."""
    item = theta.element_size()
    gradient = _normal(theta, theta.shape, 1).to(theta.dtype)
    average, square, step = torch.zeros_like(theta), torch.zeros_like(theta), torch.ones(())
    step = step.to(theta.device)

    def fused() -> None:
        torch._fused_adamw_(
            [theta],
            [gradient],
            [average],
            [square],
            [],
            [step],
            lr=1e-6,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.01,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    yield "torch's fused AdamW", fused, 7 * item
    out = torch.empty_like(theta, dtype=torch.float32)
    for form in get_args(Format):
        moments = moment(theta, form, signed=True), moment(theta, form, signed=False)
        draws: dict[str, Any] = {"moment_draw": 3, "key": NoiseKey(1, 2)}

        def adamw(
            moments: tuple[Moment, Moment] = moments, draws: dict[str, Any] = draws
        ) -> Tensor:
            return adamw_(
                theta,
                gradient,
                moments[0],
                moments[1],
                decay=0.9999,
                rounding_draw=3,
                **NUMBERS,
                **draws,
            )

        def adam(moments: tuple[Moment, Moment] = moments, draws: dict[str, Any] = draws) -> Tensor:
            return adam_(gradient, moments[0], moments[1], out=out, **NUMBERS, **draws)

        codes = int(4 * BYTES[form])
        yield f"adamw_ {form}", adamw, codes + 3 * item
        yield f"adam_ {form}", adam, codes + item + 4
    rows = 1 << round(math.log2(theta.numel()) / 2)
    matrix = theta.view(-1)[: theta.numel() // rows * rows].view(rows, -1)
    left = 1e-6 * _normal(theta, (rows, RANK), 2)
    right = _normal(theta, (matrix.shape[1], RANK), 3)
    narrow = left.to(theta.dtype), right.to(theta.dtype)
    yield f"addmm_ rank {RANK}", lambda: matrix.addmm_(narrow[0], narrow[1].t()), 2 * item
    yield (
        f"add_product_ rank {RANK}",
        lambda: add_product_(matrix, left, right, key=NoiseKey(1, 2), rounding_draw=3),
        2 * item,
    )
