"""First-order operations on a stub of a GPU: one launch a batch, and nothing is copied twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.overhead import FIRST_ORDER, begun_first_order, calls
from bench.sass import report
from bench.stub_gpu import launches, stub_gpu
from bench.variants import Variant
from tests.test_batch_adam import AVERAGES, FORMATS, SHAPES, pairs
from zoopt import kernels
from zoopt.kernels import NoiseKey
from zoopt.kernels.adam.op_average import load_
from zoopt.kernels.batch import Batch

COUNT = 20


@pytest.mark.parametrize("name", [name for name in FIRST_ORDER if name.startswith("AdamW")])
def test_a_step_calls_hardly_anything_for_each_tensor(name: str) -> None:
    """Of Python and of C, without what one `map` asks of all tensors. It was 298 (float32) and 360
    (int8) when each was prepared by itself."""
    made = {}
    for layers in (2, 4):
        with begun_first_order(name, layers) as step:
            made[layers] = calls(step)
    assert (made[4] - made[2]) / 18 <= 4


def operation(name: str, form: str, shapes: Any) -> Callable[[], Any]:
    """An operation on a batch of that many tensors."""
    tensors = [torch.zeros(shape) for shape in shapes]
    batch = Batch(tensors, [NoiseKey(1, i) for i in range(len(tensors))])
    firsts, seconds = pairs([tensor.numel() for tensor in tensors], form)
    options: dict[str, Any] = {"moment_draw": 3}
    if name in AVERAGES:
        return lambda: kernels.average_(batch, firsts, out=tensors, **AVERAGES[name], **options)
    if name == "store":
        return lambda: kernels.store_(batch, seconds, **options)
    if name == "load":
        return lambda: load_(batch, seconds)
    if name == "lerp":
        return lambda: kernels.lerp_(batch, firsts, 0.1, out=tensors, **options)
    options |= {"betas": (0.9, 0.9), "scale": 1.0, "eps": 1e-8}
    if name == "adamw":
        gradients = [torch.zeros_like(tensor) for tensor in tensors]
        return lambda: kernels.adamw_(batch, gradients, firsts, seconds, decay=0.9, **options)
    norms = None
    if name == "norms":
        norms = torch.zeros(2, sum(len(tensor) for tensor in tensors))
    return lambda: kernels.adam_(batch, firsts, seconds, out=tensors, norms=norms, **options)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["adamw", "adam", "momentum", "lion", "lerp", "store", "load"])
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
    """Draws, seeds, scales and sizes are one variant; sizes of whole vectors of memory another."""
    found = []
    with stub_gpu():
        for number in (1, 7, 16, 48):
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
            found.append({launch.specialization for launch in recorded.launches})
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert len(found[0] | found[2]) == 2


def test_sm3_of_a_batch_is_one_launch() -> None:
    """Two where rows are not whole vectors of memory; the maxima come back in one pass."""
    shapes = [(64, 32), (128,), (16, 48), (7, 5), (9,)]
    theta = Batch([torch.zeros(s) for s in shapes], [NoiseKey(1, i) for i in range(len(shapes))])
    gradients = [torch.zeros(shape) for shape in shapes]
    bounds = [[torch.zeros(size) for size in shape] for shape in shapes]
    whole = Batch(theta.tensors[:3], theta.keys[:3])
    with stub_gpu():
        for batch, count in ((theta, 2), (whole, 1)):
            operands = (batch, gradients[: len(batch)], bounds[: len(batch)])
            call = functools.partial(kernels.sm3_, *operands, step_size=-0.1)
            launches(call)
            again = launches(call)
            assert (len(again.launches), again.copies, again.waits) == (count, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_one_launch(dtype: torch.dtype) -> None:
    """Triton's where random bits round it, or the gradient has a term; else BLAS's."""
    theta, key = torch.zeros(64, 48, dtype=dtype), NoiseKey(1, 2)
    left, right = torch.zeros(64, 8, dtype=dtype), torch.zeros(48, 8, dtype=dtype)
    scaled = {"gradient": torch.zeros_like(theta), "channel_scale": torch.zeros(64, 1)}
    with stub_gpu():
        for options, triton in (
            ({"rounding_draw": 3}, dtype != torch.float32),
            (scaled, True),
            ({**scaled, "rounding_draw": 3}, True),
        ):
            call = functools.partial(kernels.add_product_, theta, left, right, key=key, **options)
            recorded = launches(call)
            assert (len(recorded.launches), recorded.copies, recorded.waits) == (triton, 0, 0)


def test_norms_of_channels_read_a_gradient_once() -> None:
    """Where chunks of it were widened, squared and summed, 30,000 launches a step."""
    gradient = torch.zeros(3000, 2000, dtype=torch.bfloat16)
    with stub_gpu(), torch.profiler.profile() as profile:
        kernels.squares(gradient, 1)
    found = {event.key: event.count for event in profile.key_averages()}
    assert found["aten::linalg_vector_norm"] == 1
    assert not {"aten::cat", "aten::sum"} & found.keys()


#: On sm_90, (instructions an element with those of the last block and of rare numbers, those of
#: them that a program of whole blocks executes, registers). An H100 can execute 28.7e12 a second;
#: while it moves an element at .9 of what a copy moves, 2.7e12 bytes, that is 10.6 a byte: 106 of
#: adamw with int8 moments and 86 with int4, 42 of bfloat16 products.
CEILINGS = {
    Variant("adamw", "fp32", format="float32"): (81, 33, 80),
    Variant("adamw", "bf16", format="float32", rounding="stochastic"): (99, 46, 96),
    Variant("adamw", "bf16", format="bfloat16", rounding="stochastic"): (112, 60, 96),
    Variant("adamw", "bf16", format="int8", rounding="stochastic"): (141, 88, 120),
    Variant("adamw", "bf16", format="int4", rounding="stochastic"): (138, 84, 120),
    Variant("adam", "bf16", format="int8", rounding="stochastic"): (130, 77, 104),
    Variant("lion", "bf16", format="int8", rounding="stochastic"): (59, 48, 88),
    Variant("lerp", "bf16", format="int8", rounding="stochastic"): (48, 37, 80),
    Variant("store", "bf16", format="int8", rounding="stochastic"): (36, 27, 72),
    Variant("load", "bf16", format="int8"): (18, 10, 40),
    Variant("multiply", "bf16"): (19, 8, 56),
    Variant("entries", "bf16", rounding="stochastic"): (250, 180, 128),
    Variant("product", "bf16", rounding="stochastic"): (32, 32, 88),
    Variant("product", "fp16", rounding="stochastic"): (43, 43, 104),
    Variant("product_batch", "bf16", rounding="stochastic"): (33, 33, 104),
    Variant("scaled", "bf16", rounding="stochastic"): (31, 31, 32),
    Variant("scaled_batch", "bf16", rounding="stochastic"): (38, 38, 40),
}


@pytest.mark.parametrize("variant", CEILINGS, ids=str)
def test_machine_code_stays_below_its_ceiling(variant: Variant) -> None:
    counted, (instructions, executed, registers) = report(variant, "sm_90"), CEILINGS[variant]
    assert counted.instructions_per_element <= instructions
    assert counted.executed_per_element is not None
    assert counted.executed_per_element <= executed
    assert counted.registers <= registers
    assert counted.spills == 0
    assert counted.access_bits == 128
