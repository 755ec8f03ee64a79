"""Time and memory of one training step, by method, against plain inference.

The model has random weights and is never downloaded. `inference` is two forward passes without
autograd, the least that any two-sided zeroth-order step must do. `MeZO, published` is the
algorithm as published, written plainly in torch. A method with a backward pass is measured twice,
plain and with activation checkpointing. Other packages' optimizers are measured if they are
installed (torchao, bitsandbytes, galore-torch, apollo-torch). A projected method's refresh, once in
200 steps, is not in its time.

All are timed in turn, round by round; a ratio is the median over the rounds. Memory is measured
separately from time: the peak of two steps (the first makes the state, the second has it from the
start), above the model itself. On the CPU that is the exact sum of the live tensors' storages, and
with --rss the resident set of a process for each method; on a GPU it is the allocator's figure. On
the CPU, functions that another package compiles are counted uncompiled, with temporaries that a
compiler would avoid.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import zoopt
from zoopt.bench import charts, common, methods, models
from zoopt.bench.methods import INFERENCE, PUBLISHED, Entry
from zoopt.cli.terminal import CommandError
from zoopt.memory import resident
from zoopt.memory.meter import LiveStorages
from zoopt.memory.methods import Method
from zoopt.memory.step import loss_of, tensors_of

DEFAULT = ("baselines", "mezo-in-place", "mezo-virtual", "galoreadamw")
MIB = 1 << 20
RATIO_TO = "inference (two forward passes)"

COLUMNS = {
    "name": "method",
    "median": "seconds",
    "spread": "+-",
    "ratio": "/ inference",
    "times_as_fast_as_published": "x published",
    "peak_mebibytes": "peak MiB",
    "beyond_mebibytes": "beyond inference",
    "rss_mebibytes": "RSS beyond, MiB",
}


class Bench:
    """Models, a batch, and the methods on them."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device, self._dtype = device, common.DTYPES[options.dtype]
        self._adapted: dict[str, Any] = {}
        self._spec = models.spec(options.model)
        self.model = self._build()
        self.inputs = models.inputs_on(self._spec, options.batch, options.seq, device)

    def _build(self) -> Any:
        return models.build(self._spec, self._dtype, self.device)

    def model_of(self, method: Method) -> Any:
        """The model that the method trains: one for all, except methods that adapt it."""
        if method.adapter is None:
            return self.model
        if method.name not in self._adapted:
            self._adapted[method.name] = method.prepare(self._build())
        return self._adapted[method.name]

    def loss(self, model: Any) -> Tensor:
        """The model's loss on the batch."""
        return loss_of(model, self.inputs)

    @torch.no_grad()
    def forwards(self, count: int = 2) -> None:
        """Evaluations without autograd."""
        for _ in range(count - 1):
            self.loss(self.model)
        # Read at the end, as a zeroth-order step does, so as to wait for a GPU once.
        float(self.loss(self.model))

    def step(self, entry: Entry) -> Callable[[], Any]:
        """One step of the method as a function, with a new optimizer."""
        method = entry.method
        if method.kind == "inference":
            return self.forwards
        model = self.model_of(method)
        optimizer: Any = method.build(model)
        for group in getattr(optimizer, "param_groups", []):
            # Some keep it in a tensor.
            group["lr"] = (
                torch.full_like(group["lr"], methods.LR)
                if isinstance(group["lr"], Tensor)
                else methods.LR
            )
        if method.kind == "zeroth-order":
            return lambda: optimizer.step(lambda: self.loss(model))
        return lambda: self._backprop(model, optimizer, entry)

    def _backprop(self, model: Any, optimizer: Any, entry: Entry) -> None:
        with contextlib.ExitStack() as stack:
            if entry.checkpointing:
                stack.enter_context(models.checkpointing(model))
            if entry.method.fused:
                stack.enter_context(zoopt.fuse_backward(model, optimizer))
            loss: Any = self.loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())

    def peak_bytes(self, entry: Entry) -> int:
        """The most memory in use during two steps, above what is in use before them."""
        model = self.model_of(entry.method)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._two_steps(entry)
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        tracker = LiveStorages([*model.parameters(), *model.buffers(), *tensors_of(self.inputs)])
        # Functions that another package compiles (torchao) would be hidden from the count.
        with torch.compiler.set_stance("force_eager"), tracker:
            self._two_steps(entry)
        return tracker.above

    def _two_steps(self, entry: Entry) -> None:
        step = self.step(entry)
        for _ in range(2):
            step()


def spawn_rss(entry: Entry, options: argparse.Namespace) -> int:
    """The growth of the resident set in a step, measured in a process of its own."""
    command = [sys.executable, "-m", __name__, "--rss-of", methods.key(entry.name)]
    for name in ("model", "dtype", "batch", "seq", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CommandError(f"--rss: the process for {entry.name} failed: {reason}; leave it out")
    return int(done.stdout)


def measure(options: argparse.Namespace, bench: Bench) -> list[common.Row]:
    """Rows of seconds and of bytes, one of each for a method: memory first, then time."""
    entries = methods.chosen(options.optimizers)
    bench.forwards(1)
    #: A step's cost, or the reason why it cannot be taken.
    peaks: dict[str, int | str] = {}
    for name, entry in entries.items():
        common.progress(f"memory: {name}")
        try:
            peaks[name] = bench.peak_bytes(entry)
        except torch.OutOfMemoryError:
            peaks[name] = "out of memory"
            torch.cuda.empty_cache()
        except Exception as error:
            # No peft, a model without linear layers, or an error of another package.
            peaks[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    residents = {}
    for name, entry in entries.items() if options.rss else ():
        if isinstance(peaks[name], str):
            continue
        common.progress(f"resident set: {name}")
        residents[name] = spawn_rss(entry, options)
    runs = {
        name: bench.step(entries[name]) for name, peak in peaks.items() if isinstance(peak, int)
    }
    times = common.round_robin(runs, bench.device, options.repeats, options.model)
    plain, published = peaks[INFERENCE], times.get(PUBLISHED)
    if isinstance(plain, str):
        raise CommandError(f"measuring inference failed: {plain}")
    rows = []
    for name, peak in peaks.items():
        if isinstance(peak, str):
            rows += [common.failed(name, unit, peak) for unit in ("s", "bytes")]
            continue
        own = times[name]
        rows += [
            common.measured(
                name,
                own,
                "s",
                ratio=common.ratio(own, times[INFERENCE]),
                times_as_fast_as_published=published and common.ratio(published, own),
                rounds=own,
            ),
            common.counted(name, peak, "bytes", ratio=peak / plain, beyond=peak - plain),
        ]
        if name in residents:
            rows.append(common.counted(name, residents[name], "bytes resident beyond a forward"))
    return rows


def text(rows: Sequence[common.Row]) -> str:
    """The table, one line for each method."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["name"], {"name": row["name"]})
        if row["unit"] == "s":
            line.update(row)
        elif row["unit"] == "bytes" and row["median"] is not None:
            line["peak_mebibytes"] = row["median"] / MIB
            line["beyond_mebibytes"] = row["beyond"] / MIB
        elif row["median"] is not None:
            line["rss_mebibytes"] = row["median"] / MIB
        line["median"] = line.get("median") or row.get("reason")
    columns = {
        key: heading
        for key, heading in COLUMNS.items()
        if any(line.get(key) is not None for line in lines.values())
    }
    return common.table(columns, list(lines.values()))


def panels(rows: Sequence[common.Row]) -> list[charts.Panel]:
    """The chart: seconds and bytes."""
    ours = frozenset(
        entry.name
        for entry in methods.table().values()
        if entry.name not in methods.BASELINES or entry.name.startswith("zoopt.")
    )
    seconds, peaks = ([row for row in rows if row["unit"] == unit] for unit in ("s", "bytes"))
    return [
        charts.Panel("seconds a step", seconds, 1.0, ours, INFERENCE),
        charts.Panel("peak memory above the model, MiB", peaks, 1 / MIB, ours, INFERENCE),
    ]


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The options, and the device to measure on."""
    parser = common.parser(
        str(__doc__), "zoopt bench step --model gpt2 --batch 8 --seq 64 --json step.json"
    )
    models.add_argument(parser, "gpt2")
    methods.add_argument(parser, DEFAULT)
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="float32", help="weights")
    parser.add_argument("--batch", type=common.positive, default=8, help="sequences a batch")
    parser.add_argument("--seq", type=common.positive, default=64, help="tokens a sequence")
    parser.add_argument("--rss", action="store_true", help="also measure resident sets (CPU)")
    parser.add_argument("--rss-of", metavar="NAME", help=argparse.SUPPRESS)
    common.add_common_arguments(parser, repeats=7)
    options = common.parse(parser, argv)
    if options.rss and options.device != "cpu":
        parser.error("--rss measures the CPU's memory; leave it out on a GPU")
    return options, common.open_device(parser, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options, device = parse(argv)
    common.progress(f"building {options.model}")
    bench = Bench(options, device)
    if options.rss_of:
        step = bench.step(methods.table()[options.rss_of])
        sys.stdout.write(f"{resident.beyond_forward(step, bench.forwards)}\n")
        return 0
    rows = measure(options, bench)
    sizes = [p.numel() * p.element_size() for p in bench.model.parameters()]
    parameters = sum(p.numel() for p in bench.model.parameters())
    what = f"{options.model}, {options.dtype}, {options.batch} x {options.seq} tokens"
    common.say(
        f"{what}: {parameters:,} parameters, the largest of {max(sizes):,} bytes\n\n"
        f"{text(rows)}\n\n/ inference: over two forward passes; "
        f"+-: interquartile range of {options.repeats} rounds; peaks are above the model's own "
        f"memory",
        options.json,
    )
    content = common.document(
        *("step", options, device, rows),
        ratio_to=RATIO_TO,
        parameters=parameters,
        largest_parameter_bytes=max(sizes),
    )
    common.write_json(options.json, content)
    if options.plot:
        charts.draw(options.plot, content, f"One training step: {what}", panels(rows))
        common.say(f"written: {options.plot}", options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
