"""Measures what share of a full backward pass GreenTrainer's takes, beside the planned share.

Two models: a chain of linear layers, whose products are nearly all of its work, and a transformer,
with attention, norms and activations. A backward pass over the chosen tensors and a full one make a
pair, in either order. The share is the median over pairs of the ratio of their times, in one thread
and in that thread's time on the processor: neighbours slow both of a pair, and what the thread
waits for them does not count.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import zoopt
from zoopt.bench import common
from zoopt.cli.terminal import add_json_argument

BUDGETS = (0.3, 0.5, 0.7)


class Block(nn.Module):
    """A transformer's layer: attention and an MLP, each beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, width) -> (b, t, width)."""
        b, t, width = x.shape
        y = self.norm(x)
        heads = [own(y).view(b, t, self.heads, -1).transpose(1, 2) for own in (self.q, self.k)]
        values = self.v(y).view(b, t, self.heads, -1).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(*heads, values, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, t, width))
        out: Tensor = x + self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return out


def chain(width: int = 768, layers: int = 8, rows: int = 256) -> tuple[nn.Module, Tensor]:
    """Linear layers with a nonlinearity between them, and their input."""
    torch.manual_seed(0)
    pairs = [(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*itertools.chain(*pairs)), torch.randn(rows, width)


def transformer(width: int = 384, layers: int = 6) -> tuple[nn.Module, Tensor]:
    """Layers of attention and MLP, and their input: 4 x 128 tokens."""
    torch.manual_seed(0)
    blocks = [Block(width, heads=6) for _ in range(layers)]
    return nn.Sequential(*blocks), torch.randn(4, 128, width)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "chain": chain,
    "transformer": transformer,
}


def seconds(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """This thread's time on the processor in a backward pass."""
    model.zero_grad()
    value = loss()
    start = time.thread_time()
    value.backward()  # type: ignore[no-untyped-call]
    return time.thread_time() - start


def measure(model: nn.Module, x: Tensor, budget: float, repeats: int) -> common.Row:
    """The row of the measured shares under a budget, with the planned one."""

    def loss() -> Tensor:
        value: Tensor = (model(x) - x).square().mean()
        return value

    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-3)
    with zoopt.GreenTrainer(model, optimizer, loss, budget=budget) as trainer:
        planned, chosen = trainer.planned_share, set(map(id, trainer.chosen))
    pairs = []
    for number in range(repeats + 1):
        pair = {}
        for whole in (number % 2 == 0, number % 2 == 1):
            for param in model.parameters():
                param.requires_grad_(whole or id(param) in chosen)
            pair[whole] = seconds(model, loss)
        if number:  # The first pair warms up.
            pairs.append(pair)
    model.requires_grad_(True)
    return common.measured(
        f"budget {budget:.0%}",
        [pair[False] / pair[True] for pair in pairs],
        "of a whole pass",
        budget=budget,
        planned=planned,
        seconds=statistics.median(pair[False] for pair in pairs),
        seconds_full=statistics.median(pair[True] for pair in pairs),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both models under budgets of 30, 50 and 70 %, and print the shares."""
    parser = common.parser(
        str(__doc__), "python -m bench.green_trainer --json bench/results/green_trainer_cpu.json"
    )
    parser.add_argument("--repeats", type=common.positive, default=40, help="pairs of passes")
    add_json_argument(parser)
    options = parser.parse_args(argv)
    options.command = common.command(parser, argv)
    common.check_json(parser, options.json)
    torch.set_num_threads(1)
    rows = []
    for name, build in MODELS.items():
        model, x = build()
        for budget in BUDGETS:
            row = measure(model, x, budget, options.repeats)
            row["name"] = f"{name}, {row['name']}"
            rows.append({**row, "model": name})
            common.say(
                f"{row['name']}: planned {row['planned']:.1%}, measured {row['median']:.1%} of "
                f"{1e3 * row['seconds_full']:.1f} ms ({row['median'] / row['planned'] - 1:+.1%})",
                options.json,
            )
    if options.json is not None:
        content = common.document("green_trainer", options, torch.device("cpu"), rows)
        common.write_json(options.json, content)


if __name__ == "__main__":
    main()
