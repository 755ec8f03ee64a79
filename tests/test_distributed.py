"""Parameters sharded over processes by FSDP2: the bits of the unsharded run."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import zoopt
from tests.first_order_table import ROWS, backward
from tests.first_order_table import net as network
from tests.processes import Scenario, failure, run_all, scenario_cases

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """5, 3 and 70 rows: of unequal shards, on four processes of empty ones too."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 70))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return model.to(dtype)


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) / 64 for p in model.parameters()]


def shard(value: Tensor, param: Any) -> Tensor:
    """The same in every process, sharded as the parameter is."""
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def go_on(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for param, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            if zoopt.distributed.sharding.is_sharded(param):
                gradient = shard(gradient, param)
            param.grad = gradient
        optimizer.step()


def whole(value: Any) -> Any:
    return value.full_tensor() if zoopt.distributed.sharding.is_sharded(value) else value


def assert_same(sharded: Any, plain: Any, what: str) -> None:
    sharded, plain = (whole(value).detach() for value in (sharded, plain))
    assert sharded.dtype == plain.dtype, what
    assert torch.equal(sharded.view(-1).view(torch.uint8), plain.view(-1).view(torch.uint8)), what


def assert_same_run(model: nn.Module, optimizer: Any, plain: nn.Module, other: Any) -> None:
    """Weights and state agree to the bit, and state lies where its parameter does."""
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_same(p, q, name)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert_same(value, other.state[q][key], f"{key} of {name}")
            if value.shape == p.shape and zoopt.distributed.sharding.is_sharded(p):
                assert value.placements == p.placements  # type: ignore[attr-defined]
                assert value.to_local().shape == p.to_local().shape  # type: ignore[attr-defined]


def adamw(model: nn.Module, **options: Any) -> zoopt.AdamW:
    return zoopt.AdamW(model.named_parameters(), **{"lr": 2.0**-6, "seed": 7, **options})  # type: ignore[arg-type]


VARIANTS: dict[str, Any] = {
    "float32": lambda m: adamw(m),
    "bfloat16 moments": lambda m: adamw(m, state_dtype="bfloat16"),
    "SM3": lambda m: zoopt.SM3(m.named_parameters(), momentum=0.5, seed=7),
    "SM3 averages": lambda m: zoopt.SM3(m.named_parameters(), beta=0.9, seed=7),
    "rank=None": lambda m: zoopt.GaLoreAdamW(
        m.named_parameters(), rank=None, seed=7, weight_decay=0.1, decay="after"
    ),
}


def equals_the_unsharded_run(folder: Path) -> None:
    """bfloat16 weights and moments are rounded stochastically, by their places in the whole."""
    for build in VARIANTS.values():
        for dtype in (torch.float32, torch.bfloat16):
            plain, model = net(dtype), fully_shard(net(dtype))
            optimizer, other = build(model), build(plain)
            go_on(model, optimizer, range(4))
            go_on(plain, other, range(4))
            assert_same_run(model, optimizer, plain, other)
            assert len(optimizer.state) == len(other.state)


def trains_by_backward(folder: Path) -> None:
    """Two equal gradients have an exact mean. Clipping, a schedule and accumulation on the way."""
    plain, model = net(), net()
    fully_shard(model[3])
    fully_shard(model)
    optimizer, other = adamw(model), adamw(plain)
    x = torch.linspace(-1.0, 1.0, 28).view(4, 7)
    losses = []
    for m, opt in ((model, optimizer), (plain, other)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8)
        for step in range(6):
            loss = m(x).square().mean()
            loss.backward()
            if step % 2:
                opt.step()
                opt.zero_grad()
                schedule.step()
            losses.append(loss.item())
    assert losses[:6] == losses[6:]
    assert losses[5] < losses[0]
    assert_same_run(model, optimizer, plain, other)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert whole(norm).isfinite()


class Layers(nn.Module):
    """Repeated layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [{"up": nn.Linear(5, 7), "act": nn.Tanh(), "down": nn.Linear(7, 5)} for _ in "123"]
        self.layers = nn.ModuleList(nn.Sequential(OrderedDict(own)) for own in parts)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        y: Tensor = self.head(x)
        return y


def halves_of_the_layers_train_in_turn(folder: Path) -> None:
    """Half fine-tuning chooses among whole parameters, wherever their parts lie."""
    models = Layers(), Layers()
    for layer in models[0].layers:
        fully_shard(layer)
    fully_shard(models[0])
    x = torch.linspace(-1.0, 1.0, 20).view(4, 5)
    optimizers = [adamw(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        half = zoopt.HalfFineTuning(model, optimizer, round_steps=1, seed=3)
        for _ in range(4):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        half.remove()
    assert_same_run(models[0], optimizers[0], models[1], optimizers[1])


def a_shard_of_zeros_counts_the_steps_of_the_others(folder: Path) -> None:
    model = fully_shard(nn.Linear(4, 8, bias=False))
    optimizer = adamw(model, lr=0.0)
    for rows, expected in ((0, 1), (2, 2)):
        gradient = torch.zeros(8, 4)
        gradient[:rows] = 1.0
        param = model.weight
        param.grad = shard(gradient, param)
        optimizer.step()
        assert int(optimizer.state[param]["step"]) == expected


def checkpoints_resume_to_the_bit(folder: Path) -> None:
    """Saved at step 3 by two processes; loaded by as many processes as there are."""
    plain = net(torch.bfloat16)
    other = adamw(plain, state_dtype="bfloat16")
    go_on(plain, other, range(3))
    path = folder / "checkpoint"
    if dist.get_world_size() == 2:
        model = fully_shard(net(torch.bfloat16))
        optimizer = adamw(model, state_dtype="bfloat16")
        go_on(model, optimizer, range(3))
        record = get_optimizer_state_dict(model, optimizer)
        dcp.save({"model": model.state_dict(), "optimizer": record}, checkpoint_id=path)
    again = fully_shard(net(torch.bfloat16))
    resumed = adamw(again, state_dtype="bfloat16", lr=0.5, seed=99)
    loaded = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, resumed)}
    dcp.load(loaded, checkpoint_id=path)
    again.load_state_dict(loaded["model"])
    set_optimizer_state_dict(again, resumed, loaded["optimizer"])
    assert resumed.param_groups[0]["lr"] == 2.0**-6
    assert_same_run(again, resumed, plain, other)
    go_on(again, resumed, range(3, 6))
    go_on(plain, other, range(3, 6))
    assert_same_run(again, resumed, plain, other)


def whole_state_dicts_go_in_and_out(folder: Path) -> None:
    """torch's full_state_dict; and the state_dict of an unsharded run, loaded as it is."""
    plain, model = net(), fully_shard(net())
    optimizer, other = adamw(model), adamw(plain)
    go_on(plain, other, range(2))
    optimizer.load_state_dict(other.state_dict())
    model_state = {
        n: shard(v, p)
        for (n, v), p in zip(plain.state_dict().items(), model.parameters(), strict=True)
    }
    model.load_state_dict(model_state)
    assert_same_run(model, optimizer, plain, other)
    go_on(model, optimizer, range(2, 4))
    go_on(plain, other, range(2, 4))
    assert_same_run(model, optimizer, plain, other)

    full = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    for name, param in plain.named_parameters():
        assert_same(full["state"][name]["exp_avg"], other.state[param]["exp_avg"], name)
    # torch makes state to load into only where there are no gradients.
    model.zero_grad()
    fresh = adamw(model, seed=99)
    set_optimizer_state_dict(model, fresh, full, options=StateDictOptions(full_state_dict=True))
    assert_same_run(model, fresh, plain, other)
    assert fresh.param_groups[0]["seed"] == 7


def galore(model: nn.Module, cls: Any = zoopt.GaLoreAdamW, **options: Any) -> Any:
    options = {"lr": 2.0**-6, "rank": 2, "update_proj_gap": 2, "scale": 1.0, "seed": 7, **options}
    return cls(model.named_parameters(), **options)


def projections_equal_the_unsharded_run_to_rounding(folder: Path) -> None:
    """In float64, where R sums its at most 70 terms in another order than one process does: 1e-14
    a step, which Adam divides by roots of second moments that are 1e-2 or more here."""
    for options in (
        {"projector": "warm"},
        {"projector": "svd", "proj_type": "reverse_std"},
        {"projector": "randomized", "proj_type": "full"},
        {"projector": "random", "stagger": False},
        {"projector": "gram", "proj_type": "left", "state_dtype": "int8"},
        {"cls": zoopt.QGaLoreAdamW, "state_dtype": "float32"},
        {"cls": zoopt.Apollo, "norm_growth_limit": None},
        {"cls": zoopt.Apollo, "projector": "svd"},
        {"cls": zoopt.ApolloMini, "rank": 1},
        {"cls": zoopt.Fira},
        {"cls": zoopt.Fira, "proj_type": "reverse_std", "norm_growth_limit": None},
    ):
        plain, model = net(torch.float64), fully_shard(net(torch.float64))
        optimizer, other = galore(model, **options), galore(plain, **options)
        go_on(model, optimizer, range(5))
        go_on(plain, other, range(5))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(p), q, rtol=0.0, atol=1e-10)
            for name, value in optimizer.state[p].items():
                expected = other.state[q][name]
                torch.testing.assert_close(whole(value), expected, rtol=0.0, atol=1e-10)
        large = optimizer.state[model[3].weight]["exp_avg"]
        sharded = options.get("proj_type", "std") == "std"  # 70 rows against 3
        assert zoopt.distributed.sharding.is_sharded(large) == sharded
    # A gradient with a NaN in the rows of one process makes no basis in any.
    first = net(torch.float64)
    for param in model.parameters():
        bad = torch.zeros(param.shape, dtype=param.dtype)
        bad.view(-1)[0] = torch.nan
        param.grad = shard(bad, param)
    model.load_state_dict(fully_shard(net(torch.float64)).state_dict())
    fresh = galore(model)
    fresh.step()
    for p, q in zip(model.parameters(), first.parameters(), strict=True):
        assert_same(p, q, "a weight") if p.dim() > 1 else None


def projected_moments_are_rounded_by_their_places_in_the_whole(folder: Path) -> None:
    """R of a row is the same up to rounding wherever the row lies, so that few moments round
    another way: with bits of other places half of them would."""
    plain, model = net(), fully_shard(net())
    optimizer, other = (galore(m, projector="svd", state_dtype="bfloat16") for m in (model, plain))
    go_on(model, optimizer, range(2))
    go_on(plain, other, range(2))
    moments = whole(optimizer.state[model[3].weight]["exp_avg"])
    same = moments == other.state[plain[3].weight]["exp_avg"]
    assert same.double().mean() > 0.95


def projections_resume_to_the_bit(folder: Path) -> None:
    for cls, state_dtype in (
        (zoopt.GaLoreAdamW, "float32"),
        (zoopt.GaLoreAdamW, "bfloat16"),
        (zoopt.Fira, "bfloat16"),
        (zoopt.Apollo, "float32"),
    ):
        model = fully_shard(net(torch.bfloat16))
        path = folder / f"{cls.__name__} {state_dtype}"
        optimizer = galore(model, cls, state_dtype=state_dtype)
        go_on(model, optimizer, range(3))
        record = get_optimizer_state_dict(model, optimizer)
        dcp.save({"model": model.state_dict(), "optimizer": record}, checkpoint_id=path)
        again = fully_shard(net(torch.bfloat16))
        resumed = galore(again, cls, state_dtype=state_dtype, lr=0.5, seed=99)
        loaded = {
            "model": again.state_dict(),
            "optimizer": get_optimizer_state_dict(again, resumed),
        }
        dcp.load(loaded, checkpoint_id=path)
        again.load_state_dict(loaded["model"])
        set_optimizer_state_dict(again, resumed, loaded["optimizer"])
        go_on(model, optimizer, range(3, 6))
        go_on(again, resumed, range(3, 6))
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert_same(p, whole(q), "a weight")
            for name, value in optimizer.state[p].items():
                assert_same(value, whole(resumed.state[q][name]), name)


def ddp_trains_as_with_torchs_adamw(folder: Path) -> None:
    """Each process has its own half of the batch; float32, some roundings of 1e-2 a step."""
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(3))
    own = x.chunk(2)[dist.get_rank()]
    runs = []
    for cls in (zoopt.AdamW, torch.optim.AdamW):
        model = nn.parallel.DistributedDataParallel(net())
        optimizer = cls(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(own).sin().square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        assert_same_everywhere([p.detach() for p in model.parameters()], cls.__name__)
        runs.append(list(model.parameters()))
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


def a_seed_a_rank_gives_equal_replicas(folder: Path) -> None:
    """As scripts do that call torch.manual_seed(1337 + rank): what is drawn is rank 0's.

    bfloat16 weights and coded moments are rounded by it, bases and columns are drawn from it.
    """
    for row in ROWS:
        torch.manual_seed(1337 + dist.get_rank())
        model = network(torch.bfloat16)
        optimizer = row.build(model, seed=None)
        assert optimizer.param_groups[0]["seed"] == 1337
        for _ in range(2):
            backward(model)
            optimizer.step()
        assert_same_everywhere([p.detach() for p in model.parameters()], row.name)


def a_seed_a_rank_gives_one_basis(folder: Path) -> None:
    for cls in (zoopt.Apollo, zoopt.Fira, zoopt.GaLoreAdamW):
        torch.manual_seed(1337 + dist.get_rank())
        model = fully_shard(net())
        projector = "warm" if cls is zoopt.Fira else "random"
        optimizer = galore(model, cls, seed=None, projector=projector)
        go_on(model, optimizer, range(2))
        for param in model.parameters():
            if param.dim() > 1:
                assert_same_everywhere(list(optimizer.bases(param).values()), cls.__name__)


def a_seed_a_rank_gives_one_model_and_one_half(folder: Path) -> None:
    torch.manual_seed(1337 + dist.get_rank())
    layers = [
        zoopt.nn.SLTrainLinear(8, 8, rank=2, density=0.25),
        zoopt.nn.GradNormLinear(torch.ones(8, 8), None, rank=2),
    ]
    assert_same_everywhere([p.detach() for m in layers for p in m.parameters()], "a layer")
    assert_same_everywhere([b for m in layers for b in m.buffers()], "a support")
    blocks = nn.Sequential(nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)] * 4) for _ in range(4)))
    optimizer = torch.optim.SGD(blocks.parameters(), lr=0.1)
    half = zoopt.HalfFineTuning(blocks, optimizer, round_steps=1)
    assert optimizer.param_groups[0]["hft_seed"] == 1337
    half.remove()


def seeds_that_differ_are_refused(folder: Path) -> None:
    """By the process that comes second; or at the next step, after a checkpoint."""
    refused = False
    try:
        adamw(net(), seed=dist.get_rank())
    except ValueError as error:
        assert "seed must be the same in all processes" in str(error)  # noqa: PT017
        refused = True
    [first, second] = everywhere(torch.tensor(refused))
    assert bool(first) != bool(second)


def everywhere(value: Tensor) -> list[Tensor]:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return values


def assert_same_everywhere(values: list[Tensor], what: str) -> None:
    for value in values:
        first, *others = everywhere(value)
        assert all(torch.equal(first, other) for other in others), what


def refuses(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def refuses_what_has_no_shards(folder: Path) -> None:
    model = fully_shard(nn.Linear(64, 80))
    named = list(model.named_parameters())
    rest = r"must have whole parameters .* got 'weight', which is sharded; use one of Apollo, "
    experts = [{"params": named[:1], "rank": 2, "matrices": 4}]
    refuses(lambda: zoopt.GaLoreAdamW(experts), "GaLoreAdamW " + rest)
    owlore = functools.partial(zoopt.OwLore, model, calibration=[torch.ones(1, 64)], rank=2)
    refuses(owlore, "OwLore must have whole parameters, got 'weight', which is sharded; use GaLore")
    plain = net()
    replicated = nn.parallel.DistributedDataParallel(plain)
    refuses(lambda: zoopt.fuse_backward(replicated, adamw(plain)), "got DistributedDataParallel")
    wrapped_later = net()
    optimizer = adamw(wrapped_later)
    zoopt.fuse_backward(wrapped_later, optimizer)
    replicated = nn.parallel.DistributedDataParallel(wrapped_later)
    refuses(lambda: replicated(torch.ones(1, 7)), "got DistributedDataParallel")


SCENARIOS: dict[int, list[Scenario]] = {
    2: [
        equals_the_unsharded_run,
        trains_by_backward,
        halves_of_the_layers_train_in_turn,
        a_shard_of_zeros_counts_the_steps_of_the_others,
        checkpoints_resume_to_the_bit,
        whole_state_dicts_go_in_and_out,
        projections_equal_the_unsharded_run_to_rounding,
        projected_moments_are_rounded_by_their_places_in_the_whole,
        projections_resume_to_the_bit,
        refuses_what_has_no_shards,
        ddp_trains_as_with_torchs_adamw,
        a_seed_a_rank_gives_equal_replicas,
        a_seed_a_rank_gives_one_basis,
        a_seed_a_rank_gives_one_model_and_one_half,
        seeds_that_differ_are_refused,
    ],
    4: [
        equals_the_unsharded_run,
        checkpoints_resume_to_the_bit,
        projections_equal_the_unsharded_run_to_rounding,
    ],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(SCENARIOS, tmp_path_factory.mktemp("distributed"))


@scenario_cases(SCENARIOS)
def test_sharded(processes: int, scenario: Scenario, ran: Path) -> None:
    message = failure(scenario, processes, ran)
    assert message is None, message


@pytest.mark.filterwarnings("ignore:.*process group.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
def test_one_process_loads_what_two_saved(ran: Path) -> None:
    plain, model = net(torch.bfloat16), net(torch.bfloat16)
    other, optimizer = (adamw(m, state_dtype="bfloat16") for m in (plain, model))
    go_on(plain, other, range(3))
    loaded = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(loaded, checkpoint_id=ran / "checkpoint")
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(loaded["optimizer"]))
    assert_same_run(model, optimizer, plain, other)
