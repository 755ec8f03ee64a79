"""The operations on the GPU, in Triton: one launch per batch, as in `gpu` of the noise kernels."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.kernels.batch import Batch
from zoopt.kernels.descent.gpu_kernels import curve_kernel, descend_kernel, turn_kernel
from zoopt.kernels.descent.gpu_measures import energy_kernel, small_kernel, total_kernel
from zoopt.kernels.descent.rule import Rule, Shape
from zoopt.kernels.noise.gpu import ADAM_BLOCK, BLOCK, launch, place_of, rounds, terms_of

#: An operation takes a whole batch.
BATCHES = True
_RULES = {"none": 0, "momentum": 1, "sign": 2, "adam": 3}
_SHAPES = {"plain": 0, "small": 1, "kept": 2, "scaled": 3, "cone": 4}
#: The greatest number of parameters of a rule.
_NUMBERS = 7


def descend(
    batch: Batch,
    outs: Sequence[Tensor],
    first: Sequence[Tensor] | None,
    second: Sequence[Tensor] | None,
    beside: Sequence[Tensor] | None,
    coefficients: Sequence[float],
    gradients: Sequence[float],
    draws: Sequence[int],
    shape: Shape,
    rule: Rule,
    decay: float,
    rounding_draw: int | None,
) -> None:
    """See reference.descend."""
    if shape.kind == "kept" and beside is not None:
        beside = _bytes(beside)
    blocks = ADAM_BLOCK
    if rule.kind == "sign" and shape.kind == "plain" and rounding_draw is None:
        blocks = {**ADAM_BLOCK, False: BLOCK[False]}  # More elements fit in registers.
    launch(
        descend_kernel,
        batch,
        {
            "theta": batch.tensors,
            "out": outs,
            "first": first,
            "second": second,
            "beside": beside,
        },
        blocks,
        "scaled" if shape.kind == "scaled" and rule.kind == "none" else "",
        decay=decay,
        radial=shape.radial,
        radial_estimate=shape.estimate,
        numbers=(*rule.numbers, *[0.0] * (_NUMBERS - len(rule.numbers))),
        SHAPE=_SHAPES[shape.kind],
        RULE=_RULES[rule.kind],
        **terms_of(batch, draws, coefficients, gradients),
        **rounds(rounding_draw),
    )


def curve(batch: Batch, coefficients: Sequence[float], draws: Sequence[int], base: float) -> None:
    """See reference.curve."""
    terms = terms_of(batch, draws, coefficients)
    launch(curve_kernel, batch, {"state": batch.tensors}, ADAM_BLOCK, base=base, **terms)


def turn(
    batch: Batch,
    coefficients: Sequence[float],
    draws: Sequence[int],
    radial: float,
    keep: float,
    grow: float,
) -> None:
    """See reference.turn."""
    numbers = {"radial": radial, "keep": keep, "grow": grow}
    terms = terms_of(batch, draws, coefficients)
    launch(turn_kernel, batch, {"state": batch.tensors}, ADAM_BLOCK, **numbers, **terms)


def small(batch: Batch, limits: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """See reference.small."""
    memories = {"theta": batch.tensors, "limit": limits, "out": _bytes(outs)}
    launch(small_kernel, batch, memories, BLOCK)


def energies(batch: Batch, coefficients: Sequence[float] | None, draws: Sequence[int]) -> Tensor:
    """See op.energies. Sums of blocks come first, and then the sum of each tensor's blocks."""
    place, programs = place_of(batch, ADAM_BLOCK)
    parts = torch.empty(programs, dtype=torch.float64, device=batch.device)
    out = torch.empty(len(batch), dtype=torch.float64, device=batch.device)
    terms: dict[str, Any] = {"terms": None, "UNROLLED": 0, "count": 0}
    if coefficients is not None:
        terms = terms_of(batch, draws, coefficients)
    memories = {"theta": batch.tensors}
    made = coefficients is not None
    launch(energy_kernel, batch, memories, ADAM_BLOCK, out=parts, MADE=made, **terms)
    with torch.cuda.device_of(batch.tensors[0]):
        total_kernel[(len(batch),)](
            parts, out, place["places"], programs, TABLE=len(batch) > 1, BLOCK=1024, num_warps=4
        )
    return out


def _bytes(bools: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.view(torch.uint8) for tensor in bools]
