"""Moments on a stub of a GPU: one launch a batch, and nothing is copied twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.stub_gpu import launches, stub_gpu
from tests.test_batch_adam import AVERAGES, FORMATS, SHAPES, pairs
from zoopt import kernels
from zoopt.kernels import NoiseKey
from zoopt.kernels.batch import Batch

COUNT = 20


def operation(name: str, form: str, shapes: Any) -> Callable[[], Any]:
    """An operation on a batch of that many tensors."""
    tensors = [torch.zeros(shape) for shape in shapes]
    batch = Batch(tensors, [NoiseKey(1, i) for i in range(len(tensors))])
    firsts, seconds = pairs([tensor.numel() for tensor in tensors], form)
    options: dict[str, Any] = {"moment_draw": 3}
    if name in AVERAGES:
        return lambda: kernels.average_(batch, firsts, out=tensors, **AVERAGES[name], **options)
    options |= {"betas": (0.9, 0.9), "scale": 1.0, "eps": 1e-8}
    if name == "adamw":
        gradients = [torch.zeros_like(tensor) for tensor in tensors]
        return lambda: kernels.adamw_(batch, gradients, firsts, seconds, decay=0.9, **options)
    norms = None
    if name == "norms":
        norms = torch.zeros(2, sum(len(tensor) for tensor in tensors))
    return lambda: kernels.adam_(batch, firsts, seconds, out=tensors, norms=norms, **options)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["adamw", "adam", "momentum", "lion"])
def test_a_batch_is_one_launch(name: str, form: str) -> None:
    call = operation(name, form, [(37 * i % 5 * 1000 + 2,) for i in range(COUNT)])
    with stub_gpu():
        launches(call)
        again = launches(call)
        alone = launches(operation(name, form, [(5000,)]))
    assert (len(again.launches), again.copies, again.waits) == (1, 0, 0)
    assert (len(alone.launches), alone.copies, alone.waits) == (1, 0, 0)


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_norms_of_a_batch_are_one_launch(form: str) -> None:
    """And a sum of torch's of a few numbers a row."""
    call = operation("norms", form, SHAPES)
    with stub_gpu():
        launches(call)
        again = launches(call)
    assert (len(again.launches), again.copies, again.waits) == (1, 0, 0)


def test_numbers_do_not_compile_anew() -> None:
    """Draws, seeds, scales and sizes are one variant."""
    found = set()
    with stub_gpu():
        for number in (1, 16, 7):
            theta, gradient = torch.zeros(4097 * number), torch.zeros(4097 * number)
            [first], [second] = pairs([theta.numel()], "float32")
            recorded = launches(
                lambda number=number, operands=(theta, gradient, first, second): kernels.adamw_(
                    *operands,
                    betas=(0.9, 0.9),
                    scale=float(number),
                    eps=1.0 / number,
                    decay=1.0,
                    key=NoiseKey(number, number),
                    moment_draw=number,
                    rounding_draw=number,
                )
            )
            found |= {launch.specialization for launch in recorded.launches}
    assert len(found) == 1
