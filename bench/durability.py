"""Damages recorded files and kills runs, and checks that no weights are wrong and no step is lost.

    python bench/durability.py --json bench/results/durability.json

A *damage* is a flipped bit, a cut, two swapped stretches, or a repeated stretch. A replay of the
file must raise an error, or give the weights of the run after as many steps as it reports. If these
are fewer steps than the file had, it must have warned, unless the file was cut.

A *kill* is SIGKILL to a process that trains and records, at a random instant. Its file must then
hold every step that had returned, and give the weights after them bit for bit. The next process
continues from there.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import os
import random
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoopt
from zoopt.bench import common
from zoopt.trajectory import TrajectoryError, replay, resume

#: Steps of the run whose file is damaged, and the greatest number of steps of a run that is killed.
STEPS, MOST = 12, 400
#: Kills of one run. A kill comes at most so many seconds after one of the first steps has returned,
#: or after the start: on a busy machine too, some steps return.
KILLS, LATEST, FIRST = 10, 0.12, 8
#: A child that is silent for this many seconds counts as hung.
PATIENCE = 300.0


def model() -> nn.Module:
    """A small model, always the same."""
    generator = torch.Generator().manual_seed(1)
    made = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2))
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return made


def closure_of(net: nn.Module) -> Callable[[], torch.Tensor]:
    """The model's loss on a batch, always the same."""
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    return lambda: (net(x).sum(1) - x.sum(1)).square().mean()


def optimizer_of(net: nn.Module) -> zoopt.MeZO:
    """The optimizer of the run."""
    return zoopt.MeZO(net.named_parameters(), lr=1e-2, seed=3, perturbation="inplace")


def bits(net: nn.Module) -> bytes:
    """The bits of all weights."""
    flat = torch.cat([param.detach().flatten() for param in net.parameters()])
    return flat.numpy().tobytes()


class Undisturbed:
    """The undisturbed run, computed as far as it is needed."""

    def __init__(self) -> None:
        self._net = model()
        self._optimizer = optimizer_of(self._net)
        self._states = [bits(self._net)]

    def after(self, steps: int) -> bytes:
        """The weights after that many steps."""
        while len(self._states) <= steps:
            self._optimizer.step(closure_of(self._net))
            self._states.append(bits(self._net))
        return self._states[steps]


def damaged(data: bytes, choose: random.Random) -> tuple[str, bytes]:
    """Damage the data at random. Return the kind of damage and the damaged data."""
    kind = choose.choice(("flip", "cut", "swap", "twice"))
    at, length = choose.randrange(len(data)), choose.randrange(1, 60)
    if kind == "flip":
        changed = bytearray(data)
        changed[at] ^= 1 << choose.randrange(8)
        return kind, bytes(changed)
    if kind == "cut":
        return kind, data[:at]
    if kind == "twice":
        return kind, data[: at + length] + data[at:]
    first, second = sorted((at, choose.randrange(len(data))))
    length = min(length, second - first)
    one, two = data[first : first + length], data[second : second + length]
    middle = data[first + length : second]
    return kind, data[:first] + two + middle + one + data[second + length :]


def damages(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Damage files, and count the outcomes.

    Returns:
        kind and outcome -> count. Outcomes: "whole" (nothing was damaged, or only the length of
        a part that was cut off anyway), "error", "said" (shorter, with a warning), "cut" (at the
        end of a record, which looks like a shorter run), and "wrong", which must not occur.
    """
    path = folder / "run"
    net = model()
    optimizer = optimizer_of(net)
    recorder = optimizer.record(path, net)
    for step in range(STEPS):
        if step == STEPS // 2:
            optimizer.param_groups[0]["weight_decay"] = 0.1
        optimizer.step(closure_of(net))
    recorder.close()
    data = path.read_bytes()
    expected = []
    for until in range(STEPS + 1):
        again = model()
        replay(again, path, until=until)
        expected.append(bits(again))
    assert expected[-1] == bits(net)
    choose, found = random.Random(seed), collections.Counter[str]()
    base = model()
    for _ in range(count):
        kind, changed = damaged(data, choose)
        path.write_bytes(changed)
        found[f"{kind} {_outcome(path, copy.deepcopy(base), expected, kind, changed == data)}"] += 1
    return dict(sorted(found.items()))


def _outcome(path: Path, net: nn.Module, expected: list[bytes], kind: str, same: bool) -> str:
    before = bits(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            steps = replay(net, path).param_groups[0]["step"]
        except TrajectoryError:
            return "error" if bits(net) == before and not same else "wrong"
    if bits(net) != expected[steps]:
        return "wrong"
    if steps == STEPS:
        return "whole"
    if caught:
        return "said"
    return "cut" if kind == "cut" else "wrong"


def kills(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Kill runs, and count the outcomes.

    Returns:
        "kills"; "steps", which had returned before a kill; "unfinished", steps that had not
        returned but are in the file; "torn", files that end inside a record; "empty", files that
        end in the header before any step. These must not occur: "lost", steps that had returned but
        are not in the file, and "wrong" weights.
    """
    expected, choose = Undisturbed(), random.Random(seed)
    found: collections.Counter[str] = collections.Counter(
        dict.fromkeys(("kills", "steps", "unfinished", "torn", "empty", "lost", "wrong"), 0)
    )
    path, begun = folder / "killed", 0
    expected.after(1)  # Children inherit the kernels that it loads.
    for number in range(count):
        if number % KILLS == 0:
            path.unlink(missing_ok=True)
            begun = 0
        least = min(choose.randrange(FIRST), MOST - begun)
        returned = begun + _killed(path, least, choose.uniform(0.0, LATEST))
        found["kills"] += 1
        found["steps"] += returned - begun
        net = model()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                steps = replay(net, path).param_groups[0]["step"]
            except (TrajectoryError, FileNotFoundError):
                # It was killed at its start. Nothing was recorded, so no step may have returned.
                found["empty" if returned == 0 else "lost"] += 1
                path.unlink(missing_ok=True)
                continue
        found["torn"] += bool(caught)
        found["unfinished"] += max(0, steps - returned)
        found["lost"] += max(0, returned - steps)
        found["wrong"] += bits(net) != expected.after(steps) or steps > returned + 1
        begun = steps
    return dict(found)


def _killed(path: Path, steps: int, after: float) -> int:
    """Train in a process that is killed when that many steps have returned, and that many seconds
    have passed. Return how many of its steps returned."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about forks of processes with threads.
        child = os.fork()
    if not child:
        os.close(reading)
        with contextlib.suppress(BaseException):
            _train(path, writing)
        os._exit(1)
    os.close(writing)
    try:
        for _ in range(1 + steps):
            _said(reading)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return steps + sum(len(said) for said in iter(lambda: os.read(reading, 1 << 12), b""))
    finally:
        os.close(reading)


def _said(reading: int) -> None:
    """Wait for the child's next byte."""
    ready, _, _ = select.select([reading], [], [], PATIENCE)
    if not ready:
        raise TimeoutError(f"a child must say something within {PATIENCE} seconds, got nothing")
    if not os.read(reading, 1):
        raise ChildProcessError("a child has ended before it was killed")


def _train(path: Path, writing: int) -> None:
    """Train and record until killed. Write a byte at the start, and one for each step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # A resumed run warns about an incomplete record.
    net = model()
    os.write(writing, b"!")
    optimizer: Any
    if path.exists():
        optimizer = resume(net, path, sync_every=1.0)
    else:
        optimizer = optimizer_of(net)
        optimizer.record(path, net)
    closure = closure_of(net)
    while optimizer.param_groups[0]["step"] < MOST:
        optimizer.step(closure)
        os.write(writing, b".")
    signal.pause()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(argv: list[str] | None = None) -> int:
    """Run both, print the outcomes, and return 1 if anything was wrong or lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damages", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    with _folder() as folder:
        report = {
            "seed": options.seed,
            "damages": damages(options.damages, options.seed, folder),
            "kills": kills(options.kills, options.seed, folder),
        }
    for name in ("damages", "kills"):
        print(name)
        for what, count in report[name].items():
            print(f"  {what:12} {count}")
    common.write_json(options.json, report)
    bad = [n for what, n in report["damages"].items() if what.endswith("wrong")]
    return int(bool(sum(bad) + report["kills"]["lost"] + report["kills"]["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
