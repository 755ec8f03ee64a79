"""Zeroth-order steps compared with two forward passes, and MeZO on a model that fills the GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from zoopt.bench import common, methods
from zoopt.bench.methods import INFERENCE, PUBLISHED, Entry
from zoopt.bench.step import Bench
from zoopt.doctor.gpu import rows
from zoopt.doctor.gpu.rows import Emit
from zoopt.doctor.gpu.scale import Scale, Setting

SECTION, LARGE = "zeroth-order steps", "large model"
#: Our methods; they are measured after inference and the published MeZO.
IN_PLACE, VIRTUAL = "MeZO, in place", "MeZO, virtual"
OURS = (IN_PLACE, VIRTUAL, "LOZO", "LOZO, momentum", "SubZero", "ZOAdam, window")
#: Elements of the copy that measures the bandwidth of a GPU.
COPY_NUMEL = 1 << 28
PASSES = "three passes at copy bandwidth"


def measure(scale: Scale, device: torch.device, emit: Emit) -> None:
    """Time a step of each method at each setting, relative to two forward passes."""
    table = {entry.name: entry for entry in methods.table(scale.rank).values()}
    for setting in scale.settings:
        bench = _bench(scale.forward_model, setting, device)
        runs: dict[str, Callable[[], Any]] = {}
        for method in (INFERENCE, PUBLISHED, *OURS):
            run = bench.step(table[method])
            try:
                run()
            except Exception as error:
                emit(rows.failed(SECTION, setting.name, method, "ms", error))
                continue
            runs[method] = run
        times = common.round_robin(runs, device, scale.repeats, setting.name)
        for method, seconds in times.items():
            emit(rows.timed(SECTION, setting.name, method, seconds, to=times[INFERENCE]))
        del bench, runs
        rows.forget(device)


def measure_large(scale: Scale, device: torch.device, emit: Emit) -> None:
    """Memory and time of MeZO, in place and virtual, relative to inference on one sequence."""
    setting = Setting(1, scale.large_seq, "bfloat16")
    table = {entry.name: entry for entry in methods.table(scale.rank).values()}
    entries: list[Entry] = [table[name] for name in (INFERENCE, IN_PLACE, VIRTUAL)]
    bench = _bench(scale.large_model, setting, device)
    weights = sum(param.nbytes for param in bench.model.parameters())
    bench.forwards(1)
    for entry in entries:
        beyond = bench.peak_bytes(entry)
        emit(rows.counted(LARGE, "large", entry.name, weights + beyond, "bytes", beyond=beyond))
    runs = {entry.name: bench.step(entry) for entry in entries}
    times = common.round_robin(runs, device, scale.repeats, "large")
    for method, seconds in times.items():
        emit(rows.timed(LARGE, "large", method, seconds, to=times[INFERENCE]))
    passes = [3 * 2 * weights / rate for rate in _copy_bandwidth(scale, device)]
    emit(rows.timed(LARGE, "large", PASSES, passes, weights=weights))


def _bench(model: str, setting: Setting, device: torch.device) -> Bench:
    options = argparse.Namespace(
        model=model, dtype=setting.dtype, batch=setting.batch, seq=setting.seq
    )
    return Bench(options, device)


def _copy_bandwidth(scale: Scale, device: torch.device) -> list[float]:
    """Bytes per second that a copy reads and writes, for each round."""
    numel = COPY_NUMEL if device.type == "cuda" else scale.numel
    source = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    calls = 20 if device.type == "cuda" else 1
    copies = {"copy_": lambda: target.copy_(source)}
    times = common.round_robin(copies, device, scale.repeats, "copy", calls)["copy_"]
    return [2 * source.nbytes / second for second in times]
