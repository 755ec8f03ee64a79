"""Python time of a virtual step for each operator, beyond that of two forward passes.

The model is many linear layers, whose products take no time to speak of: without biases, as LLaMA
has them, and with, so that an operator reads two parameters. Kernels are asked for as on a GPU, but
not launched (see `stub_gpu`), so what is left is the time of Python on this machine: processor time
of the only thread, the least of several steps.
"""

from __future__ import annotations

import argparse
import contextlib
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
    "median": UNIT,
    "inside": "inside evaluations",
    "calls": "calls/operator",
}
#: What is stepped virtually, and how many evaluations its step makes.
METHODS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "MeZO": (zoopt.MeZO, {}, 2),
    "MeZO, momentum": (zoopt.MeZO, {"momentum": 0.9}, 2),
    "MeZO, magnitude mask": (zoopt.MeZO, {"mask": "magnitude", "density": 0.5}, 2),
    "HiZOO": (zoopt.HiZOO, {}, 3),
    "ConMeZO": (zoopt.ConMeZO, {}, 2),
}


class Loop:
    """A model, a method, and its steps.

    Attributes:
        inside: seconds of each evaluation.
    """

    def __init__(self, name: str, layers: int, bias: bool) -> None:
        cls, options, self.evaluations = METHODS[name]
        self._net = nn.Sequential(*[nn.Linear(16, 16, bias=bias) for _ in range(layers)])
        self._x, self.inside = torch.zeros(2, 16), list[float]()
        # No kernel runs, so that losses are made up: different ones, after two that are compared.
        self._losses = itertools.chain([1.0, 1.0], itertools.count(1.0, 1e-3))
        self._optimizer = cls(
            self._net.parameters(), 1e-6, perturbation="virtual", seed=1, **options
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """A forward pass."""
        start = time.thread_time()
        self._net(self._x)
        self.inside.append(time.thread_time() - start)
        return next(self._losses)

    def step(self) -> None:
        """One step."""
        self._optimizer.step(self.evaluate)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The least time of a call."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


def calls(function: Callable[[], Any]) -> int:
    """How many functions a call calls, of Python and of C."""
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
def begun(name: str, layers: int, bias: bool) -> Iterator[Loop]:
    """A method that knows the order of reads, on a GPU where launches take no time."""
    loop = Loop(name, layers, bias)
    with (
        stub_gpu("sm_90"),
        mock.patch.object(JITFunction, "run", return_value=None),
        # No kernel writes its outputs, and what happens to be in memory may be a negative norm.
        mock.patch.object(torch, "empty", torch.zeros),
    ):
        for _ in range(3):
            loop.step()
        yield loop


def measure(name: str, layers: int, repeats: int, bias: bool) -> common.Row:
    """A row of one method."""
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
        inside=(inside - forward) / layers * 1e6,
        calls=(all_calls - loop.evaluations * made) / operators,
    )


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
    rows = [
        measure(name, options.layers, options.repeats, bias)
        for bias in (False, True)
        for name in METHODS
    ]
    common.say(common.table(COLUMNS, rows), options.json)
    document = common.document("overhead", options, torch.device("cpu"), rows, ratio_to=None)
    common.write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
