"""The launch path without a GPU: Triton's binder, specialiser and compiler, on a stub of one.

Every kernel in every variant is launched by the public operation that asks for it; counts of
launches, copies and waits are the stub's.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

import zoopt
import zoopt.kernels
from bench.sass import _nvidia, listing, report
from bench.stub_gpu import TARGETS, another_stream, launches, stub_gpu
from bench.variants import Variant, variants
from zoopt import kernels
from zoopt.kernels.batch import Batch
from zoopt.kernels.noise.key import NoiseKey

#: What Triton's launcher and its compilers keep for themselves.
RESERVED = {"grid", "warmup", "device", "device_type", "stream", "debug", "instrumentation_mode"}
RESERVED |= {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "arch"}
ALL = list(variants())
#: What is compiled here: for sm_90 all of bfloat16, and of the other dtypes what differs from it;
#: for other targets each kernel with all that it can do. `python -m bench.sass` compiles the rest.
COMPILED = [
    variant
    for variant in ALL
    if variant.dtype == "bf16"
    or variant.distribution in ("-", "masked normal", "rademacher")
    or variant.kernel in ("curve", "turn")
]
WIDEST = [
    variant
    for variant in COMPILED
    if variant.dtype == "bf16"
    and variant.distribution in ("-", "masked normal")
    and (variant.rounding == "stochastic" or variant.kernel.startswith("perturb"))
]


def jit_functions() -> dict[str, JITFunction]:
    """Every Triton function of the package."""
    found = {}
    for module in pkgutil.walk_packages(zoopt.kernels.__path__, "zoopt.kernels."):
        if "gpu" in module.name:
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, JITFunction):
                    found[f"{value.__module__}.{value.__name__}"] = value
    return found


def test_no_kernel_has_a_parameter_that_triton_keeps() -> None:
    functions = jit_functions()
    kernels_only = {name: f for name, f in functions.items() if name.endswith("_kernel")}
    assert len(kernels_only) >= 8
    for name, function in kernels_only.items():
        assert not RESERVED & set(inspect.signature(function.fn).parameters), name


@triton.jit
def _misnamed_kernel(theta, stream):
    tl.store(theta, stream)


def test_the_stub_refuses_a_parameter_called_stream() -> None:
    """As release 0.1.0 had it: it compiled ahead of time, was interpreted, and never launched."""
    with stub_gpu(), pytest.raises(AssertionError, match="stream option is deprecated"):
        launches(lambda: _misnamed_kernel[(1,)](torch.zeros(1), stream=3))


def check(variant: Variant, target: str) -> None:
    """It launches and compiles; no spills, and theta moves 128 bits at a time on NVIDIA."""
    counted = report(variant, target)
    assert counted.spills == 0
    if target.startswith("sm"):
        assert counted.access_bits == 128
    ceiling = CEILINGS.get((variant.kernel, variant.dtype, variant.distribution, variant.rounding))
    if ceiling is not None and target == "sm_90":
        instructions, executed, registers = ceiling
        assert counted.instructions_per_element <= instructions
        assert counted.executed_per_element is not None
        assert counted.executed_per_element <= executed
        assert counted.registers <= registers


#: On sm_90, (instructions an element with those of the blocks at a tensor's end, those of them that
#: a program of a whole block executes, registers). An H100 has room for some 44 instructions an
#: element of bfloat16 at its bandwidth, an H200 for 32.
CEILINGS = {
    ("perturb", "bf16", "normal", "nearest"): (40, 31, 64),
    ("perturb", "fp32", "normal", "nearest"): (37, 30, 80),
    ("perturb", "bf16", "rademacher", "nearest"): (28, 16, 88),
    ("perturb_rows", "bf16", "normal", "nearest"): (35, 35, 32),
    ("perturb_scaled", "bf16", "normal", "nearest"): (47, 35, 72),
    ("descend_sign", "bf16", "normal", "nearest"): (49, 39, 48),
    ("apply", "bf16", "normal", "nearest"): (41, 31, 64),
    ("apply", "bf16", "normal", "stochastic"): (48, 38, 72),
}


def test_one_tensor_out_of_step_leaves_the_others_their_vectors() -> None:
    """A slice of a sharded tensor, say, whose noise begins in the middle of a block: before, all
    of its batch went element by element."""
    tensors = [torch.zeros(8192, dtype=torch.bfloat16) for _ in range(2)]
    batch = Batch(tensors, [NoiseKey(1, 2), NoiseKey(1, 3, offset=5)])
    with stub_gpu():
        call = lambda: kernels.apply_(batch, [0.1], draws=[3], rounding="stochastic")  # noqa: E731
        [launch] = launches(call, compiled=True).launches
    opcodes, _, spills, widths = _nvidia(launch.compiled, listing(launch.compiled))
    # Of 4096 elements a thread of 128 reads and writes 32.
    assert (widths.count(128), spills) == (8, 0)
    assert len(opcodes) < 3000


def test_every_variant_launches() -> None:
    """As far as the compiler, on every target: binder and specialiser know all arguments."""
    for target in TARGETS:
        with stub_gpu(target):
            for variant in ALL:
                assert launches(variant.call()).launches, variant


@pytest.mark.parametrize("variant", COMPILED, ids=str)
def test_compiles(variant: Variant) -> None:
    check(variant, "sm_90")


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
@pytest.mark.parametrize("variant", WIDEST, ids=str)
def test_compiles_elsewhere(variant: Variant, target: str) -> None:
    check(variant, target)


def batch(count: int = 20) -> Batch:
    """Tensors of several sizes, some empty."""
    sizes = [(37 * i) % 5 * 1000 for i in range(count)]
    return Batch([torch.zeros(n) for n in sizes], [NoiseKey(1, i) for i in range(count)])


def test_an_operation_on_a_batch_is_one_launch_and_its_table_is_copied_once() -> None:
    theta = batch()
    wide = [torch.zeros_like(tensor) for tensor in theta.tensors]
    with stub_gpu():
        first = launches(lambda: kernels.perturb(theta, 0.1, draw=3, out=theta.tensors))
        assert (len(first.launches), first.copies, first.waits) == (1, 3, 0)
        for operation in (
            lambda: kernels.perturb(theta, 0.1, draw=3, out=theta.tensors),
            lambda: kernels.apply_(theta, [0.1] * 4, draws=range(4)),
            lambda: kernels.perturb(Batch(theta.tensors, theta.keys), 0.1, draw=4, out=wide),
        ):
            launches(operation)
            again = launches(operation)
            assert (len(again.launches), again.copies, again.waits) == (1, 0, 0)


def test_a_table_follows_tensors_that_moved() -> None:
    theta = batch()
    with stub_gpu():
        launches(lambda: kernels.apply_(theta, [0.1], draws=[3]))
        theta.tensors[1].data = torch.zeros(2000)
        recorded = launches(lambda: kernels.apply_(theta, [0.1], draws=[3]))
    [launch] = recorded.launches
    addresses = launch.arguments["theta"].tolist()
    assert addresses == [tensor.data_ptr() for tensor in theta.tensors]
    assert recorded.copies == 1


def test_each_stream_computes_the_addresses_that_it_reads() -> None:
    """Another stream could read them before they are there. Copies are done when they return, and
    serve all streams."""
    theta = batch()
    with stub_gpu():
        call = lambda: kernels.apply_(theta, [0.1], draws=[3])  # noqa: E731
        [here] = launches(call).launches
        with another_stream():
            first, again = launches(call), launches(call)
        [back] = launches(call).launches
    assert (first.copies, first.others, again.others) == (0, ["add"], [])
    there = first.launches[0]
    assert there.arguments["theta"].data_ptr() != here.arguments["theta"].data_ptr()
    assert there.arguments["theta"].tolist() == here.arguments["theta"].tolist()
    assert there.arguments["places"] is here.arguments["places"]
    assert back.arguments["theta"] is here.arguments["theta"]


def test_many_directions_go_to_memory_without_a_copy() -> None:
    theta = batch()
    with stub_gpu():
        kernels.apply_(theta, [0.1], draws=[3])
        recorded = launches(lambda: kernels.apply_(theta, [0.1] * 30, draws=range(30)))
    assert [launch.kernel for launch in recorded.launches] == ["numbers_kernel", "sum_kernel"]
    assert (recorded.copies, recorded.waits) == (0, 0)


def test_a_tensor_alone_needs_no_table() -> None:
    theta, key = torch.zeros(5000), NoiseKey(1, 2)
    with stub_gpu():
        recorded = launches(lambda: kernels.apply_(theta, [0.1], draws=[3], key=key))
    assert (len(recorded.launches), recorded.copies, recorded.waits) == (1, 0, 0)


def specializations(draw: int, size: int, number: int) -> set[str]:
    """What Triton tells the variants of two operations apart by."""
    theta, key = torch.zeros(size), NoiseKey(number, number, 8 * number)
    recorded = launches(lambda: kernels.perturb(theta, 1.0, draw=draw, key=key, out=theta))
    two = {"draws": [draw, 3], "decay": 0.5, "key": key}
    again = launches(lambda: kernels.apply_(theta, [1.0, 2.0], **two))
    return {launch.specialization for launch in recorded.launches + again.launches}


def test_numbers_do_not_compile_anew() -> None:
    """Draws, seeds, coefficients, streams, sizes and offsets are one variant, ones, multiples of 16
    and others; but offsets of more than 32 bits are another."""
    with stub_gpu():
        small = specializations(1, 1, 1) | specializations(16, 16, 16) | specializations(7, 4097, 7)
        assert len(small) == 2
        assert len(specializations(2**32 - 1, 4097, 2**31)) == 2


def model() -> torch.nn.Sequential:
    layers = [torch.nn.Linear(20, 20) for _ in range(8)]
    return torch.nn.Sequential(*layers)


def step_of(optimizer: torch.optim.Optimizer, net: torch.nn.Module, *, read: bool = False) -> Any:
    """A step whose losses are tensors, or are read in the closure; they differ from each other."""
    x = torch.randn(4, 20)
    losses: Iterator[float] = itertools.count(1.0)
    if not optimizer.param_groups[0]["step"]:
        losses = itertools.chain([1.0], losses)  # The first one is evaluated twice, and compared.

    def closure() -> Any:
        loss = net(x).square().mean() * next(losses)
        return loss.item() if read else loss

    return lambda: optimizer.step(closure)


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "momentum_window": 3}]
)
def test_mezo_in_place_is_two_launches_a_probe_and_one(probes: int, options: Any) -> None:
    """However many parameters: no copy to the device, and it is waited for once a step."""
    net = model()
    groups = [{"params": list(net[:4].parameters())}, {"params": list(net[4:].parameters())}]
    groups[1]["lr"] = 1e-3
    with stub_gpu():
        for one_group in (True, False):
            params = net.parameters() if one_group else groups
            optimizer = zoopt.MeZO(
                params, 1e-2, num_probes=probes, perturbation="inplace", seed=1, **options
            )
            for _ in range(2):  # The first step compares two losses at one point, and makes tables.
                step_of(optimizer, net)()
            recorded = launches(step_of(optimizer, net))
            updates = 1 if one_group else 2
            passes = [r for r in recorded.launches if r.kernel != "numbers_kernel"]
            # Moves are alike in groups of one zo_eps, updates in groups of one rate.
            assert len(passes) == 2 * probes + updates
            assert len(recorded.of("numbers_kernel")) <= updates
            assert (recorded.copies, recorded.waits) == (0, 1)
            assert launches(step_of(optimizer, net, read=True)).waits == 2 * probes


@pytest.mark.parametrize(
    ("cls", "options", "count"),
    [
        (zoopt.ZOAdam, {"state": "window", "window": 5}, 3),
        (zoopt.ZOAdam, {"state": "scalar"}, 3),
        (zoopt.FZOO, {"num_probes": 2}, 3),
    ],
)
def test_other_methods_launch_as_often_whatever_the_model(
    cls: Any, options: dict[str, Any], count: int
) -> None:
    found = []
    for layers in (2, 8):
        net = model()[:layers]
        with stub_gpu():
            optimizer = cls(net.parameters(), 1e-2, perturbation="inplace", seed=1, **options)
            for _ in range(2):
                step_of(optimizer, net)()
            recorded = launches(step_of(optimizer, net))
        found.append([launch.kernel for launch in recorded.launches])
        passes = [kernel for kernel in found[-1] if kernel != "numbers_kernel"]
        assert len(passes) == count
        assert (recorded.copies, recorded.waits) == (0, 1)
    assert found[0] == found[1]
