"""Scenarios that run in several processes at once: each is a function, and its failures are files.

One process imports torch, and the others are its forks; each runs all scenarios in turn. Those of
fewer processes are run by the first of them, which have loaded the kernels by then.
"""

from __future__ import annotations

import datetime
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

Scenario = Callable[[Path], None]
#: What every process would import at its first step.
KERNELS = ("numba", "zoopt.kernels.noise.cpu")
#: For so many seconds processes wait for each other. One may be late on a busy machine, or because
#: it compiles kernels. No scenario depends on this time's being over.
PATIENCE = 300


def run(scenarios: Mapping[int, Sequence[Scenario]], folder: Path) -> None:
    """Run them, by how many processes take part. A process ends once it takes part in no more, so
    the counts must fall."""
    ordered = [(count, each) for count in scenarios for each in scenarios[count]]
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([ordered[0][1].__module__, *KERNELS])
    torch.multiprocessing.start_processes(
        _work, (ordered, folder), nprocs=max(scenarios), start_method="forkserver"
    )


def failure(scenario: Scenario, processes: int, folder: Path) -> str | None:
    """What went wrong in the processes: where one fails, others may say only that it is gone."""
    files = sorted(folder.glob(f"{scenario.__name__}{processes}.*"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files) or None


def scenario_cases(scenarios: Mapping[int, Sequence[Scenario]]) -> pytest.MarkDecorator:
    """A test for each number of processes and scenario."""
    return pytest.mark.parametrize(
        ("processes", "scenario"),
        [(processes, scenario) for processes, each in scenarios.items() for scenario in each],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )


def run_all(scenarios: Mapping[int, Sequence[Scenario]], folder: Path) -> Path:
    """The folder of the scenarios' failures, after all of them have run in their order. Those of
    fewer processes than the ones before share their launch."""
    launches: list[dict[int, Sequence[Scenario]]] = []
    for processes, each in scenarios.items():
        if not launches or processes > min(launches[-1]):
            launches.append({})
        launches[-1][processes] = each
    for launch in launches:
        run(launch, folder)
    return folder


def connect(rank: int, processes: int, store: Path) -> None:
    """Join a group of processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), processes),
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    torch.use_deterministic_algorithms(True)


def _work(rank: int, scenarios: Sequence[tuple[int, Scenario]], folder: Path) -> None:
    for processes, scenario in scenarios:
        if rank >= processes:
            continue
        # A group for each: one process's failure ends it, and the others go on with the next.
        connect(rank, processes, folder / f"{scenario.__name__}{processes}")
        torch.manual_seed(1337 + rank)  # as programs do
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", ".*takes its steps alone")
                warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated")
                scenario(folder)
            dist.barrier()
        except BaseException:
            path = folder / f"{scenario.__name__}{processes}.{rank}"
            path.write_text(traceback.format_exc(), encoding="utf-8")
        dist.destroy_process_group()


def everywhere(value: Any) -> list[Any]:
    """Each rank's value."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def bits(tensors: Sequence[Tensor] | nn.Module) -> bytes:
    """The tensors' bytes, in a row."""
    params = list(tensors.parameters()) if isinstance(tensors, nn.Module) else tensors
    flat = [t.detach().contiguous().view(-1).view(torch.uint8) for t in params]
    return torch.cat(flat).numpy().tobytes()


def refusal(call: Callable[[], Any]) -> str:
    """What the call is refused with; "" if it is not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
