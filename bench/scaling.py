"""The cost of a zeroth-order step's exchange: measured on a few ranks, and modelled for more.

    python -m bench.scaling [--ranks 1 2 4] [--rounds 5] [--steps 8]

Measured, with processes on this machine over gloo, each with a batch of its own. Rounds alternate,
in the same processes, between

    alone     the first process takes steps, and the others sleep
    beside    all take steps at the same time, and exchange nothing: what the machine itself allows,
              whose cores share caches, memory and clock
    together  all take the steps together: what the exchange adds, its latency and the wait for the
              slowest rank

The ratios are taken within each round, so that a machine that becomes slower or faster meanwhile
changes neither; their median and least are printed. Modelled from the exchange's size, under the
assumptions that are printed: 8 to 10,000 ranks, with a ring or a tree, and with stragglers.

    ring      2 (n - 1) successive messages an exchange, each with one n-th of the vector
    tree      2 ceil(log2 n) successive messages an exchange, each with the whole vector
    straggler a step waits for the slowest of n ranks; if times are normal with relative standard
              deviation s, that is about s sqrt(2 ln n) beyond the mean
"""

from __future__ import annotations

import argparse
import datetime
import functools
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
from zoopt.distributed import seed
from zoopt.distributed.exchange import Exchange

RESULTS = Path(__file__).parent / "results" / "scaling.json"
#: Bytes of a vector in an exchange: a head of 6 numbers and the losses, padded to 16 float64.
PAYLOAD = 128
#: A step in place makes two: the ranks compare their position in the run before anything moves, and
#: then exchange losses. A virtual step makes only the second.
EXCHANGES = 2
MODELLED = (8, 64, 512, 1000, 4096, 10_000)
#: Which steps are compared: what the ranks cost in all, what the machine does, what we add.
RATIOS = (("together", "alone"), ("beside", "alone"), ("together", "beside"))
#: Relative standard deviation of a step's time between ranks.
STRAGGLER = 0.05
#: A network's latency for a message between machines, and its bandwidth in bytes a second.
NETWORK = {"latency": 20e-6, "bandwidth": 12.5e9}


def model_and_batch(width: int, batch: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)]
    return nn.Sequential(*layers, nn.Linear(width, 10)), torch.randn(batch, width)


def seconds(call: Callable[[], Any], count: int) -> list[float]:
    """The times of `count` calls, after one warm-up call."""
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def bind(rank: int, ranks: int) -> None:
    """Give a process a core of its own, if there is one for each.

    Otherwise a process that is woken by the other's message is often put on the other's core, and
    shares it for some milliseconds.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if ranks <= len(cores):
            os.sched_setaffinity(0, {cores[rank]})


def work(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """Measure on one rank of several."""
    torch.set_num_threads(1)
    bind(rank, ranks)
    store = dist.FileStore(f"{folder}/store", ranks)
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    model, x = model_and_batch(options.width, options.batch)
    labels = torch.zeros(len(x), dtype=torch.long)
    build = functools.partial(zoopt.MeZO, list(model.parameters()), lr=0.0, seed=0)
    shared = build(process_group=dist.group.WORLD)
    shared.check_every = 0
    with seed.alone():
        own = build()

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), labels)

    # Ranks compare weights at the first step only, as those of a rank that steps alone move.
    shared.step(loss)

    def step_alone() -> None:
        with seed.alone():
            own.step(loss)

    exchange = Exchange(dist.group.WORLD, "data")
    combine = functools.partial(exchange.combine, [1.0, 2.0], count=2)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds + 1):
        medians = {}
        for name, call in (
            ("alone", step_alone),
            ("beside", step_alone),
            ("together", functools.partial(shared.step, loss)),
            ("exchange", combine),
        ):
            dist.barrier()
            count = options.steps if name != "exchange" else 20 * options.steps
            times = seconds(call, count) if rank == 0 or name != "alone" else [math.nan]
            medians[name] = statistics.median(times)
            dist.barrier()  # Nobody else works while a process finishes its steps alone.
        if number:  # The first round warms up.
            rounds.append(medians)
    if rank == 0:
        Path(folder, "rounds.json").write_text(json.dumps(rounds), encoding="utf-8")
    dist.barrier()  # A rank that leaves while another still waits for it aborts that one.
    dist.destroy_process_group()


def measured(options: argparse.Namespace) -> list[dict[str, float]]:
    """Of each number of ranks: median seconds of a step, and the ratios of steps."""
    rows = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                work, (ranks, options, folder), nprocs=ranks, start_method="spawn"
            )
            rounds = json.loads(Path(folder, "rounds.json").read_text(encoding="utf-8"))
        rows.append({"ranks": ranks, "bytes": PAYLOAD, **summary(rounds)})
    return rows


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of what rounds have measured, and the median and the least of each ratio."""
    found = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    for name, base in RATIOS:
        ratios = [each[name] / each[base] for each in rounds]
        found[f"{name} / {base}"] = statistics.median(ratios)
        found[f"least {name} / {base}"] = min(ratios)
    return found


def modelled(step: float, payload: int = PAYLOAD) -> list[dict[str, float]]:
    """Seconds of a step on more ranks, each with the same batch size.

    Args:
        step: seconds of a step on one rank.
        payload: bytes of the vector.
    """
    rows = []
    for ranks in MODELLED:
        latency, per_byte = NETWORK["latency"], 1.0 / NETWORK["bandwidth"]
        rounds = EXCHANGES * 2 * math.ceil(math.log2(ranks))
        tree = rounds * (latency + payload * per_byte)
        ring = EXCHANGES * 2 * (ranks - 1) * (latency + payload / ranks * per_byte)
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
    parser.add_argument("--steps", type=int, default=8, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts")
    parser.add_argument("--width", type=int, default=1024, help="a step is then about 0.1 s long")
    parser.add_argument("--batch", type=int, default=192, help="of each rank")
    parser.add_argument("--modelled-step", type=float, default=0.1, help="seconds, on one rank")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows = measured(options)
    figures = {
        "measured": rows,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "options": {name: getattr(options, name) for name in ("width", "batch", "steps", "rounds")},
        "modelled_step": options.modelled_step,
        "assumptions": {
            "straggler": STRAGGLER,
            "payload": PAYLOAD,
            "exchanges": EXCHANGES,
            **NETWORK,
        },
        "modelled": modelled(options.modelled_step),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    chart(figures, options.output.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['ranks']} ranks: a step takes {row['alone'] * 1e3:.1f} ms alone, "
            f"{row['beside'] * 1e3:.1f} ms beside others, {row['together'] * 1e3:.1f} ms together; "
            f"the exchange {row['exchange'] * 1e6:.0f} us, {row['bytes']} bytes (load "
            f"{figures['load']:.1f})"
        )
        for name, base in RATIOS:
            ratio, least = row[f"{name} / {base}"], row[f"least {name} / {base}"]
            print(f"    {name:>8} / {base:<6}  {ratio:.3f} (least {least:.3f})")
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
