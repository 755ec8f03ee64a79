"""Measures what share of a full backward pass GreenTrainer's takes, beside the planned share.

    python -m bench.green_trainer [--width 768] [--layers 8] [--json FILE]

on a chain of linear layers, which are nearly all of its work. Passes over the chosen tensors and
full ones alternate, and the least time of each counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoopt
from zoopt.bench import common


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
    """Measure budgets of 30 and 50 %, and print them."""
    parser = argparse.ArgumentParser(prog="python -m bench.green_trainer", description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for budget in (0.3, 0.5, 0.7):
        rows.append(measure(budget, options.width, options.layers, options.repeats))
        numbers = rows[-1]
        print(
            f"budget {budget:.0%}: planned {numbers['planned']:.1%}, measured "
            f"{numbers['measured']:.1%} of {1e3 * numbers['seconds_full']:.1f} ms"
        )
    if options.json is not None:
        sizes = {"width": options.width, "layers": options.layers}
        result = {**sizes, "rows": rows, "machine": common.machine(torch.device("cpu"))}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
