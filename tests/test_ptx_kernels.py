"""Whole kernels, as compiled for a GPU, beside the reference: their PTX is run on a CPU.

Triton's interpreter runs the other half of the kernels, without instructions of NVIDIA's.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ptx_kernel import emulated_gpu
from tests.test_batch_adam import all_agree, keys, pairs, run, stored
from zoopt import kernels
from zoopt.kernels.adam.moments import Moment
from zoopt.kernels.batch import Batch


@pytest.mark.parametrize(
    ("operation", "dtype", "form", "target"),
    [
        ("adamw", torch.bfloat16, "int4", "sm_90"),
        ("adamw", torch.bfloat16, "int8", "sm_80"),
        ("adam", torch.float32, "int8", "sm_90"),
        ("lion", torch.float16, "int4", "sm_80"),
        ("momentum", torch.bfloat16, "int8", "sm_90"),
    ],
)
def test_moments_have_the_references_bits(
    operation: str, dtype: torch.dtype, form: str, target: str
) -> None:
    """Whole blocks and ends of tensors, even and odd, with zeros, infinities and NaNs."""
    options = {"bad": True, "together": True}
    expected = run(operation, dtype, form, "reference", **options)
    with emulated_gpu(target):
        got = run(operation, dtype, form, None, **options)
    assert all_agree(got, expected)


@pytest.mark.parametrize("count", [1, 2])
def test_codes_anywhere_in_memory(count: int) -> None:
    """Two to a byte, of tensors that do not begin at vectors of memory."""

    def one_on(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:1], tensor])[1:]

    def moved(moment: Moment) -> Moment:
        assert moment.scale is not None
        own = one_on(moment.codes), one_on(moment.scale)
        return Moment(*own, numel=moment.numel, signed=moment.signed)

    found = []
    for emulated in (False, True):
        torch.manual_seed(1)
        theta, gradients = ([one_on(torch.randn(2000)) for _ in range(count)] for _ in range(2))
        firsts, seconds = ([moved(each) for each in own] for own in pairs([2000] * count, "int4"))
        batch = Batch(theta, keys(count))
        options: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "scale": -0.1, "decay": 0.9}
        options["impl"] = None if emulated else "reference"
        with emulated_gpu() if emulated else contextlib.nullcontext():
            for _ in range(2):
                kernels.adamw_(batch, gradients, firsts, seconds, moment_draw=3, **options)
        found.append([*theta, *stored(firsts), *stored(seconds)])
    assert all_agree(*found)
