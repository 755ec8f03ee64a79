"""What 16-bit weights lose by probing in place, and by rounding updates to nearest.

Drift: steps at learning rate 0 should change nothing. A probe in place adds zo_eps z, subtracts
2 zo_eps z and adds zo_eps z again, and each pass rounds. The figure is the root mean square change
of the weights, relative to the root mean square of the weights.

Arrival: under a constant gradient each step of AdamW should move every weight by lr. The figure is
the average movement of the weights, as a share of the sum of these steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoopt
from zoopt.bench import common
from zoopt.bench.published_mezo import PublishedMeZO

#: Standard deviation of the weights, typical of a trained language model's matrices.
DEVIATION = 0.02
SEED = 0

Builder = Callable[[nn.Parameter], torch.optim.Optimizer]
DRIFT: dict[str, tuple[torch.dtype, Callable[[nn.Parameter], Any]]] = {
    "bfloat16, published code": (
        torch.bfloat16,
        lambda w: PublishedMeZO([w], lr=0.0, zo_eps=1e-3, seed=SEED),
    ),
    "bfloat16, in place": (
        torch.bfloat16,
        lambda w: zoopt.MeZO([w], lr=0.0, perturbation="inplace", seed=SEED),
    ),
    "bfloat16, virtual (default)": (torch.bfloat16, lambda w: zoopt.MeZO([w], lr=0.0, seed=SEED)),
    "float32, in place (default)": (torch.float32, lambda w: zoopt.MeZO([w], lr=0.0, seed=SEED)),
}
ARRIVAL: dict[str, tuple[torch.dtype, Callable[[nn.Parameter, float], torch.optim.Optimizer]]] = {
    "bfloat16, torch.optim.AdamW": (
        torch.bfloat16,
        lambda w, lr: torch.optim.AdamW([w], lr=lr, weight_decay=0.0),
    ),
    "bfloat16, rounded to nearest": (
        torch.bfloat16,
        lambda w, lr: zoopt.AdamW([w], lr=lr, weight_decay=0.0, rounding="nearest", seed=SEED),
    ),
    "bfloat16, stochastic (default)": (
        torch.bfloat16,
        lambda w, lr: zoopt.AdamW([w], lr=lr, weight_decay=0.0, seed=SEED),
    ),
    "float32": (
        torch.float32,
        lambda w, lr: zoopt.AdamW([w], lr=lr, weight_decay=0.0, seed=SEED),
    ),
}


def weights(numel: int, dtype: torch.dtype) -> nn.Parameter:
    """The same values for each method, up to their dtype's rounding: (numel,)."""
    values = zoopt.noise.normal(numel, seed=SEED, stream=0, draw=0) * DEVIATION
    return nn.Parameter(values.to(dtype))


def drift(weight: nn.Parameter, optimizer: Any, steps: int) -> list[float]:
    """||w - w_0|| / ||w_0|| after each step along probes of a smooth loss."""
    start = weight.detach().clone().float()
    curve = []
    for _ in range(steps):
        optimizer.step(lambda: weight.float().square().mean())
        moved: Tensor = weight.detach().float() - start
        curve.append(float(moved.norm() / start.norm()))
    return curve


def arrival(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The average movement of the weights down a constant gradient, after each step."""
    start = weight.detach().clone().float()
    curve = []
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        curve.append(float((start - weight.detach().float()).mean()))
    return curve


def rows(options: argparse.Namespace) -> list[common.Row]:
    """A row for each method, with its curve."""
    found = []
    for name, (dtype, build) in DRIFT.items():
        common.progress(f"drift: {name}")
        weight = weights(options.numel, dtype)
        curve = drift(weight, build(weight), options.steps)
        found.append(common.counted(name, curve[-1], "change / norm, at lr 0", curve=curve))
    for name, (dtype, build_at) in ARRIVAL.items():
        common.progress(f"arrival: {name}")
        weight = weights(options.numel, dtype)
        curve = arrival(weight, build_at(weight, options.lr), options.steps)
        share = curve[-1] / (options.lr * options.steps)
        found.append(common.counted(name, share, "moved / lr steps", curve=curve))
    common.progress("")
    return found


def draw(path: Path, document: dict[str, Any]) -> None:
    """Both curves, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arguments = document["arguments"]
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        fig: Any
        fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
        for axes, unit in ((left, "change / norm, at lr 0"), (right, "moved / lr steps")):
            chosen = [row for row in document["rows"] if row["unit"] == unit]
            for number, row in enumerate(chosen):
                scale = 100.0 if axes is left else 1e3
                points = [scale * value for value in row["curve"]]
                axes.plot(
                    range(1, len(points) + 1), points, color=f"C{number}", label=row["name"],
                    linestyle=("-", "--", "-.", ":")[number], linewidth=2,
                )  # fmt: skip
            axes.set_xlabel("step")
            axes.legend(frameon=False)
        left.set_title("Probing in place, nothing learned", loc="left")
        left.set_ylabel("change of the weights, % of their norm")
        right.set_title(f"Steps of {arguments['lr']:g}", loc="left")
        right.set_ylabel("mean distance moved, thousandths")
        fig.savefig(path, dpi=130)
        plt.close(fig)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    arguments = common.parser(__doc__ or "", "python -m bench.precision --steps 200")
    common.add_common_arguments(arguments, 1)
    arguments.add_argument("--numel", type=common.positive, default=2**18, help="weights")
    arguments.add_argument("--steps", type=common.positive, default=200)
    arguments.add_argument("--lr", type=float, default=5e-6, help="of the steps that arrive")
    options = common.parse(arguments, argv)
    device = common.open_device(arguments, options)
    document = common.document("precision", options, device, rows(options))
    columns = {"name": "method", "median": "figure", "unit": "unit"}
    common.say(common.table(columns, document["rows"]), options.json)
    common.write_json(options.json, document)
    if options.plot is not None:
        draw(options.plot, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
