"""Measures what share of a full backward pass GreenTrainer's takes, beside the planned share.

    python -m bench.green_trainer [--width 768] [--layers 8] [--json FILE]

on a chain of linear layers, which are nearly all of its work. Passes over the chosen tensors and
full ones alternate, and the least time of each counts.
"""

from __future__ import annotations

import itertools
import time

import torch
from torch import nn

import zoopt
from zoopt.bench import common
from zoopt.cli.terminal import add_json_argument


def chain(width: int, layers: int) -> nn.Sequential:
    """Linear layers with a nonlinearity between them."""
    torch.manual_seed(0)
    pairs = [(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*itertools.chain(*pairs))


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    """The time of a backward pass."""
    model.zero_grad()
    loss = (model(x) - x).square().mean()
    start = time.perf_counter()
    loss.backward()
    return time.perf_counter() - start


def measure(budget: float, width: int, layers: int, repeats: int) -> dict[str, float]:
    """The planned and the measured share under a budget."""
    model, x = chain(width, layers), torch.randn(256, width)
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-3)
    trainer = zoopt.GreenTrainer(
        *(model, optimizer, lambda: (model(x) - x).square().mean()), budget=budget
    )
    chosen = trainer.chosen
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * repeats):
        whole = number % 2 == 1
        for param in model.parameters():
            param.requires_grad_(whole or any(param is own for own in chosen))
        times[whole].append(seconds(model, x))
    return {
        "budget": budget,
        "planned": trainer.planned_share,
        "measured": min(times[False]) / min(times[True]),
        "seconds": min(times[False]),
        "seconds_full": min(times[True]),
    }


def main() -> None:
    """Measure budgets of 30, 50 and 70 %, and print them."""
    parser = common.parser(str(__doc__), "python -m bench.green_trainer --repeats 60")
    parser.add_argument("--width", type=common.positive, default=768)
    parser.add_argument("--layers", type=common.positive, default=8)
    parser.add_argument("--repeats", type=common.positive, default=30)
    add_json_argument(parser)
    options = parser.parse_args()
    options.command = common.command(parser, None)
    common.check_json(parser, options.json)
    rows = []
    for budget in (0.3, 0.5, 0.7):
        numbers = measure(budget, options.width, options.layers, options.repeats)
        share = numbers.pop("measured")
        rows.append(common.measured(f"budget {budget:.0%}", [share], "of a whole pass", **numbers))
        common.say(
            f"budget {budget:.0%}: planned {numbers['planned']:.1%}, measured {share:.1%} of "
            f"{1e3 * numbers['seconds_full']:.1f} ms",
            options.json,
        )
    if options.json is not None:
        content = common.document("green_trainer", options, torch.device("cpu"), rows)
        common.write_json(options.json, content)


if __name__ == "__main__":
    main()
