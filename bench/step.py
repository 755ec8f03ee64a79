"""Time and memory of one MeZO step against two plain forwards, and against the alternatives.

The model has random weights and is never downloaded. Methods:

  forwards   two forward passes without autograd: what any two-sided step must pay
  inplace    zoopt.MeZO, parameters perturbed in place
  virtual    zoopt.MeZO, parameters perturbed as they are read, and never written but to update
  published  the algorithm as published (tests/reference/published_mezo.py)
  adamw      forward, backward and torch.optim.AdamW
  lozo       zoopt.LOZO: low-rank directions added at the operators
  lozo-m     zoopt.LOZO with momentum in the factors
  subzero    zoopt.SubZero, rank 24
  window     zoopt.ZOAdam, moments rebuilt from ten steps' directions in one pass
  dense      zoopt.ZOAdam with stored moments
  forward    zoopt.ForwardGrad: one pass in dual numbers

All are timed in turn, round by round; a ratio is the median of the rounds' own. Memory is measured
apart from time: the peak of one step less the peak of one forward, both above the model itself. On
the CPU that is the exact sum of the live tensors' storages, and with --rss the resident set of a
process a method; on a GPU it is what the allocator says.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zoopt
from bench import common
from bench.models import MODELS, build
from tests.meter import LiveStorages
from tests.reference.published_mezo import PublishedMeZO

LR, EPS = 1e-6, 1e-3
#: Zeroth-order methods: class and options.
ZEROTH_ORDER: dict[str, tuple[Any, dict[str, Any]]] = {
    "inplace": (zoopt.MeZO, {"zo_eps": EPS, "perturbation": "inplace"}),
    "virtual": (zoopt.MeZO, {"zo_eps": EPS, "perturbation": "virtual"}),
    "lozo": (zoopt.LOZO, {"zo_eps": EPS}),
    "lozo-m": (zoopt.LOZO, {"zo_eps": EPS, "momentum": 0.7}),
    "subzero": (zoopt.SubZero, {"zo_eps": EPS}),
    "window": (zoopt.ZOAdam, {"zo_eps": EPS, "state": "window"}),
    "dense": (zoopt.ZOAdam, {"zo_eps": EPS}),
    "forward": (zoopt.ForwardGrad, {}),
}
METHODS = ("forwards", "published", "adamw", *ZEROTH_ORDER)
DEFAULT_METHODS = ("forwards", "inplace", "virtual", "published", "adamw")
MIB = 1 << 20

COLUMNS = {
    "method": "method",
    "median_seconds": "seconds",
    "min_seconds": "min",
    "max_seconds": "max",
    "ratio_to_two_forwards": "/ 2 forwards",
    "times_as_fast_as_published": "x published",
    "peak_mebibytes": "peak MiB",
    "peak_beyond_forward_bytes": "bytes beyond forward",
    "rss_beyond_forward_mebibytes": "RSS beyond, MiB",
}


class Bench:
    """A model, a batch, and the methods on them."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(0)
        dtype = common.DTYPES[options.dtype]
        self.model = build(options.model, options.seq, dtype, device)
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(vocabulary, (options.batch, options.seq), device=device)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    @property
    def largest_parameter_bytes(self) -> int:
        return max(p.numel() * p.element_size() for p in self.parameters)

    def loss(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        return loss

    @torch.no_grad()
    def forwards(self, count: int = 2) -> None:
        for _ in range(count):
            # As MeZO's closure does: the loss is read before the next forward begins.
            float(self.loss())

    def method(self, name: str) -> Callable[[], Any]:
        """The method as a function, with a new optimizer."""
        if name == "forwards":
            return self.forwards
        if name == "published":
            plain = PublishedMeZO(self.parameters, lr=LR, zo_eps=EPS)
            return lambda: plain.step(self.loss)
        if name == "adamw":
            return self._adamw(torch.optim.AdamW(self.parameters, lr=LR))
        cls, options = ZEROTH_ORDER[name]
        optimizer = cls(self.parameters, lr=LR, seed=0, **options)
        return lambda: optimizer.step(self.loss)

    def _adamw(self, optimizer: torch.optim.AdamW) -> Callable[[], Any]:
        def step() -> None:
            loss = self.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())

        return step

    def peak_bytes(self, name: str) -> int:
        """The most memory in use during one call, above what is in use before it.

        The call is the first of its optimizer, so the state that it allocates counts as well.
        """
        run = (lambda: self.forwards(1)) if name == "forward" else self.method(name)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            run()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        tracker = LiveStorages([*self.parameters, *self.model.buffers(), self.ids])
        with tracker:
            run()
        return tracker.peak


def resident_peak(reset: bool) -> int:
    """The process's largest resident set in bytes, since the last reset where that can be done."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        clear.write_text("5")
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def rss_of(name: str, bench: Bench) -> dict[str, int]:
    """In a process of its own: the peaks of a forward and of one call of a method."""
    # Whatever compiles or loads on first use does so now, on something small.
    small = torch.nn.Parameter(torch.zeros(1 << 16, dtype=bench.parameters[0].dtype))
    zoopt.MeZO([small], perturbation="inplace").step(lambda: float(small[0]))
    zoopt.kernels.perturb(small, EPS, seed=0, stream=0, draw=0)
    rows = torch.zeros(8, dtype=torch.int64)
    zoopt.kernels.perturb_rows(small.view(256, 256), rows, EPS, seed=0, stream=0, draw=0)
    bench.forwards()
    run = bench.method(name)
    gc.collect()
    resident_peak(reset=True)
    bench.forwards(1)
    forward = resident_peak(reset=False)
    resident_peak(reset=True)
    run()
    return {"forward_bytes": forward, "method_bytes": resident_peak(reset=False)}


def spawn_rss(name: str, options: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--rss-of", name, "--model", options.model]
    for key in ("dtype", "batch", "seq", "threads"):
        command += [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        sys.exit(f"step.py: error: --rss: the process for {name} failed: {reason}")
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


def measure(options: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """A record a method: memory, then time."""
    names = ["forwards", *(name for name in options.methods if name != "forwards")]
    bench.forwards(1)
    forward = bench.peak_bytes("forward")
    peaks = {}
    for name in names:
        common.progress(f"memory: {name}")
        peaks[name] = bench.peak_bytes(name)
    residents: dict[str, dict[str, int]] = {}
    for name in names if options.rss else []:
        common.progress(f"resident set: {name}")
        residents[name] = spawn_rss(name, options)
    runs = {name: bench.method(name) for name in names}
    times = common.round_robin(runs, bench.device, options.repeats, options.model)
    records = []
    for name in names:
        own, resident = times[name], residents.get(name)
        beyond = resident["method_bytes"] - resident["forward_bytes"] if resident else None
        records.append(
            {
                "method": name,
                **common.spread(own, "seconds", 1.0),
                "ratio_to_two_forwards": common.ratio(own, times["forwards"]),
                "times_as_fast_as_published": common.ratio(times["published"], own)
                if "published" in times
                else None,
                "peak_bytes": peaks[name],
                "peak_mebibytes": peaks[name] / MIB,
                "peak_beyond_forward_bytes": peaks[name] - forward,
                "rss_bytes": resident["method_bytes"] if resident else None,
                "rss_beyond_forward_mebibytes": None if beyond is None else beyond / MIB,
                "round_seconds": own,
            }
        )
    return records


def parse() -> tuple[argparse.Namespace, torch.device]:
    parser = common.parser(
        str(__doc__), "python bench/step.py --model gpt2 --batch 8 --seq 64 --json step.json"
    )
    sizes = "; ".join(f"{name}: {spec.summary}" for name, spec in MODELS.items())
    parser.add_argument("--model", choices=list(MODELS), default="gpt2", help=sizes)
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="float32", help="weights")
    parser.add_argument("--batch", type=common.positive, default=8, help="sequences a batch")
    parser.add_argument("--seq", type=common.positive, default=64, help="tokens a sequence")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        choices=METHODS,
        default=list(DEFAULT_METHODS),
        help=f"which to measure, of {', '.join(METHODS)}; forwards always are",
    )
    parser.add_argument("--rss", action="store_true", help="also measure resident sets (CPU)")
    parser.add_argument("--rss-of", choices=METHODS, help=argparse.SUPPRESS)
    common.add_common_arguments(parser, repeats=7)
    options = parser.parse_args()
    if options.rss and options.device != "cpu":
        parser.error("--rss measures the CPU's memory; leave it out on a GPU")
    common.check_json(parser, options.json)
    return options, common.open_device(parser, options)


def main() -> None:
    options, device = parse()
    common.progress(f"building {options.model}")
    bench = Bench(options, device)
    if options.rss_of:
        print(json.dumps(rss_of(options.rss_of, bench)))
        return
    records = measure(options, bench)
    parameters = sum(p.numel() for p in bench.parameters)
    largest = bench.largest_parameter_bytes
    print(f"{options.model}: {parameters} parameters, {options.dtype}, {options.batch} sequences")
    print(f"of {options.seq} tokens; the largest parameter has {largest} bytes\n")
    print(common.table(COLUMNS, records))
    forwards = statistics.median(records[0]["round_seconds"])
    print(f"\ntwo forwards: {forwards:.3f} s; peaks are above the model's own memory")
    content = {"parameters": parameters, "largest_parameter_bytes": largest, "records": records}
    common.write_json(options.json, common.document(device, options, **content))


if __name__ == "__main__":
    main()
