"""Time of SM3's kernel, compared with the same update in plain PyTorch and with a plain pass.

Plain PyTorch is the way of most ports: nu, its root and the quotient are tensors of theta's size,
and the maxima take separate passes. The floor is theta.mul_(c), which reads and writes theta in
place; the kernel also reads the gradient. All methods of a dtype are timed in turn, round by round.
A ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.bench import common
from zoopt.kernels import NoiseKey, sm3_

#: GPU calls are short, so this many are queued and timed together.
CUDA_CALLS = 20
UNIT, FLOOR = "ns/element", "mul_ (floor)"
COLUMNS = {"name": "method", "median": UNIT, "spread": "+-", "ratio": "/ floor"}


def plain(theta: Tensor, gradient: Tensor, row: Tensor, column: Tensor) -> None:
    """One SM3-II step of a matrix, rounded to nearest."""
    g = gradient.float()
    nu = torch.minimum(row[:, None], column).addcmul_(g, g)
    torch.amax(nu, 1, out=row)
    torch.amax(nu, 0, out=column)
    theta.add_((g / nu.sqrt_()).nan_to_num_(0.0), alpha=-1e-3)


def methods(theta: Tensor) -> dict[str, Callable[[], Any]]:
    gradient = torch.randn_like(theta)
    accumulators = [torch.zeros(size, device=theta.device) for size in theta.shape]
    others = [vector.clone() for vector in accumulators]
    buffer = torch.zeros_like(theta, dtype=torch.float32)
    options: dict[str, Any] = {"step_size": -1e-3, "key": NoiseKey(0, 0)}
    found: dict[str, Callable[[], Any]] = {
        FLOOR: lambda: theta.mul_(1.0),
        "plain": lambda: plain(theta, gradient, *others),
        "sm3_": lambda: sm3_(theta, gradient, accumulators, **options),
        "sm3_ momentum": lambda: sm3_(
            theta, gradient, accumulators, buffer=buffer, momentum=0.9, **options
        ),
    }
    if theta.dtype != torch.float32:
        found["sm3_ stochastic"] = lambda: sm3_(
            theta, gradient, accumulators, rounding_draw=1, **options
        )
    return found


def measure(dtype: str, device: torch.device, options: argparse.Namespace) -> list[common.Row]:
    theta = torch.randn(options.rows, options.columns, device=device).to(common.DTYPES[dtype])
    calls = CUDA_CALLS if device.type == "cuda" else 1
    times = common.round_robin(methods(theta), device, options.repeats, dtype, calls)
    return [
        common.measured(
            f"{name}, {dtype}",
            [second * 1e9 / theta.numel() for second in own],
            UNIT,
            ratio=common.ratio(own, times[FLOOR]),
            dtype=dtype,
        )
        for name, own in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = common.parser(str(__doc__), "python -m bench.sm3 --rows 4096 --columns 4096")
    parser.add_argument("--rows", type=common.positive, default=4096, help="of theta")
    parser.add_argument("--columns", type=common.positive, default=4096, help="of theta")
    common.add_common_arguments(parser, repeats=9)
    options = common.parse(parser, argv)
    device = common.open_device(parser, options)
    rows = [row for dtype in ("float32", "bfloat16") for row in measure(dtype, device, options)]
    common.say(common.table(COLUMNS, rows), options.json)
    content = common.document("sm3", options, device, rows, ratio_to="theta.mul_(c)")
    common.write_json(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
