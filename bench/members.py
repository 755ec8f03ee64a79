"""Throughput of a population evaluated in one forward pass, against plain inference.

A batch holds one example (or several, --examples) for each member of an EvolutionStrategy with
low-rank directions; the fitness is the negative loss of the member's examples. The model has random
weights and is never downloaded. Methods:

  plain      one forward pass of the unperturbed model on the whole batch: pure inference
  batched    zoopt.EvolutionStrategy.evaluate_batched: the same, each example by its own member
  separate   zoopt.EvolutionStrategy.evaluate: a forward pass a member, on that member's examples

All are timed in turn, round by round; a ratio is the median of the rounds' own. What is timed is
the whole of the call: making the directions, the forward pass and the fitnesses. The check of the
batch's layout, which happens once, falls into the round that warms up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import zoopt
from zoopt.bench import charts, common
from zoopt.bench.models import add_argument, build, spec

METHODS = ("plain", "batched", "separate")

COLUMNS = {
    "name": "method",
    "median": "seconds",
    "spread": "+-",
    "examples_per_second": "examples/s",
    "throughput_to_plain": "throughput / plain",
    "times_as_fast_as_separate": "x separate",
}


class Bench:
    """A model, a batch, and the methods on them."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device, self.members, self.examples = device, options.members, options.examples
        torch.manual_seed(0)
        self.model: Any = build(spec(options.model), common.DTYPES[options.dtype], device)
        size = (self.members * self.examples, options.seq)
        self.ids = torch.randint(self.model.config.vocab_size, size, device=device)
        self.optimizer = zoopt.EvolutionStrategy(
            self.model.named_parameters(), population_size=self.members, rank=options.rank, seed=0
        )

    def fitness(self, ids: Tensor) -> Tensor:
        """The negative loss of each member's examples."""
        logits = self.model(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        return -losses.view(len(ids) // self.examples, -1).mean(1)

    @torch.no_grad()
    def plain(self) -> list[float]:
        values: list[float] = self.fitness(self.ids).tolist()
        return values

    def batched(self) -> list[float]:
        values = self.optimizer.evaluate_batched(
            lambda: self.fitness(self.ids), examples=self.examples
        )
        return list(values.values())

    def separate(self) -> list[float]:
        values: dict[int, float] = {}
        for i, ids in enumerate(self.ids.split(self.examples)):
            values |= self.optimizer.evaluate(lambda ids=ids: self.fitness(ids), members=[i])  # type: ignore[misc]
        return list(values.values())

    def method(self, name: str) -> Callable[[], Any]:
        function: Callable[[], Any] = getattr(self, name)
        return function


def measure(options: argparse.Namespace, bench: Bench) -> list[common.Row]:
    """A row for each method."""
    names = [name for name in METHODS if name == "plain" or name in options.methods]
    times = common.round_robin(
        {name: bench.method(name) for name in names},
        bench.device,
        options.repeats,
        options.model,
    )
    count = bench.members * bench.examples
    return [
        common.measured(
            name,
            times[name],
            "s",
            ratio=common.ratio(times[name], times["plain"]),
            examples_per_second=count / statistics.median(times[name]),
            throughput_to_plain=common.ratio(times["plain"], times[name]),
            times_as_fast_as_separate=common.ratio(times["separate"], times[name])
            if "separate" in times
            else None,
            rounds=times[name],
        )
        for name in names
    ]


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    parser = common.parser(
        str(__doc__), "python -m bench.members --model gpt2 --members 16 --seq 64 --json FILE"
    )
    add_argument(parser, "gpt2")
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="float32", help="weights")
    parser.add_argument("--members", type=even, default=16, help="population, an even number")
    parser.add_argument("--examples", type=common.positive, default=1, help="sequences a member")
    parser.add_argument("--seq", type=common.positive, default=64, help="tokens a sequence")
    parser.add_argument("--rank", type=common.positive, default=1, help="rank of the directions")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        choices=METHODS,
        default=list(METHODS),
        help=f"which to measure, of {', '.join(METHODS)}; plain always is",
    )
    common.add_common_arguments(parser, repeats=7)
    options = common.parse(parser, argv)
    return options, common.open_device(parser, options)


def even(text: str) -> int:
    """A positive even integer."""
    value = common.positive(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"expected an even number, for pairs, got {text!r}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options, device = parse(argv)
    common.progress(f"building {options.model}")
    bench = Bench(options, device)
    rows = measure(options, bench)
    parameters = sum(p.numel() for p in bench.model.parameters())
    what = (
        f"{options.model}, {options.dtype}, rank {options.rank}, "
        f"{options.members} members of {options.examples} x {options.seq} tokens"
    )
    common.say(f"{what}: {parameters:,} parameters\n\n{common.table(COLUMNS, rows)}", options.json)
    ratio_to = "plain inference"
    content = common.document(
        *("members", options, device, rows), ratio_to=ratio_to, parameters=parameters
    )
    common.write_json(options.json, content)
    if options.plot:
        ours = frozenset(METHODS) - {"plain"}
        panel = charts.Panel("seconds a population", rows, 1.0, ours, "plain")
        charts.draw(options.plot, content, f"A population: {what}", [panel])
        common.say(f"written: {options.plot}", options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
