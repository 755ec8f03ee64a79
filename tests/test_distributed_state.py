"""State of first-order optimizers under FSDP2: codes in blocks, error feedback, signs, sums."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import zoopt
from tests.processes import Scenario, failure, run_all, scenario_cases
from tests.test_distributed import assert_same, assert_same_run, go_on, gradients, shard, whole
from tests.test_first_order_interrupts import ERRORS, Failing
from zoopt.distributed.spans import block_spans, entry_spans, row_spans

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
    "columns, int8": lambda m: frugal(m, density=0.95, state_dtype="int8", rule="lion"),
    "rows": lambda m: frugal(m, proj_type="reverse_std", rule="momentum", state_dtype="int4"),
    "all of it": lambda m: frugal(m, density=None, rule="lion", state_dtype="int4"),
}


#: Those that run in other numbers of processes than two: each has arithmetic of its own.
FEW = (
    "int8",
    "int4",
    "columns",
    "rows",
    "GaLore int8",
    "svd",
    "LDAdam int8",
    "Adafactor, averaged",
)


def equals_the_unsharded_run(folder: Path) -> None:
    for name, build in EXACT.items():
        for dtype in (torch.float32, torch.bfloat16):
            few = dist.get_world_size() != 2
            if few and (name not in FEW or (dtype == torch.bfloat16) != (name == "int4")):
                continue
            plain, model = bag(dtype), fully_shard(bag(dtype))
            optimizer, other = build(model), build(plain)
            go_on(model, optimizer, range(3))
            go_on(plain, other, range(3))
            try:
                assert_same_run(model, optimizer, plain, other)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}") from error


def ldadam(model: nn.Module, **options: Any) -> Any:
    options = {"lr": 2.0**-6, "rank": 2, "seed": 7, **options}
    return zoopt.LDAdamW(model.named_parameters(), **options)


def adafactor(model: nn.Module, **options: Any) -> Any:
    options = {"lr": 2.0**-6, "rank": 2, "update_proj_gap": 2, "seed": 7, **options}
    return zoopt.GaLoreAdafactor(model.named_parameters(), **options)


def projected(cls: Any, **options: Any) -> Callable[[nn.Module], Any]:
    options = {"lr": 2.0**-6, "rank": 40, "update_proj_gap": 2, "seed": 7, **options}
    return lambda model: cls(model.named_parameters(), **options)


#: Whose sums go over processes: R of `odd` has 4810 numbers or more, which are coded.
SUMMED: dict[str, Callable[[nn.Module], Any]] = {
    "GaLore int8": projected(zoopt.GaLoreAdamW, state_dtype="int8", scale=1.0),
    "GaLore int4, left": projected(zoopt.GaLoreAdamW, state_dtype="int4", proj_type="left"),
    "QGaLore": projected(zoopt.QGaLoreAdamW),
    "Apollo int8": projected(zoopt.Apollo, state_dtype="int8"),
    "Fira int4": projected(zoopt.Fira, state_dtype="int4"),
    "orthogonal": lambda m: frugal(
        m, projector="orthogonal", state_dtype="int8", density=1 - 2**-9
    ),
    "svd": lambda m: frugal(m, projector="svd", rule="momentum"),
    "svd, reverse": lambda m: frugal(m, projector="svd", proj_type="reverse_std"),
    "LDAdam": lambda m: ldadam(m),
    "LDAdam without errors": lambda m: ldadam(m, error_feedback=False, weight_decay=0.1),
    "LDAdam, reverse": lambda m: ldadam(m, proj_type="reverse_std"),
    "LDAdam int8": lambda m: ldadam(m, rank=40, state_dtype="int8"),
    "Adafactor": lambda m: adafactor(m, relative_step=True),
    "Adafactor, averaged": lambda m: adafactor(m, rank=40, beta1=0.5, state_dtype="int8"),
    "Adafactor, reverse": lambda m: adafactor(m, proj_type="reverse_std", beta1=0.5),
    "Adafactor, full": lambda m: adafactor(m, proj_type="full", projector="random"),
    "Adafactor alone": lambda m: adafactor(m, rank=None, beta1=0.5, state_dtype="int4"),
}


#: Norms of rows of 40 numbers in float32, each off by 40 2^-24 at most, three in a product.
ROUNDED = {"Apollo int8": 1e-5, "Fira int4": 1e-5}


def equals_the_unsharded_run_to_rounding(folder: Path) -> None:
    """In float64, as for the other projections; coded moments are computed in float32, and fall on
    the other side of a level, or of a random number, where they are within 1e-7 of it: so may few.
    """
    for name, build in SUMMED.items():
        if dist.get_world_size() != 2 and name not in FEW:
            continue
        tolerance = ROUNDED.get(name, 1e-9)
        plain, model = bag(torch.float64), fully_shard(bag(torch.float64))
        optimizer, other = build(model), build(plain)
        go_on(model, optimizer, range(3))
        go_on(plain, other, range(3))
        for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            where = f"{name}, {key}"
            assert_close(whole(p), q, where, tolerance)
            assert optimizer.state[p].keys() == other.state[q].keys(), where
            for entry, value in optimizer.state[p].items():
                # A norm of 4810 numbers, a few of which are on another one of 7 levels.
                wide = 1e-2 if name in ROUNDED and entry == "update_norm" else tolerance
                assert_close(whole(value), other.state[q][entry], f"{where}, {entry}", wide)


def assert_close(value: Tensor, expected: Tensor, where: str, tolerance: float) -> None:
    assert value.dtype == expected.dtype, where
    if not value.is_floating_point():
        assert (value == expected).double().mean() > 0.999, where
        return
    close = torch.isclose(value, expected, rtol=tolerance, atol=tolerance)
    assert close.double().mean() > 0.998, where


def what_is_not_finite_waits_everywhere(folder: Path) -> None:
    """A NaN in the rows of one process."""
    for build in (ldadam, frugal):
        model = fully_shard(bag(odd=(130, 37)))
        [param] = model.parameters()
        optimizer, before = build(model), whole(param).clone()
        bad = torch.zeros(130, 37)
        bad[0, 0] = torch.nan
        param.grad = shard(bad, param)
        optimizer.step()
        assert_same(param, before, "a weight")
        assert int(optimizer.state[param]["step"]) == 0


def whole_blocks_are_exchanged_with_nobody(folder: Path) -> None:
    """Where borders of rows are borders of blocks."""
    model = fully_shard(bag(even=(64, 64), bias=(8192,)))
    optimizers = [EXACT["int8"](model), EXACT["int4"](model)]
    with unittest.mock.patch("torch.distributed.all_to_all_single", side_effect=AssertionError):
        for optimizer in optimizers:
            go_on(model, optimizer, range(1))


def replicas_of_shards(folder: Path) -> None:
    """A mesh of two dimensions, one of which has copies."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for build in (EXACT["int4"], EXACT["rows"]):
        plain, model = bag(), fully_shard(bag(), mesh=mesh)
        optimizer, other = build(model), build(plain)
        go_on(model, optimizer, range(2))
        go_on(plain, other, range(2))
        assert_same_run(model, optimizer, plain, other)


def by_columns(model: nn.Module, *placements: Any) -> nn.Module:
    """Parameters sharded along their second dimension; vectors along their only one."""
    mesh = dist.device_mesh.init_device_mesh(
        "cpu", (dist.get_world_size() // len(placements), len(placements))[: len(placements)]
    )
    for name, param in list(model.named_parameters()):
        own = placements if param.dim() > 1 else [Shard(0) for _ in placements]
        value = distribute_tensor(param.detach(), mesh, own)
        model.register_parameter(name, nn.Parameter(value))
    return model


COLUMNS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": adamw,
    "bfloat16 moments": lambda m: adamw(m, state_dtype="bfloat16"),
    "SM3": lambda m: zoopt.SM3(m.named_parameters(), momentum=0.5, rounding="nearest", seed=7),
    "lion": lambda m: frugal(m, density=None, rule="lion"),
}


def columns_equal_the_unsharded_run(folder: Path) -> None:
    """Unequal numbers of them; in four processes over two dimensions, some without any."""
    shapes = {"odd": (11, 13), "thin": (9, 1), "kernel": (7, 5, 2), "vector": (5,)}
    placements = [Shard(1)] if dist.get_world_size() == 2 else [Shard(0), Shard(1)]
    for name, build in COLUMNS.items():
        for dtype in (torch.float32, torch.bfloat16):
            if name == "SM3" and len(placements) > 1:
                continue
            plain, model = bag(dtype, **shapes), by_columns(bag(dtype, **shapes), *placements)
            optimizer, other = build(model), build(plain)
            go_on(model, optimizer, range(2))
            go_on(plain, other, range(2))
            optimizer.load_state_dict(other.state_dict())
            go_on(model, optimizer, range(2, 3))
            go_on(plain, other, range(2, 3))
            try:
                assert_same_run(model, optimizer, plain, other)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}") from error


def tensor_parallel_layers_train(folder: Path) -> None:
    """In float64, where products of 16 numbers of size 1 are summed in another order."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    x = torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).view(3, 8)
    for build in (adamw, lambda m: zoopt.SM3(m.named_parameters(), seed=7)):
        models = []
        for parallel in (False, True):
            torch.manual_seed(0)
            model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
            if parallel:
                model = parallelize_module(model, mesh, plan)
            optimizer = build(model)
            for _ in range(3):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            models.append(model)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(whole(q), p, rtol=0.0, atol=1e-10)


def what_columns_cannot_be_is_refused(folder: Path) -> None:
    model = by_columns(bag(torch.bfloat16, odd=(130, 64)), Shard(1))
    rest = "must have parameters sharded along dimension 0 .*, got dimension 1 for 'odd'; use AdamW"
    for build in (EXACT["int8"], ldadam, lambda m: zoopt.SM3(m.named_parameters())):
        with pytest.raises(ValueError, match=rest):
            build(model)


SAVED = {
    **{name: EXACT[name] for name in ("int8", "int4", "columns, int8", "rows")},
    **{name: SUMMED[name] for name in ("LDAdam int8", "Adafactor, averaged", "GaLore int8")},
}


def checkpoints_resume_to_the_bit(folder: Path) -> None:
    """Saved by four processes; loaded by as many as there are, also where nothing is sharded."""
    for name, build in SAVED.items():
        path, record = folder / name, folder / f"{name}.pt"
        if dist.get_world_size() == 4:
            model = fully_shard(bag())
            optimizer = build(model)
            go_on(model, optimizer, range(2))
            kept = get_optimizer_state_dict(model, optimizer)
            dcp.save({"model": model.state_dict(), "optimizer": kept}, checkpoint_id=path)
            states = [optimizer.state[param] for param in model.parameters()]
            full = [{key: whole(value) for key, value in state.items()} for state in states]
            if dist.get_rank() == 0:
                torch.save(full, record)
            dist.barrier()
        saved = torch.load(record)
        again = bag() if dist.get_world_size() == 1 else fully_shard(bag())
        resumed = build(again)
        loaded = {
            "model": again.state_dict(),
            "optimizer": get_optimizer_state_dict(again, resumed),
        }
        dcp.load(loaded, checkpoint_id=path)
        again.load_state_dict(loaded["model"])
        set_optimizer_state_dict(again, resumed, loaded["optimizer"])
        for param, entries in zip(again.parameters(), saved, strict=True):
            assert resumed.state[param].keys() == entries.keys()
            for key, value in resumed.state[param].items():
                assert_same(value, entries[key], f"{name}, {key}")
        go_on(again, resumed, range(2, 4))
        if name in EXACT:
            plain = bag()
            other = build(plain)
            go_on(plain, other, range(4))
            assert_same_run(again, resumed, plain, other)


def network(**options: Any) -> nn.Sequential:
    """Of unequal shards, and tied to no order of its layers' gradients."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 130), nn.Tanh(), nn.Linear(130, 37), nn.Linear(37, 3))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / 8)
    for layer in model:
        if not isinstance(layer, nn.Tanh):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


FUSED: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any]]] = {
    "AdamW": (lambda m: adamw(m, state_dtype="int8"), {}),
    "clipped": (adamw, {"max_grad_norm": 0.01}),
    "accumulated": (adamw, {"accumulation_steps": 2}),
    "SM3": (lambda m: zoopt.SM3(m.named_parameters(), seed=7), {}),
    "GaLore": (projected(zoopt.GaLoreAdamW, rank=2), {}),
    "Fira": (projected(zoopt.Fira, rank=2), {}),
    "LDAdam": (ldadam, {"accumulation_steps": 2}),
    "Frugal": (frugal, {}),
    "Adafactor": (adafactor, {}),
}


def fused_equals_unfused(folder: Path) -> None:
    """Each process has data of its own; `copies`: whole parameters in every process."""
    x = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(dist.get_rank()))
    copies = dist.device_mesh.init_device_mesh(
        "cpu", (dist.get_world_size(), 1), mesh_dim_names=("copies", "shards")
    )
    meshes: list[dict[str, Any]] = [{}, {"mesh": copies}]
    for name, (build, options) in FUSED.items():
        if dist.get_world_size() != 2 and name not in ("AdamW", "GaLore"):
            continue
        for mesh in meshes if name in ("AdamW", "GaLore") else meshes[:1]:
            runs = []
            for fused in (False, True):
                model = network(**mesh)
                optimizer, left = build(model), []
                if fused:
                    zoopt.fuse_backward(model, optimizer, **options)
                for batch in x:
                    for _ in range(options.get("accumulation_steps", 1)):
                        model(batch).sin().square().mean().backward()
                    left += [p.grad for p in model.parameters() if p.grad is not None]
                    if not fused and "max_grad_norm" in options:
                        nn.utils.clip_grad_norm_(model.parameters(), options["max_grad_norm"])
                    optimizer.step()
                    optimizer.zero_grad()
                assert bool(left) != fused, name
                runs.append((model, optimizer))
            assert_same_run(*runs[0], *runs[1])
    model = network()
    message = "GaLoreAdamW needs the whole gradient of parameter '0.weight', which is sharded"
    with pytest.raises(ValueError, match=message):
        zoopt.fuse_backward(model, projected(zoopt.GaLoreAdamW)(model), accumulation_steps=2)


def an_error_in_one_process(folder: Path) -> None:
    """Where it came, the step is taken again; the others, which wait, take it once."""
    builds = {
        **{name: SUMMED[name] for name in ("Fira int4", "LDAdam int8", "Adafactor, averaged")},
        **{name: EXACT[name] for name in ("int4", "rows")},
    }

    def before_the_third_step(build: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        model = fully_shard(bag())
        optimizer = build(model)
        go_on(model, optimizer, range(2))
        for param, gradient in zip(model.parameters(), gradients(model, 2), strict=True):
            param.grad = shard(gradient, param)
        return model, optimizer

    with pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch)
        for name, build in builds.items():
            plain, other = before_the_third_step(build)
            failing.at = failing.calls = 0
            with failing:
                other.step()
            calls = failing.calls
            for quarter in (1, 2, 3):
                model, optimizer = before_the_third_step(build)
                if dist.get_rank() == 0:
                    failing.at, failing.calls = quarter * calls // 4, 0
                    with pytest.raises(ERRORS), failing:
                        optimizer.step()
                optimizer.step()
                for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                    assert_same(p, q, f"{name}, {quarter}")
                    for key, value in optimizer.state[p].items():
                        assert_same(value, other.state[q][key], f"{name}, {quarter}, {key}")


SCENARIOS: dict[int, list[Scenario]] = {
    4: [
        equals_the_unsharded_run,
        equals_the_unsharded_run_to_rounding,
        replicas_of_shards,
        columns_equal_the_unsharded_run,
        checkpoints_resume_to_the_bit,
        fused_equals_unfused,
    ],
    2: [
        equals_the_unsharded_run,
        equals_the_unsharded_run_to_rounding,
        what_is_not_finite_waits_everywhere,
        whole_blocks_are_exchanged_with_nobody,
        columns_equal_the_unsharded_run,
        tensor_parallel_layers_train,
        what_columns_cannot_be_is_refused,
        checkpoints_resume_to_the_bit,
        fused_equals_unfused,
        an_error_in_one_process,
    ],
    1: [equals_the_unsharded_run, checkpoints_resume_to_the_bit],
}


@given(st.integers(1, 60), st.integers(1, 600), st.integers(1, 9), st.sampled_from([128, 256]))
def test_blocks_are_divided_between_processes(
    rows: int, width: int, processes: int, block: int
) -> None:
    divided = row_spans(rows, width, processes)
    spans = block_spans(divided, block)
    covered = [i for start, stop in spans for i in range(start, stop)]
    assert covered == list(range(rows * width))
    for (start, stop), (before, _) in zip(spans, divided, strict=True):
        assert start % block == 0 or start == stop == rows * width
        # The elements that move to another process are those of less than a block, and one.
        assert abs(start - before) <= block
        # A code of a single element cannot tell its format.
        assert stop - start != 1 or rows * width == 1
    for unit in (2, block):
        entries = entry_spans(spans, unit)
        assert [i for start, stop in entries for i in range(start, stop)] == list(
            range(-(-rows * width // unit))
        )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(SCENARIOS, tmp_path_factory.mktemp("state"))


@scenario_cases(SCENARIOS)
def test_sharded(processes: int, scenario: Scenario, ran: Path) -> None:
    message = failure(scenario, processes, ran)
    assert message is None, message
