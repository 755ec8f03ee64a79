"""State of first-order optimizers under FSDP2: codes in blocks, error feedback, signs, sums."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import zoopt
from tests.processes import Scenario, failure, run_all, scenario_cases
from tests.test_distributed import assert_same, assert_same_run, go_on, shard, whole
from zoopt.distributed.sharding import is_sharded

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
#: Name and shape. Borders of rows fall inside of blocks of 128 and 256 elements, but for `even`.
#: One vector's last block has a single element, and one matrix has fewer rows than processes.
SHAPES = {
    "odd": (130, 37),
    "even": (64, 64),
    "wide": (3, 1400),
    "vector": (4097,),
    "small": (5, 7),
    "kernel": (70, 5, 12),
}


class Bag(nn.Module):
    """Parameters of these shapes."""

    def __init__(self, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


def bag(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> Bag:
    return Bag(dtype, shapes or SHAPES)


def frugal(model: nn.Module, **options: Any) -> Any:
    options = {"lr": 2.0**-6, "update_proj_gap": 2, "seed": 7, "weight_decay": 0.1, **options}
    return zoopt.Frugal(model.named_parameters(), **options)


def adamw(model: nn.Module, **options: Any) -> Any:
    return zoopt.AdamW(model.named_parameters(), lr=2.0**-6, seed=7, **options)


#: Whose arithmetic is that of one process.
EXACT: dict[str, Callable[[nn.Module], Any]] = {
    "int8": lambda m: adamw(m, state_dtype="int8"),
    "int4": lambda m: adamw(m, state_dtype="int4"),
    "int4 to nearest": lambda m: adamw(m, state_dtype="int4", state_rounding="nearest"),
    "columns": lambda m: frugal(m),
    "columns, int8": lambda m: frugal(m, density=0.9, state_dtype="int8", rule="lion"),
    "rows": lambda m: frugal(m, proj_type="reverse_std", rule="momentum", state_dtype="int4"),
    "all of it": lambda m: frugal(m, density=None, rule="lion", state_dtype="int4"),
}


def equals_the_unsharded_run(folder: Path) -> None:
    for name, build in EXACT.items():
        for dtype in (torch.float32, torch.bfloat16):
            plain, model = bag(dtype), fully_shard(bag(dtype))
            optimizer, other = build(model), build(plain)
            go_on(model, optimizer, range(3))
            go_on(plain, other, range(3))
            try:
                assert_same_run(model, optimizer, plain, other)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}") from error


SCENARIOS: dict[int, list[Scenario]] = {
    1: [equals_the_unsharded_run],
    2: [equals_the_unsharded_run],
    4: [equals_the_unsharded_run],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(SCENARIOS, tmp_path_factory.mktemp("state"))


@scenario_cases(SCENARIOS)
def test_sharded(processes: int, scenario: Scenario, ran: Path) -> None:
    message = failure(scenario, processes, ran)
    assert message is None, message
