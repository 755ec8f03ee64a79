"""What recording costs, and how fast runs are replayed.

    python -m bench.trajectory --json bench/results/trajectory.json [--model DIRECTORY]

Record: the time spent in the recorder during a step of a model of 8 million parameters, over the
step's own; bytes a step; a file of 20,000 steps; and the rate at which base weights are hashed, on
one core. With --model, also during a step of the demo's model: all of it, and LoRA as in the demo.

Replay: milliseconds a step on the CPU, of the same file, on one thread but for the second way:

  passes       128 steps a pass over the weights, as `zoopt.replay` makes them
  all threads  the same on as many threads as the machine has
  closed       the closed form, one pass for the whole run (`exact=False`)
  noise        each step's direction (of signs: its bits) is made in the first-level cache, and
               nothing else is done: no replay can take less
  one by one   a pass over the weights a write, by the same kernels: three a step in place
  published    the passes of the authors' MeZO: torch's generator and an addition, four times a step

The last two do nothing but passes: nothing is evaluated. Ratios are medians of rounds in turn.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import zoopt
from bench import ROOT
from zoopt.bench import common
from zoopt.kernels.noise import cpu_group
from zoopt.kernels.runtime.intrinsics import jit, u32
from zoopt.trajectory.format import Event, Kind, encode, encode_header
from zoopt.trajectory.header import describe, fingerprint, names_of
from zoopt.trajectory.script import NotScriptedError

#: name -> (width, layers, dtype, options): stacks of linear layers.
RUNS: dict[str, tuple[int, int, torch.dtype, dict[str, Any]]] = {
    "0.2M in 100 tensors": (64, 50, torch.float32, {}),
    "1M": (512, 4, torch.float32, {}),
    "8M": (1024, 8, torch.float32, {}),
    "8M signs": (1024, 8, torch.float32, {"distribution": "rademacher"}),
    "8M bfloat16": (1024, 8, torch.bfloat16, {}),
    "8M window": (1024, 8, torch.float32, {"momentum": 0.9, "momentum_window": 10}),
}
ROUNDS = 3
#: Steps of each way in a round that is not timed.
WARM_UP = 2
#: Elements of a tile of the noise alone.
TILE = 4096


def stack(width: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """Linear layers with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(dtype)


def recorded(path: Path, net: nn.Module, steps: int, **options: Any) -> None:
    """The file of a run of so many steps, whose losses are random."""
    optimizer = zoopt.MeZO(net.named_parameters(), seed=1, lr=1e-6, **options)
    data = encode_header(describe(optimizer, names_of(optimizer, net)))
    chain, choose = int.from_bytes(data[-4:], "little"), random.Random(1)
    for step in range(steps):
        losses = (choose.random(), choose.random())
        # The first evaluation of a run is repeated.
        event = Event(Kind.STEP, losses[:1] * (step == 0) + losses)
        record, chain = encode(event, chain)
        data += record
    path.write_bytes(data)


def published(net: nn.Module, steps: int, lr: float = 1e-6, zo_eps: float = 1e-3) -> None:
    """The four passes of the authors' code, from a seed: three moves and the update."""
    for step in range(steps):
        for scale in (zo_eps, -2 * zo_eps, zo_eps, -lr):
            torch.manual_seed(step)
            for param in net.parameters():
                z = torch.normal(0.0, 1.0, param.shape, dtype=param.dtype)
                param.data = param.data + scale * z


def replayed(
    net: nn.Module, path: Path, steps: int, *, one_by_one: bool = False, exact: bool = True
) -> None:
    """Replay that many steps of the file, or the closed form of them."""
    module = sys.modules["zoopt.trajectory.replay"]
    own = {"side_effect": NotScriptedError} if one_by_one else {"wraps": module.Scripted}  # type: ignore[attr-defined]
    with mock.patch.object(module, "Scripted", **own):
        zoopt.replay(net, path, until=steps, exact=exact, check_base=False)


def replayed_by_all(net: nn.Module, path: Path, steps: int) -> None:
    """As `replayed`, on all threads."""
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        replayed(net, path, steps)
    finally:
        torch.set_num_threads(1)


@jit
def _noise(z, pairs, low, product, keys, draws, tiles, signs):  # type: ignore[no-untyped-def]
    """The directions of so many draws on so many tiles of 4096 elements; signs: their words."""
    for tile in range(tiles):
        first = tile * (1 if signs else 16) * cpu_group.BLOCKS
        cpu_group.tables(low, product, first, u32(3), u32(1), u32(2))
        for draw in range(draws):
            cpu_group.set_draw(keys, first, u32(draw), 0, u32(1), u32(2))
            cpu_group.make_words(pairs, low, product, keys)
            if not signs:
                cpu_group.make_normals(z, pairs)


def noise_alone(elements: int, steps: int, *, signs: bool) -> None:
    """Each step's direction for so many elements, made and not used."""
    blocks = cpu_group.BLOCKS if signs else TILE // 8
    keys = np.zeros(cpu_group.KEYS, np.uint64)
    low, product = np.zeros(blocks, np.uint64), np.zeros(blocks, np.uint64)
    cpu_group.set_seed(keys, u32(1), u32(2))
    z, pairs = np.zeros(TILE, np.float32), np.zeros(4 * blocks, np.uint32)
    _noise(z, pairs, low, product, keys, steps, -(-elements // TILE), signs)


#: way -> how many steps are timed, and the function that takes so many.
Ways = dict[str, tuple[int, Callable[[nn.Module, int], None]]]


def _ways(path: Path, steps: int, *, elements: int, signs: bool) -> Ways:
    """Slow ways take fewer steps."""
    few, fewest = max(2, steps // 10), max(2, steps // 40)
    return {
        "passes": (steps, lambda net, count: replayed(net, path, count)),
        "all_threads": (steps, lambda net, count: replayed_by_all(net, path, count)),
        "closed": (steps, lambda net, count: replayed(net, path, count, exact=False)),
        "noise": (few, lambda _, count: noise_alone(elements, count, signs=signs)),
        "one_by_one": (few, lambda net, count: replayed(net, path, count, one_by_one=True)),
        "published": (fewest, published),
    }


def replays(folder: Path, steps: int) -> list[dict[str, Any]]:
    """A row for each run of `RUNS`."""
    rows = []
    for name, (width, layers, dtype, options) in RUNS.items():
        net, path = stack(width, layers, dtype), folder / name.replace(" ", "-")
        recorded(path, net, steps, **options)
        elements, signs = sum(p.numel() for p in net.parameters()), "distribution" in options
        ways = _ways(path, steps, elements=elements, signs=signs)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(ROUNDS + 1):
            for way, (count, run) in ways.items():
                fresh = copy.deepcopy(net)
                start = time.perf_counter()
                run(fresh, count if turn else WARM_UP)
                if turn:  # The first round compiles.
                    times[way].append((time.perf_counter() - start) / count)
        rows.append(
            {
                "run": name,
                "parameters": elements,
                "ms_a_step": 1e3 * statistics.median(times["passes"]),
                **{f"ms_{way}": 1e3 * statistics.median(times[way]) for way in list(times)[1:]},
                "x_noise": common.ratio(times["passes"], times["noise"]),
                "x_one_by_one": common.ratio(times["one_by_one"], times["passes"]),
                "x_published": common.ratio(times["published"], times["passes"]),
            }
        )
        print(rows[-1], flush=True)
    return rows


def recording(folder: Path, steps: int) -> dict[str, Any]:
    """The cost of recording a step, in time and bytes."""
    net = stack(1024, 8, torch.float32)
    x = torch.randn(64, 1024)
    cost = recorder_cost(
        folder / "record", list(net.named_parameters()), lambda: net(x).square().mean(), steps
    )
    record, chain = 0, 7
    for _ in range(20_000):
        data, chain = encode(Event(Kind.STEP, (0.5, 0.25)), chain)
        record += len(data)
    return {**cost, "bytes_of_20000_steps": cost["header"] + record + 4}


def recording_demo(folder: Path, model: str, steps: int) -> dict[str, Any]:
    """The cost of recording a step of the demo's model, all of it and with LoRA."""
    sys.path.insert(1, str(ROOT / "examples"))
    from sentiment.model import load_classifier
    from sentiment.options import build_parser

    options = build_parser().parse_args([])
    costs = {}
    for name, rank in (("all", 0), ("LoRA", options.lora or 8)):
        classifier = load_classifier(model, "bfloat16", rank, options.prompt, options.verbalizers)
        net, ids = classifier.model, torch.randint(1000, (32, 16))
        costs[name] = recorder_cost(
            folder / name,
            classifier.trainable(),
            lambda net=net, ids=ids: net(input_ids=ids, labels=ids).loss,
            steps,
        )
        print(name, costs[name], flush=True)
    return costs


def recorder_cost(
    path: Path, params: list[Any], closure: Callable[[], Any], steps: int
) -> dict[str, Any]:
    """What recording costs MeZO in time and bytes a step, and the header's bytes."""
    optimizer = zoopt.MeZO(params, seed=1)
    recorder: Any = optimizer.record(path)
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent += time.perf_counter() - start
            return result

        return wrapped

    for name in ("before", "stepped", "listen"):
        setattr(recorder, name, timed(getattr(recorder, name)))
    optimizer.step(closure)
    size, spent, start = path.stat().st_size, 0.0, time.perf_counter()
    for _ in range(steps):
        optimizer.step(closure)
    whole = time.perf_counter() - start
    grown = path.stat().st_size - size
    recorder.close()
    return {
        "parameters": sum(p.numel() for _, p in params),
        "step_ms": 1e3 * whole / steps,
        "recorder_ms": 1e3 * spent / steps,
        "share": spent / whole,
        "bytes_a_step": grown / steps,
        "header": size - 19,  # the first step has three losses
    }


def hashing(megabytes: int = 256) -> dict[str, float]:
    """GB/s of the base's hash, on one core."""
    weights = torch.randn(megabytes << 18)
    rates = []
    for _ in range(ROUNDS):
        start = time.process_time()
        fingerprint([weights])
        rates.append(weights.nbytes / (time.process_time() - start) / 1e9)
    return {"hash_gb_s": max(rates)}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return 1 if recording exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps of a replay")
    parser.add_argument("--recorded", type=int, default=200, help="steps that are recorded")
    parser.add_argument("--model", help="the demo's model, to record steps of it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        cost = {**recording(Path(name), options.recorded), **hashing()}
        print(cost, flush=True)
        if options.model:
            few = max(2, options.recorded // 50)
            cost["demo"] = recording_demo(Path(name), options.model, few)
        rows = replays(Path(name), options.steps)
    machine = {
        "threads": os.cpu_count(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "replay_steps": options.steps,
        "replay_rounds": ROUNDS,
    }
    common.write_json(options.json, {"machine": machine, "recording": cost, "replay": rows})
    shares = [cost["share"], *(own["share"] for own in cost.get("demo", {}).values())]
    bars = (max(shares) <= 0.01, cost["bytes_a_step"] <= 20, cost["bytes_of_20000_steps"] <= 4e5)
    return int(not all((*bars, cost["hash_gb_s"] > 1.0)))


if __name__ == "__main__":
    sys.exit(main())
