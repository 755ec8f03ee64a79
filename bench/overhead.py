"""Host time of optimizer steps on a GPU: what Python and torch's dispatch take to queue a step.

Kernels are asked for as on a GPU, but not launched (see `stub_gpu`), so what is left is the time of
this machine's processor: of the only thread, the least of several steps. No figure is one of a GPU.

- Virtual zeroth-order steps, for each operator, beyond the forward passes. The model is many linear
  layers, whose products take no time to speak of: without biases, as LLaMA has them, and with, so
  that an operator reads two parameters.
- Zeroth-order steps in place, whole, over matrices and vectors in turn.
- First-order steps, whole, over small tensors of as many shapes as LLaMA-7B's 291. What torch
  computes of projected matrices is computed here, and so is in these figures. Beside them the
  Python of torch.optim.AdamW's step, without any of its kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from triton.runtime.jit import JITFunction

import zoopt
from bench.stub_gpu import stub_gpu
from zoopt.bench import common

UNIT = "us/operator"
COLUMNS = {
    "name": "method",
    "tensors": "tensors",
    "median": "us",
    "unit": "unit",
    "inside": "inside evaluations",
    "calls": "calls",
}
#: Zeroth-order methods; biases or not, they evaluate as often as a step is seen to.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MeZO": (zoopt.MeZO, {}),
    "MeZO, 4 probes": (zoopt.MeZO, {"num_probes": 4}),
    "MeZO, momentum": (zoopt.MeZO, {"momentum": 0.9}),
    "MeZO, momentum window": (zoopt.MeZO, {"momentum": 0.9, "momentum_window": 5}),
    "MeZO, random mask": (zoopt.MeZO, {"mask": "random", "density": 0.5}),
    "MeZO, magnitude mask": (zoopt.MeZO, {"mask": "magnitude", "density": 0.5}),
    "ZOAdam": (zoopt.ZOAdam, {}),
    "ZOAdam, window": (zoopt.ZOAdam, {"state": "window", "window": 5}),
    "ZOAdam, scalar": (zoopt.ZOAdam, {"state": "scalar"}),
    "ZOSignSGD": (zoopt.ZOSignSGD, {}),
    "ZOConservativeSGD": (zoopt.ZOConservativeSGD, {}),
    "FZOO": (zoopt.FZOO, {}),
    "HiZOO": (zoopt.HiZOO, {}),
    "ConMeZO": (zoopt.ConMeZO, {}),
    "EvolutionStrategy": (zoopt.EvolutionStrategy, {"population_size": 8}),
    "EvolutionStrategy, rank 1": (zoopt.EvolutionStrategy, {"population_size": 8, "rank": 1}),
    "LOZO": (zoopt.LOZO, {}),
    "LOZO, momentum": (zoopt.LOZO, {"momentum": 0.9}),
    "SubZero": (zoopt.SubZero, {}),
    "ZOMuon": (zoopt.ZOMuon, {}),
}
FIRST_ORDER: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (zoopt.AdamW, {}),
    "AdamW, bfloat16 state": (zoopt.AdamW, {"state_dtype": "bfloat16"}),
    "AdamW, int8 state": (zoopt.AdamW, {"state_dtype": "int8"}),
    "AdamW, int4 state": (zoopt.AdamW, {"state_dtype": "int4"}),
    "SM3": (zoopt.SM3, {}),
    "GaLoreAdamW": (zoopt.GaLoreAdamW, {"rank": 8}),
    "Apollo": (zoopt.Apollo, {"rank": 8}),
    "Fira": (zoopt.Fira, {"rank": 8}),
}
#: How many tensors steps in place have.
TENSORS = (150, 300, 1000)


class Loop:
    """A method, and its steps with evaluations that compute what `forward` does.

    Attributes:
        inside: seconds of each evaluation.
        evaluations: how many a step makes.
    """

    def __init__(
        self, name: str, params: Sequence[torch.Tensor], mode: str, forward: Callable[[], Any]
    ) -> None:
        cls, options = METHODS[name]
        self._forward, self.inside = forward, list[float]()
        # No kernel runs, so that losses are made up: different ones, after two that are compared.
        self._losses = itertools.chain([1.0, 1.0], itertools.count(1.0, 1e-3))
        self._optimizer = cls(params, 1e-6, perturbation=mode, seed=1, **options)
        self.evaluations = 0

    @torch.no_grad()
    def evaluate(self) -> float:
        """A forward pass."""
        start = time.thread_time()
        self._forward()
        self.inside.append(time.thread_time() - start)
        return next(self._losses)

    def step(self) -> None:
        """One step."""
        before = len(self.inside)
        self._optimizer.step(self.evaluate)
        self.evaluations = len(self.inside) - before


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The least time of a call."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


def calls(function: Callable[[], Any]) -> int:
    """How many functions a call calls, of Python and of C; those that `map` calls not counted."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """A GPU where launches take no time."""
    with (
        stub_gpu("sm_90"),
        mock.patch.object(JITFunction, "run", return_value=None),
        # No kernel writes its outputs, and what happens to be in memory may be a negative norm.
        mock.patch.object(torch, "empty", torch.zeros),
    ):
        yield


@contextlib.contextmanager
def begun(name: str, layers: int, bias: bool) -> Iterator[Loop]:
    """A virtual method that knows the order of reads, on a GPU where launches take no time."""
    net = nn.Sequential(*[nn.Linear(16, 16, bias=bias) for _ in range(layers)])
    x = torch.zeros(2, 16)
    loop = Loop(name, list(net.parameters()), "virtual", lambda: net(x))
    with no_launches():
        for _ in range(3):
            loop.step()
        yield loop


@contextlib.contextmanager
def begun_in_place(name: str, tensors: int) -> Iterator[Loop]:
    """A method in place that has taken a few steps, whose evaluations take no time."""
    sizes = [(16, 16) if i % 2 else (16,) for i in range(tensors)]
    params = [nn.Parameter(torch.zeros(size)) for size in sizes]
    loop = Loop(name, params, "inplace", lambda: None)
    with no_launches():
        for _ in range(3):
            loop.step()
        yield loop


def llama(layers: int = 32) -> list[torch.Tensor]:
    """Small parameters of as many shapes, and as many of each, as LLaMA has, with gradients."""
    width, wide = 64, 172
    block = [*[(width, width)] * 4, *[(wide, width)] * 2, (width, wide), *[(width,)] * 2]
    shapes = [(128, width), *block * layers, (width,), (128, width)]
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


@contextlib.contextmanager
def begun_first_order(name: str, layers: int = 32) -> Iterator[Callable[[], Any]]:
    """The step of a first-order method that has taken a few."""
    cls, options = FIRST_ORDER[name]
    optimizer = cls(llama(layers), lr=1e-3, seed=1, **options)
    with stub_gpu("sm_90"), mock.patch.object(JITFunction, "run", return_value=None):
        for _ in range(3):
            optimizer.step()
        yield optimizer.step


def virtual(name: str, layers: int, repeats: int, bias: bool) -> common.Row:
    """The row of a virtual method."""
    with begun(name, layers, bias) as loop:
        forward, made = seconds(loop.evaluate, repeats), calls(loop.evaluate)
        loop.inside.clear()
        step = seconds(loop.step, repeats)
        inside = min(loop.inside)
        all_calls = calls(loop.step)
    operators = loop.evaluations * layers
    return common.measured(
        f"{name}, biases" if bias else name,
        [(step - loop.evaluations * forward) / operators * 1e6],
        UNIT,
        kind="virtual",
        inside=(inside - forward) / layers * 1e6,
        calls=(all_calls - loop.evaluations * made) / operators,
    )


def in_place(name: str, tensors: int, repeats: int) -> common.Row:
    """The row of a method in place."""
    with begun_in_place(name, tensors) as loop:
        step, made = seconds(loop.step, repeats), calls(loop.step)
    return common.measured(
        name, [step * 1e6], "us/step", kind="in place", tensors=tensors, calls=made / tensors
    )


def first_order(name: str, repeats: int) -> common.Row:
    """The row of a first-order method."""
    with begun_first_order(name) as step:
        taken, made = seconds(step, repeats), calls(step)
    count = len(llama())
    return common.measured(
        name, [taken * 1e6], "us/step", kind="first-order", tensors=count, calls=made / count
    )


def torchs(option: str, repeats: int) -> common.Row:
    """The row of torch.optim.AdamW's Python: its kernels for several tensors do nothing."""
    params = llama()
    optimizer = torch.optim.AdamW(params, lr=1e-3, **{option: True})
    optimizer.step()
    names = [name for name in dir(torch) if name.startswith(("_foreach_", "_fused_adam"))]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch, name, lambda first, *_, **__: first))
        optimizer.step()
        taken, made = seconds(optimizer.step, repeats), calls(optimizer.step)
    return common.measured(
        f"torch.optim.AdamW({option}=True), without its kernels",
        [taken * 1e6],
        "us/step",
        kind="first-order",
        tensors=len(params),
        calls=made / len(params),
    )


def measure(layers: int, repeats: int) -> Iterator[common.Row]:
    """All rows."""
    for bias in (False, True):
        for name in METHODS:
            common.progress(name)
            yield virtual(name, layers, repeats, bias)
    for name, (cls, _) in METHODS.items():
        if "perturbation" in inspect.signature(cls).parameters:
            for tensors in TENSORS:
                common.progress(name)
                yield in_place(name, tensors, repeats)
    for name in FIRST_ORDER:
        common.progress(name)
        yield first_order(name, repeats)
    for option in ("foreach", "fused"):
        yield torchs(option, repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = common.parser(
        str(__doc__), "python -m bench.overhead --json bench/results/overhead.json"
    )
    parser.add_argument("--layers", type=common.positive, default=200, help="linear layers")
    parser.add_argument("--repeats", type=common.positive, default=15, help="steps of each")
    common.add_json_argument(parser)
    parser.set_defaults(plot=None)
    options: argparse.Namespace = common.parse(parser, argv)
    torch.set_num_threads(1)
    rows = list(measure(options.layers, options.repeats))
    common.say(common.table(COLUMNS, rows), options.json)
    document = common.document("overhead", options, torch.device("cpu"), rows, ratio_to=None)
    common.write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
