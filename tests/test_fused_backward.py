"""Updates during the backward pass equal those after it, and gradients do not outlive them."""

from __future__ import annotations

import copy
import gc
import math
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.utils.checkpoint import checkpoint

import zoopt
from tests.compare import equal, same
from tests.first_order_table import ROWS, Row, backward, batch, net
from tests.meter import LiveStorages


def by_name(name: str) -> Row:
    [row] = [row for row in ROWS if row.name == name]
    return row


def galore(model: nn.Module, **options: Any) -> zoopt.GaLoreAdamW:
    options = {"lr": 1e-2, "rank": 4, "seed": 7, **options}
    return zoopt.GaLoreAdamW(model.named_parameters(), **options)  # type: ignore[arg-type]


def micro_batches(model: nn.Module, parts: int) -> None:
    """Backward through a batch in parts, each with its share of the loss."""
    x, y = batch(next(model.parameters()).dtype)
    for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
        ((model(inputs) - targets).pow(2).mean() / parts).backward()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_equals_the_unfused_run_bit_for_bit(row: Row) -> None:
    """7 steps over a refresh, under a scheduler; the checkpoint in the middle is either's."""
    dtype = torch.bfloat16 if ROWS.index(row) % 3 == 0 else torch.float32
    models, states, rates = [], [], []
    for fused in (False, True):
        model = net(dtype)
        optimizer = row.build(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        handle = zoopt.fuse_backward(model, optimizer) if fused else None
        for step in range(7):
            backward(model)
            assert all((p.grad is None) == fused for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            scheduler.step()
            if step == 3:
                states.append(copy.deepcopy([model.state_dict(), optimizer.state_dict()]))
        models.append(model)
        rates.append(optimizer.param_groups[0]["lr"])
        if handle is not None:
            handle.remove()
    assert same(*models)
    assert rates[0] == rates[1] < row.options["lr"]
    assert equal(*states)


def test_resumes_exactly_fused_from_unfused_and_back() -> None:
    row = by_name("GaLoreAdamW warm")
    complete, _ = net(), None
    optimizer = row.build(complete)
    for _ in range(9):
        backward(complete)
        optimizer.step()
    for before, after in ((True, False), (False, True)):
        saved: Any = None
        for fused, steps in ((before, 4), (after, 5)):
            model = net()
            optimizer = row.build(model, seed=99)
            if saved is None:
                optimizer = row.build(model)
            handle = zoopt.fuse_backward(model, optimizer) if fused else None
            if saved is not None:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            for _ in range(steps):
                backward(model)
                optimizer.step()
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
            assert handle is None or optimizer._fusion is handle
        assert same(model, complete)


class Deep(nn.Module):
    """Matrices whose gradients outweigh everything else that a backward pass makes."""

    def __init__(self, depth: int = 8, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("build", [galore, lambda m: zoopt.AdamW(m.named_parameters(), seed=1)])
@pytest.mark.parametrize("fused", [False, True])
def test_one_gradient_is_alive_at_a_time(build: Callable[[nn.Module], Any], fused: bool) -> None:
    """The storages of gradients: those of the size of a weight that appear in backward, while
    they are some parameter's gradient."""
    model = Deep()
    optimizer = build(model)
    if fused:
        zoopt.fuse_backward(model, optimizer)
    x = torch.randn(1, 64)
    for _ in range(2):  # The second, with the state in place and no refresh, is measured.
        loss = model(x).sum()
        size = 64 * 64 * 4
        known = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
        with LiveStorages([loss, x, *known]) as meter:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Beside gradients: a few rows (of 64) of activations' gradients and, in GaLore, R and its
    # direction and factors, (64, 4) each.
    rest = 8 * 64 * 4 + 4 * 64 * 4 * 4
    if fused:
        assert size <= meter.above <= size + rest
    else:
        assert meter.above >= 8 * size


def test_a_gradient_dies_before_the_next_is_made() -> None:
    model = Deep(3)
    optimizer = zoopt.AdamW(model.named_parameters())
    seen: list[weakref.ref[Tensor]] = []
    for layer in model.layers:
        layer.weight.register_hook(  # type: ignore[union-attr]
            lambda grad: seen.append(weakref.ref(grad.untyped_storage())) or None  # type: ignore[func-returns-value, arg-type]
        )
    alive: list[int] = []
    zoopt.fuse_backward(model, optimizer)
    for layer in model.layers:
        layer.weight.register_post_accumulate_grad_hook(  # type: ignore[union-attr]
            lambda param: alive.append(param.grad is not None)
        )
    model(torch.randn(1, 64)).sum().backward()
    assert alive == [False] * 3


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, "global", "parameter"])
def test_accumulated_adamw_equals_torchs_clipping_of_torchs_sums(
    parts: int, clip: str | None
) -> None:
    """R is the gradient, so its sum and norm are torch's own: bit for bit."""
    models = []
    for fused in (False, True):
        model = net()
        optimizer = by_name("AdamW decay").build(model)
        if fused:
            options: Any = {"max_grad_norm": 0.1, "clip": clip} if clip else {}
            zoopt.fuse_backward(model, optimizer, accumulation_steps=parts, **options)
        for _ in range(4):
            micro_batches(model, parts)
            if not fused and clip == "global":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if not fused and clip == "parameter":
                for param in model.parameters():
                    nn.utils.clip_grad_norm_(param, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("clip", [None, "global", "parameter"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_accumulated_projections_are_those_of_the_sum(proj_type: str, clip: str | None) -> None:
    """One step in float64 under random bases, which do not depend on the gradients.

    Adam's first direction is R / (|R| + eps), here with eps 1: its derivative by R is at most 1.
    R sums products of a gradient and a basis over up to n = 96 terms, once of the whole and once
    of 4 parts: they differ by less than (n + 4) roundings of sum |G| |Q|, which Cauchy-Schwarz
    bounds by ||G|| ||Q||, and the gradients themselves by 64 roundings of sums over the batch.
    """
    steps = []
    for fused in (False, True):
        model = net(torch.float64)
        start = copy.deepcopy(model)
        optimizer = galore(
            model, projector="random", eps=1.0, lr=1.0, proj_type=proj_type, rank=8, scale=1.0
        )
        parts = 4 if fused else 1
        if fused:
            options: Any = {"max_grad_norm": 0.1, "clip": clip} if clip else {}
            zoopt.fuse_backward(model, optimizer, accumulation_steps=parts, **options)
        micro_batches(model, parts)
        if not fused:
            # By hand: with one basis a step, clipping R is clipping G by R's norm.
            reduced = {
                site.param: optimizer._reduce(site, site.param.grad) for site in optimizer._sites()
            }
            norms = {p: float(r.norm()) for p, r in reduced.items() if r is not None}
            total = math.sqrt(sum(norm**2 for norm in norms.values()))
            for param in model.parameters():
                norm = {"global": total, "parameter": norms[param], None: 0.0}[clip]
                param.grad.mul_(min(1.0, 0.1 / (norm + 1e-6)))
        optimizer.step()
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        steps.append([(p - q).detach() for p, q in pairs])
    start_loss = net(torch.float64)
    backward(start_loss)
    for first, second, param in zip(*steps, start_loss.parameters(), strict=True):
        assert param.grad is not None
        # Twice for what stands in the clip's norm; |Q| (down and up again) is below 8 here.
        tolerance = 2 * (96 + 4 + 64) * 2.0**-53 * 8.0**2 * (1.0 + float(param.grad.norm()))
        assert float((first - second).abs().max()) <= tolerance
        assert float(first.abs().max()) > 0


def test_micro_batches_share_the_basis_of_the_first() -> None:
    model, first = net(), net()
    optimizer, alone = galore(model, projector="svd"), galore(first, projector="svd")
    zoopt.fuse_backward(model, optimizer, accumulation_steps=2)
    x, y = batch()
    (model(x[:32]) - y[:32]).pow(2).mean().backward()
    (model(x[32:]) - y[32:]).pow(2).mean().backward()
    (first(x[:32]) - y[:32]).pow(2).mean().backward()
    optimizer.step()
    alone.step()
    for p, q in zip(model.parameters(), first.parameters(), strict=True):
        for name, basis in optimizer.bases(p).items():
            assert torch.equal(basis, alone.bases(q)[name])


def test_accumulation_keeps_projections_only() -> None:
    model = Deep(4, 96)
    optimizer = galore(model, projector="random", rank=2)
    zoopt.fuse_backward(model, optimizer, accumulation_steps=2)
    for _ in range(2):
        loss = model(torch.randn(1, 96)).sum()
        with LiveStorages([loss, *model.parameters()]) as meter:
            loss.backward()
        assert all(p.grad is None for p in model.parameters())
        # R of all matrices; one gradient; the random basis and its noise; rows of activations.
        assert meter.above <= (4 * 96 * 2 + 96 * 96 + 4 * 96 * 2 + 8 * 96) * 4 + 4 * 5 * 96 * 2
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 1 for p in model.parameters())


def test_tied_weights_are_updated_once_with_the_whole_gradient() -> None:
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        head.weight = embedding.weight
        model = nn.Sequential(embedding, nn.Linear(8, 8), nn.Tanh(), head)
        optimizer = zoopt.AdamW(model.named_parameters(), seed=1)
        if fused:
            zoopt.fuse_backward(model, optimizer)
        ids = torch.arange(12)
        for _ in range(3):
            nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert int(optimizer.state[embedding.weight]["step"]) == 3
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Deep(4, 16)
        optimizer = zoopt.AdamW(model.named_parameters(), seed=1)
        if fused:
            zoopt.fuse_backward(model, optimizer)
        for _ in range(3):
            x = torch.ones(2, 16, requires_grad=True)
            for layer in model.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            x.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_missing_frozen_unfrozen_and_foreign_parameters(accumulation_steps: int) -> None:
    models = []
    for fused in (False, True):
        model = net()
        model[7].bias.requires_grad_(False)
        named = [(n, p) for n, p in model.named_parameters() if n != "5.weight"]
        optimizer = zoopt.AdamW(named[:4], seed=1)
        if fused:
            zoopt.fuse_backward(model, optimizer, accumulation_steps=accumulation_steps)
        optimizer.add_param_group({"params": named[4:], "lr": 0.1})
        for step in range(5):
            if step == 1:
                optimizer.zero_grad()
            if step == 2:
                model[7].bias.requires_grad_(True)
            if step == 3:
                model[2].weight.requires_grad_(False)
            x, y = batch()
            (model(x) - y).square().mean().backward()
            assert model[5].weight.grad is not None
            model[5].weight.grad = None
            optimizer.step()
            optimizer.zero_grad()
        assert int(optimizer.state[model[7].bias]["step"]) == 3
        assert int(optimizer.state[model[2].weight]["step"]) == 3
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_experts_that_a_micro_batch_skips(accumulation_steps: int) -> None:
    """Each expert sees some of the micro-batches, as many as there are or fewer."""
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        optimizer = zoopt.AdamW(experts.named_parameters(), seed=1)
        if fused:
            zoopt.fuse_backward(experts, optimizer, accumulation_steps=accumulation_steps)
        for step in range(4):
            for i in range(accumulation_steps):
                experts[(step + i) % 2](torch.ones(2, 4) * (i + 1)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(experts)
    assert same(*models)


def test_step_hooks_run_once_and_gradients_put_in_place_by_hand_are_used() -> None:
    model, plain = net(), net()
    optimizer, other = zoopt.AdamW(model.parameters()), zoopt.AdamW(plain.parameters())
    events: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    optimizer.register_step_post_hook(lambda *_: events.append("after"))
    zoopt.fuse_backward(model, optimizer)
    for _ in range(2):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        other.step()
    assert events == ["before", "after"] * 2
    assert same(model, plain)


def test_zero_grad_drops_what_has_been_accumulated() -> None:
    model = net()
    optimizer = zoopt.AdamW(model.parameters())
    handle = zoopt.fuse_backward(model, optimizer, accumulation_steps=2)
    for drop in (optimizer.zero_grad, lambda: optimizer.load_state_dict(optimizer.state_dict())):
        backward(model)
        drop()
        optimizer.step()
        assert same(model, net())
    backward(model)
    handle.remove()
    optimizer.step()
    assert same(model, net())


def test_removal_gives_the_gradients_back() -> None:
    model = net()
    optimizer = zoopt.AdamW(model.parameters())
    with zoopt.fuse_backward(model, optimizer):
        backward(model)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    backward(model)
    assert all(p.grad is not None for p in model.parameters())
    assert all(int(s["step"]) == 1 for s in optimizer.state.values())
    optimizer.step(lambda: None)
    assert all(int(s["step"]) == 2 for s in optimizer.state.values())
    again = zoopt.fuse_backward(model, optimizer)
    again.remove()
    again.remove()
    twin = copy.deepcopy(optimizer)
    assert twin._fusion is None


def test_what_asks_for_state_counts_no_step() -> None:
    """What torch.distributed.checkpoint does; LoRA's first step under warm-up counts."""
    for steps in (1, 2):
        model = nn.Linear(4, 4)
        optimizer = zoopt.AdamW(model.parameters(), lr=0.0)
        zoopt.fuse_backward(model, optimizer, accumulation_steps=steps)
        _init_optim_state(optimizer)
        assert all(not value.any() for s in optimizer.state.values() for value in s.values())
        assert len(optimizer.state) == 2
        for _ in range(steps):
            (model(torch.ones(1, 4)).sum() * 0.0).backward()
        optimizer.step()
        assert all(int(s["step"]) == 1 for s in optimizer.state.values())


def test_a_gradient_that_is_not_finite_makes_no_basis() -> None:
    for steps in (1, 2):
        model = nn.Linear(8, 6, bias=False)
        start = copy.deepcopy(model)
        optimizer = galore(model)
        zoopt.fuse_backward(model, optimizer, accumulation_steps=steps)
        for i in range(steps):
            (model(torch.ones(1, 8)).sum() * (math.nan if i == 0 else 1.0)).backward()
        optimizer.step()
        assert same(model, start)
        for _ in range(steps):
            model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        assert not same(model, start)
        assert model.weight.isfinite().all()


def test_graphs_that_are_used_again_do_not_see_other_weights() -> None:
    model = Deep(2, 8)
    optimizer = zoopt.AdamW(model.parameters())
    zoopt.fuse_backward(model, optimizer)
    x = torch.ones(1, 8, requires_grad=True)
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize(
    "options", [{"accumulation_steps": 2}, {"max_grad_norm": 0.1, "clip": "global"}], ids=str
)
def test_graphs_are_valid_until_the_step_that_updates(options: dict[str, Any]) -> None:
    model = Deep(2, 8)
    optimizer = zoopt.AdamW(model.parameters())
    zoopt.fuse_backward(model, optimizer, **options)
    x = torch.ones(1, 8, requires_grad=True)
    losses = [model(x).sum() for _ in range(options.get("accumulation_steps", 1))]
    [before] = torch.autograd.grad(losses[0], x, retain_graph=True)
    for loss in losses:
        loss.backward(retain_graph=True, inputs=list(model.parameters()))
    for loss in losses:
        [after] = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(after, before)
    optimizer.step()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, retain_graph=True)


def test_refuses_bad_arguments() -> None:
    model = net()
    optimizer = zoopt.AdamW(model.parameters())
    for options, error, message in (
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be a positive int, got 0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be a finite number > 0, got 0.0"),
        ({"clip": "all"}, ValueError, "clip must be one of 'global', 'parameter', got 'all'"),
    ):
        with pytest.raises(error, match=message):
            zoopt.fuse_backward(model, optimizer, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a first-order optimizer of zoopt, got SGD"):
        zoopt.fuse_backward(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters of the model only, got 2, which is not one"):
        zoopt.fuse_backward(model[:2], optimizer)
    # Nothing has been hooked.
    backward(model)
    assert all(p.grad is not None for p in model.parameters())
    zoopt.fuse_backward(model, optimizer)
    with pytest.raises(ValueError, match="must not be fused yet"):
        zoopt.fuse_backward(model, optimizer)


def test_refuses_wrapped_models() -> None:
    class DistributedDataParallel(nn.Module):
        """Of the name that is looked for: the real one needs processes."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = net()
    optimizer = zoopt.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"DDP or FSDP, got DistributedDataParallel"):
        zoopt.fuse_backward(DistributedDataParallel(model), optimizer)


def test_refuses_what_needs_whole_gradients_where_none_are_kept() -> None:
    model = net()
    for cls in (zoopt.Fira, zoopt.Apollo):
        optimizer = cls(model.named_parameters(), rank=4)
        for options in ({"accumulation_steps": 2}, {"max_grad_norm": 1.0}):
            message = f"{cls.__name__} needs the whole gradient of parameter '0.weight'"
            with pytest.raises(ValueError, match=message):
                zoopt.fuse_backward(model, optimizer, **options)  # type: ignore[arg-type]
    backward(model)
    assert all(p.grad is not None for p in model.parameters())


def test_clips_whole_gradients_by_the_norms_of_their_projections() -> None:
    """In float64: R of a clipped gradient and a clipped R differ by some roundings, 1e-15."""
    models = []
    for fused in (False, True):
        model = net(torch.float64)
        optimizer = zoopt.Fira(model.named_parameters(), lr=1e-2, rank=8, seed=1, eps=1e-3)
        if fused:
            zoopt.fuse_backward(model, optimizer, max_grad_norm=0.05, clip="parameter")
        for _ in range(3):
            backward(model)
            for site in [] if fused else optimizer._sites():
                assert site.param.grad is not None
                reduced = optimizer._reduce(site, site.param.grad)
                assert reduced is not None
                site.param.grad.mul_(min(1.0, 0.05 / (float(reduced.norm()) + 1e-6)))
            optimizer.step()
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-10)


def a_run(row: Row, removed: bool) -> Iterator[list[weakref.ref[Any]]]:
    """The things of a fused run, whose names are gone, though the caller's frame is still there."""
    model = net()
    optimizer = row.build(model)
    handle = zoopt.fuse_backward(model, optimizer)
    if ROWS.index(row) % 2:
        backward(model)
        optimizer.step()
    watched: list[weakref.ref[Any]] = [weakref.ref(param) for param in model.parameters()]
    watched += [weakref.ref(thing) for thing in (model, optimizer, handle)]
    if removed:
        handle.remove()
    del model, optimizer, handle
    yield watched


@pytest.fixture
def _trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training loops are looked for among the callers where one has been imported."""
    module = types.ModuleType("transformers.trainer")
    module.Trainer = type("Trainer", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.trainer", module)


@pytest.mark.usefixtures("_trainer")
@pytest.mark.parametrize("removed", [False, True])
def test_lets_go_of_everything(removed: bool) -> None:
    """A hook that autograd holds must not hold the optimizer: Python's collector cannot see it."""
    runs = {str(row): a_run(row, removed) for row in ROWS}
    watched = {name: next(run) for name, run in runs.items()}
    gc.collect()
    alive = {name: sum(thing() is not None for thing in each) for name, each in watched.items()}
    assert alive == dict.fromkeys(runs, 0)


def taking_turns_left_alive() -> list[int]:
    """How many parameters are left alive, of OwLore's and half fine-tuning's models."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    x = torch.ones(2, 6)
    alive = []
    for build in (
        lambda model: zoopt.OwLore(model, calibration=[x], rank=2, num_layers=2),
        lambda model: zoopt.AdamW(model.parameters()),
    ):
        model = Blocks()
        optimizer: Any = build(model)
        half = None
        if isinstance(optimizer, zoopt.AdamW):
            half = zoopt.HalfFineTuning(model, optimizer, round_steps=1)
        zoopt.fuse_backward(model, optimizer)
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
        watched: list[weakref.ref[Any]] = [weakref.ref(param) for param in model.parameters()]
        del model, optimizer, half
        gc.collect()
        alive.append(sum(reference() is not None for reference in watched))
    return alive


@pytest.mark.usefixtures("_trainer")
def test_lets_go_of_models_whose_layers_take_turns() -> None:
    assert taking_turns_left_alive() == [0, 0]


def test_a_model_outlives_its_optimizer() -> None:
    """Nobody updates it then: gradients stay where they are."""
    model = net()
    optimizer = zoopt.AdamW(model.parameters())
    zoopt.fuse_backward(model, optimizer)
    del optimizer
    gc.collect()
    backward(model)
    assert all(p.grad is not None for p in model.parameters())
    assert same(model, net())


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_has_been_applied_cannot_be_thrown_away(row: Row) -> None:
    """The discriminator in its generator's step; a bad batch; SAM's second pass."""
    models = []
    for throws in (False, True):
        model = net()
        optimizer = row.build(model)
        with zoopt.fuse_backward(model, optimizer):
            backward(model)
            if throws:
                for _ in range(2):
                    with pytest.raises(RuntimeError, match=r"zero_grad\(\) must come after step"):
                        optimizer.zero_grad()
                with pytest.raises(RuntimeError, match="after 1 backward passes at most"):
                    backward(model)
                model.zero_grad()
                with pytest.raises(RuntimeError, match="after 1 backward passes at most"):
                    backward(model)
                model.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        models.append(model)
    assert same(*models)


def test_a_frozen_discriminator_is_left_alone() -> None:
    """What the message advises."""
    critic, generator = nn.Linear(4, 1), nn.Linear(2, 4)
    optimizer = zoopt.AdamW(critic.parameters())
    zoopt.fuse_backward(critic, optimizer)
    start = copy.deepcopy(critic)
    critic.requires_grad_(False)
    critic(generator(torch.ones(1, 2))).sum().backward()
    critic.requires_grad_(True)
    assert same(critic, start)
    assert generator.weight.grad is not None
    optimizer.zero_grad()
    critic(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not same(critic, start)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_closure_is_run_and_finished(row: Row) -> None:
    """As Lightning does: zero_grad and backward are in the closure that `step` is given."""
    models = []
    for fused in (False, True):
        model = net()
        optimizer = row.build(model)
        if fused:
            deferred = not any(map(optimizer._needs_gradient, optimizer._sites()))
            zoopt.fuse_backward(model, optimizer, accumulation_steps=1 + deferred)
        for _ in range(2):

            def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                assert torch.is_grad_enabled()
                return backward(model)

            with torch.no_grad():
                loss = optimizer.step(closure)
            assert float(loss) > 0
        models.append(model)
    assert same(*models)


def test_refuses_what_cannot_be_done_in_backward() -> None:
    model = net()
    optimizer = zoopt.AdamW(model.parameters())
    zoopt.fuse_backward(model, optimizer, accumulation_steps=2)
    micro_batches(model, 2)
    with pytest.raises(RuntimeError, match=r"after 2 backward passes at most .* got 3 that"):
        micro_batches(model, 1)
    optimizer.zero_grad()
    micro_batches(model, 2)
    optimizer.step()


def test_refuses_gradient_scalers() -> None:
    model = net()
    optimizer = zoopt.AdamW(model.parameters())
    handle = zoopt.fuse_backward(model, optimizer)
    for unscale in (False, True):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(batch()[0]).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="a GradScaler cannot drive a fused backward"):
            scaler.step(optimizer)
        optimizer.step()
    handle.remove()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batch()[0]).sum()).backward()
    scaler.step(optimizer)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    with zoopt.fuse_backward(model, optimizer):
        disabled.scale(model(batch()[0]).sum()).backward()
        disabled.step(optimizer)


@pytest.mark.parametrize("options", [{"accumulation_steps": 2}, {"max_grad_norm": 1.0}])
def test_refuses_sparse_gradients(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = zoopt.AdamW(embedding.parameters())
    zoopt.fuse_backward(embedding, optimizer)
    with pytest.raises(RuntimeError, match="AdamW needs dense gradients, got layout"):
        embedding(torch.arange(3)).sum().backward()
    # An optimizer that takes them.
    other = zoopt.AdamW(embedding.parameters())
    monkeypatch.setattr(type(other), "_check_gradient", lambda self, site: None)
    optimizer._fusion.remove()  # type: ignore[union-attr]
    embedding.weight.grad = None
    zoopt.fuse_backward(embedding, other, **options)
    with pytest.raises(RuntimeError, match="dense to be accumulated or clipped, got layout"):
        embedding(torch.arange(3)).sum().backward()
