"""The cost of a zeroth-order step's exchange: measured on a few ranks, and modelled for more.

    python -m bench.scaling [--ranks 1 2 4] [--steps 200]

Measured, with processes on this machine over gloo: a step's time with half the batch on one rank
and on two, and the latency of the exchange alone. Modelled from these, under the assumptions that
are printed: 8 to 10,000 ranks, with a ring or a tree, and with stragglers.

    ring      2 (n - 1) successive messages, each with one n-th of the vector
    tree      2 ceil(log2 n) successive messages, each with the whole vector
    straggler a step waits for the slowest of n ranks; if times are normal with relative standard
              deviation s, that is about s sqrt(2 ln n) beyond the mean
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import zoopt
from zoopt.distributed.exchange import Exchange

RESULTS = Path(__file__).parent / "results" / "scaling.json"
#: Bytes of a vector in an exchange: a head of 6 numbers and the losses, padded to 16 float64.
PAYLOAD = 128
MODELLED = (8, 64, 512, 1000, 4096, 10_000)
#: Relative standard deviation of a step's time between ranks.
STRAGGLER = 0.05
#: A network's latency for a message between machines, and its bandwidth in bytes a second.
NETWORK = {"latency": 20e-6, "bandwidth": 12.5e9}


def model_and_batch(width: int, batch: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)]
    return nn.Sequential(*layers, nn.Linear(width, 10)), torch.randn(batch, width)


def seconds(call: Callable[[], Any], count: int) -> list[float]:
    """The times of `count` calls, after some warm-up calls."""
    times = []
    for i in range(count + 5):
        start = time.perf_counter()
        call()
        if i >= 5:
            times.append(time.perf_counter() - start)
    return times


def work(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """Measure on one rank of several."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    model, x = model_and_batch(options.width, options.batch)
    group = dist.group.WORLD if ranks > 1 else None
    optimizer = zoopt.MeZO(model.parameters(), lr=0.0, seed=0, process_group=group)
    optimizer.check_every = 0
    labels = torch.zeros(len(x), dtype=torch.long)

    def step() -> None:
        optimizer.step(lambda: F.cross_entropy(model(x), labels))

    times = {"step": seconds(step, options.steps)}
    exchange = Exchange(dist.group.WORLD, "data")
    dist.barrier()
    times["exchange"] = seconds(lambda: exchange.combine([1.0, 2.0], count=2), options.steps)
    if rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        Path(folder, f"{ranks}.json").write_text(json.dumps(medians), encoding="utf-8")
    dist.barrier()  # A rank that leaves while another still waits for it aborts that one.
    dist.destroy_process_group()


def measured(options: argparse.Namespace) -> list[dict[str, float]]:
    """Median seconds of a step and of its exchange, for each number of ranks with equal batches."""
    rows = []
    for _ in range(options.rounds):
        for ranks in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.start_processes(
                    work, (ranks, options, folder), nprocs=ranks, start_method="spawn"
                )
                row = json.loads(Path(folder, f"{ranks}.json").read_text(encoding="utf-8"))
            rows.append({"ranks": ranks, **row})
    return [
        {
            "ranks": ranks,
            "bytes": PAYLOAD if ranks > 1 else 0,
            **{
                name: min(row[name] for row in rows if row["ranks"] == ranks)
                for name in ("step", "exchange")
            },
        }
        for ranks in options.ranks
    ]


def modelled(step: float, payload: int = PAYLOAD) -> list[dict[str, float]]:
    """Seconds of a step on more ranks, each with the same batch size.

    Args:
        step: seconds of a step on one rank.
        payload: bytes of the vector.
    """
    rows = []
    for ranks in MODELLED:
        latency, per_byte = NETWORK["latency"], 1.0 / NETWORK["bandwidth"]
        rounds = 2 * math.ceil(math.log2(ranks))
        tree = rounds * (latency + payload * per_byte)
        ring = 2 * (ranks - 1) * (latency + payload / ranks * per_byte)
        wait = step * STRAGGLER * math.sqrt(2.0 * math.log(ranks))
        rows.append(
            {
                "ranks": ranks,
                "tree": tree,
                "ring": ring,
                "straggler": wait,
                "efficiency": step / (step + min(tree, ring) + wait),
            }
        )
    return rows


def chart(figures: dict[str, Any], path: Path) -> None:
    """Draw the parts of a step's time by the number of ranks."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    rows = figures["modelled"]
    for name in ("ring", "tree", "straggler"):
        axes.loglog([row["ranks"] for row in rows], [row[name] for row in rows], label=name)
    axes.axhline(figures["modelled_step"], color="gray", ls=":", label="a step's own")
    axes.set(xlabel="ranks", ylabel="seconds")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128, help="of each rank")
    parser.add_argument("--modelled-step", type=float, default=0.1, help="seconds, on one rank")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows = measured(options)
    figures = {
        "measured": rows,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "options": {"width": options.width, "batch": options.batch, "steps": options.steps},
        "modelled_step": options.modelled_step,
        "assumptions": {"straggler": STRAGGLER, "payload": PAYLOAD, **NETWORK},
        "modelled": modelled(options.modelled_step),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    chart(figures, options.output.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['ranks']} ranks: step {row['step'] * 1e3:.2f} ms, exchange "
            f"{row['exchange'] * 1e6:.0f} us, {row['bytes']} bytes (load {figures['load']:.1f})"
        )
    print(f"modelled, of a step of {options.modelled_step} s: {figures['assumptions']}")
    for row in figures["modelled"]:
        print(
            f"{row['ranks']:>6} ranks: tree {row['tree'] * 1e3:.2f} ms, ring "
            f"{row['ring'] * 1e3:.1f} ms, stragglers {row['straggler'] * 1e3:.1f} ms, "
            f"efficiency {row['efficiency']:.2f}"
        )
    return figures


if __name__ == "__main__":
    main()
