"""Scripts of writes, and the same writes made one by one by the other operations."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from zoopt import kernels
from zoopt.kernels import NoiseKey, Write
from zoopt.kernels.batch import Batch

RULES = ("none", "sign", "adam")
#: On the CPU there are buffers too.
ALL_RULES = (*RULES, "momentum")


def script(count: int, *, stochastic: bool, rules: tuple[str, ...] = ("none",)) -> list[Write]:
    """Writes as runs have them: out, across and back along a direction, and sums of several."""
    choose = random.Random(count)
    writes = []
    for step in range(count):
        rounding_draw = step if stochastic and step % 3 == 2 else None
        draws = tuple(max(0, step - i) for i in reversed(range(choose.choice((1, 1, 3, 7)))))
        draws = (5,) if 5 <= step < 9 else draws
        draws = tuple(sorted({*draws, 2**32 - 1} if step % 10 == 4 else {*draws}))
        numbers = tuple(choose.uniform(-1e-2, 1e-2) for _ in draws)
        decay = choose.choice((1.0, 0.99))
        write = Write(draws, numbers, decay, rounding_draw)
        rule: Any = choose.choice(rules)
        if rule != "none":
            own: dict[str, Any] = {"gradients": numbers[::-1], "step_size": -1e-2}
            # A buffer's terms are along the write's own directions.
            apart = rule != "momentum" and step % 2 == 0
            estimated = (1000 + step, *draws[1:]) if apart else draws
            if rule == "adam":
                own |= {"first": numbers, "second": tuple(map(abs, numbers)), "eps": 1e-3}
                own["closes"] = tuple(i % 2 == 1 for i in range(len(draws)))
            if rule == "momentum":
                own["momentum"] = 0.9
                # It has no other draw to round by.
                rounding_draw = None if rounding_draw is None else draws[-1]
            write = Write(draws, numbers, decay, rounding_draw, rule, estimated, **own)
        writes.append(write)
    return writes


def one_by_one(theta: Tensor, key: NoiseKey, writes: list[Write], buffer: Tensor) -> None:
    """The writes as operations of their own, by the reference."""
    for write in writes:
        rounds = {
            "rounding": "nearest" if write.rounding_draw is None else "stochastic",
            "key": key,
            "decay": write.decay,
            "impl": "reference",
        }
        if write.rule == "none":
            kernels.apply_(
                theta,
                write.coefficients,
                draws=write.draws,
                rounding_draw=write.rounding_draw,
                **rounds,  # type: ignore[arg-type]
            )
            continue
        if write.rule == "momentum":
            kernels.momentum_(
                theta,
                buffer,
                write.coefficients,
                write.gradients,
                draws=write.draws,
                momentum=write.momentum,
                step_size=write.step_size,
                **rounds,  # type: ignore[arg-type]
            )
            continue
        wide = theta.new_zeros(theta.shape, dtype=torch.promote_types(theta.dtype, torch.float32))
        if write.rule == "sign":
            own = {"draws": write.estimate_draws, "key": key, "impl": "reference"}
            kernels.apply_(wide, write.gradients, **own)  # type: ignore[arg-type]
            wide = wide.sign() * write.step_size
        else:
            ghat, m, v = wide, wide.clone(), wide.clone()
            columns = (write.estimate_draws, write.gradients, write.first, write.second)
            for i, (draw, gradient, first, second) in enumerate(zip(*columns, strict=True)):
                kernels.apply_(ghat, [gradient], draws=[draw], key=key, impl="reference")
                if write.closes[i]:
                    m = m + ghat * torch.tensor(first, dtype=ghat.dtype)
                    v = v + ghat * ghat * torch.tensor(second, dtype=ghat.dtype)
                    ghat = torch.zeros_like(ghat)
            root = v.double().sqrt().to(v.dtype)
            wide = m * write.step_size / (root + torch.tensor(write.eps, dtype=v.dtype))
        kernels.add_(
            theta,
            wide,
            write.coefficients,
            draws=write.draws,
            rounding_draw=write.rounding_draw,
            **rounds,  # type: ignore[arg-type]
        )


def tensors(dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Tensor]:
    """Weights of all sizes, -0.0, infinity and NaN among them."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(size, generator=generator) for size in sizes]
    for tensor in made:
        tensor.view(-1)[::7] = -0.0
        tensor.view(-1)[3::1009] = float("inf")
        tensor.view(-1)[4::1009] = float("nan")
    return [tensor.to(dtype) for tensor in made]


def batch(dtype: torch.dtype, sizes: tuple[int, ...], **options: Any) -> Batch:
    """Weights with keys, whose offsets are none, small, and just before more than 32 bits of
    blocks."""
    offsets = [(0, 5, (1 << 35) - 700)[i % 3] for i in range(len(sizes))]
    keys = [NoiseKey(77, 5 + i, offset, **options) for i, offset in enumerate(offsets)]
    return Batch(tensors(dtype, sizes), keys)
