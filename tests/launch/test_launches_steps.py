"""First-order steps on a stub of a GPU: launches do not depend on the number of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoopt
from bench.stub_gpu import launches, stub_gpu
from zoopt.zeroth_order.engine.closure import RecordedLosses

FORMATS = ["float32", "bfloat16", "int8", "int4"]


def counted(cls: type[Any], count: int, dtype: torch.dtype, **options: Any) -> tuple[int, int]:
    """Launches and copies of the third step over that many matrices. (Waits cannot be counted: the
    steps' counters, which lie on the CPU anyway, are read.)"""
    params = [torch.nn.Parameter(torch.zeros(64, 80, dtype=dtype)) for _ in range(count)]
    optimizer = cls(params, lr=1e-3, seed=1, **options)
    for param in params:
        param.grad = torch.zeros_like(param)
    with stub_gpu():
        for _ in range(2):
            optimizer.step()
        recorded = launches(optimizer.step)
    return len(recorded.launches), recorded.copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_adamw_is_one_launch(state_dtype: str, dtype: torch.dtype) -> None:
    assert counted(zoopt.AdamW, 7, dtype, state_dtype=state_dtype) == (1, 0)


def test_a_replay_is_one_launch_for_many_steps(tmp_path: Path) -> None:
    """128 of them, however many parameters; what directions weigh comes by value, and no copy."""
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    optimizer = zoopt.MeZO(net.named_parameters(), seed=1, perturbation="inplace")
    recorder = optimizer.record(tmp_path / "run", net)
    optimizer.step(RecordedLosses([1.0, 1.0, 2.0]))
    for _ in range(199):
        optimizer.step(RecordedLosses([1.0, 2.0]))
    recorder.close()
    with stub_gpu():
        recorded = launches(lambda: zoopt.replay(net, tmp_path / "run", check_base=False))
    assert len(recorded.of("writes_kernel")) == 2
    assert {launch.kernel for launch in recorded.launches} == {"writes_kernel", "numbers_kernel"}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sm3_is_one_launch(momentum: float) -> None:
    assert counted(zoopt.SM3, 7, torch.bfloat16, momentum=momentum) == (1, 0)


def test_plain_parameters_of_projected_classes_are_one_launch() -> None:
    assert counted(zoopt.GaLoreAdamW, 7, torch.bfloat16, rank=None) == (1, 0)
