"""Gradients that a fused backward pass gathers, as on a GPU: a layer's are applied together."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoopt
from tests.compare import equal, same
from tests.device_cases import CLASSES
from tests.first_order_table import ROWS, Row, backward, batch, net
from tests.meter import LiveStorages
from zoopt.first_order import fusion, gathering
from zoopt.first_order.projected import core


@pytest.fixture(autouse=True)
def gathers() -> Iterator[None]:
    """CPU tensors are gathered too."""
    # A Mock would keep the parameters that it is called with.
    with mock.patch.object(fusion, "launches", new=_yes):
        yield


def _yes(param: Tensor) -> bool:
    return True


@contextlib.contextmanager
def on_a_gpu(together: bool) -> Iterator[None]:
    """Parameters, matrices too, are updated together, or one by one."""

    def launches(param: Tensor) -> bool:
        return together

    # A Mock would keep the parameters that it is called with.
    with (
        mock.patch.object(fusion, "launches", new=launches),
        mock.patch.object(core, "launches", new=launches),
    ):
        yield


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.inner:
            x = torch.tanh(linear(x))
        out: Tensor = self.norm(x)
        return out


class Blocks(nn.Module):
    def __init__(self, depth: int = 3, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


X = torch.linspace(-1.0, 1.0, 4 * 32).view(4, 32)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients are applied at a time."""
    found: list[int] = []
    take = fusion.FusedBackward._take_layer

    def counted(self: Any, sites: Any, gradients: Any) -> None:
        found.append(len(sites))
        take(self, sites, gradients)

    monkeypatch.setattr(fusion.FusedBackward, "_take_layer", counted)
    return found


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_equals_the_unfused_run_bit_for_bit(row: Row) -> None:
    dtype = torch.bfloat16 if ROWS.index(row) % 2 else torch.float32
    models, states = [], []
    for fused in (False, True):
        model = net(dtype)
        optimizer = row.build(model)
        if fused:
            zoopt.fuse_backward(model, optimizer)
        for _ in range(3):
            backward(model)
            assert all((param.grad is None) == fused for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
        states.append(optimizer.state_dict())
    assert same(*models)
    assert equal(*states)


def test_a_layer_is_applied_at_once(counts: list[int]) -> None:
    """A member of the outermost list, whatever is inside it; other modules by themselves."""
    model = Blocks()
    optimizer = zoopt.AdamW(model.named_parameters(), seed=1)
    zoopt.fuse_backward(model, optimizer)
    model(X).backward()
    assert counts == [6, 6, 6, 2]
    assert all(param.grad is None for param in model.parameters())
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())
    optimizer.step()
    assert counts == [6, 6, 6, 2]


def test_no_more_bytes_are_gathered_than_allowed(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "MOST", 32 * 32 * 4 + 1)
    model = Blocks(1)
    optimizer = zoopt.AdamW(model.named_parameters(), seed=1)
    zoopt.fuse_backward(model, optimizer)
    model(X).backward()
    # The norm's and the last linear layer's, then the first one's: together one layer.
    assert counts == [4, 2, 2]


@pytest.mark.parametrize("cls", [zoopt.AdamW, zoopt.GaLoreAdamW])
def test_one_layer_of_gradients_is_alive_at_a_time(cls: Any) -> None:
    model, width = Blocks(5, 64), 64
    x = torch.ones(1, width)
    optimizer = cls(model.named_parameters(), seed=1)
    zoopt.fuse_backward(model, optimizer)
    for _ in range(2):
        loss = model(x)
        known = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
        with LiveStorages([loss, x, *known]) as meter:
            loss.backward()
        optimizer.step()
    layer = 4 * sum(param.numel() for param in model.layers[0].parameters())
    rest = 32 * width * 4 + 2 * layer * (cls is zoopt.GaLoreAdamW)  # R, the direction, factors
    # The next layer's first gradient has been made when this one's are applied.
    assert layer <= meter.above <= layer + width * width * 4 + rest
    assert meter.above < 5 * layer


def test_a_pass_that_fails_leaves_what_has_arrived_to_the_step() -> None:
    """As it does where each gradient is applied at once."""
    models = []
    for fused in (False, True):
        model = Blocks()
        optimizer = zoopt.AdamW(model.named_parameters(), seed=1)
        failing = list(model.layers[1].parameters())
        if fused:
            zoopt.fuse_backward(model, optimizer)

        def fail(grad: Tensor) -> None:
            raise ArithmeticError("an error in a backward pass")

        handle = failing[1].register_hook(fail)
        with pytest.raises(ArithmeticError):
            model(X).backward()
        handle.remove()
        if fused:
            with pytest.raises(RuntimeError, match=r"zero_grad\(\) must come after step"):
                optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        model(X).backward()
        optimizer.step()
        models.append(model)
    assert same(*models)


def test_an_update_that_fails_is_tried_again_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that cannot be applied stay in `.grad`, and can be dropped there."""
    right = zoopt.GaLoreAdamW._prepare
    broken = True

    def prepare(self: Any, site: Any, gradient: Tensor) -> bool:
        if broken and site.name == "layers.1.inner.0.weight":
            raise ArithmeticError("no basis")
        return right(self, site, gradient)

    models = []
    for fused in (False, True):
        model = Blocks()
        optimizer = zoopt.GaLoreAdamW(model.named_parameters(), seed=1, rank=4)
        if not fused:
            model(X).backward()
            optimizer.step()
        else:
            zoopt.fuse_backward(model, optimizer)
            monkeypatch.setattr(zoopt.GaLoreAdamW, "_prepare", prepare)
            with pytest.raises(ArithmeticError):
                model(X).backward()
            done = [
                name
                for name, p in model.named_parameters()
                if int(optimizer.state[p].get("step", 0))
            ]
            assert done
            assert all(name.startswith("layers.2") for name in done)
            broken = False
            optimizer.step()
        models.append(model)
    # What the pass had not reached has no gradient; layer 1 has been applied by the step.
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    for (name, a), b in pairs:
        if name.startswith(("layers.2", "layers.1")):
            assert torch.equal(a, b), name
    broken = True
    with pytest.raises(ArithmeticError):
        models[1](X).backward()
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert [n for n, p in models[1].named_parameters() if p.grad is not None] == [
        name for name, _ in models[1].named_parameters() if name.startswith("layers.1")
    ]
    models[1].zero_grad()
    optimizer.step()
    broken = False
    models[1](X).backward()
    optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    models = []
    for fused in (False, True):
        model = Blocks()
        optimizer = zoopt.AdamW(model.named_parameters(), seed=1)
        if fused:
            zoopt.fuse_backward(model, optimizer)
        for _ in range(2):
            x = model.first(X.clone().requires_grad_())
            for layer in model.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            x.square().sum().backward()
            assert all((param.grad is None) == fused for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("cls", [zoopt.AdamW, zoopt.SM3, zoopt.GaLoreAdamW, zoopt.LDAdamW])
def test_sums_and_clips_as_one_by_one(cls: Any) -> None:
    models = []
    for together in (False, True):
        model = Blocks()
        optimizer = cls(model.named_parameters(), seed=1, lr=1e-2)
        zoopt.fuse_backward(model, optimizer, accumulation_steps=2, max_grad_norm=0.05)
        with mock.patch.object(fusion, "launches", new=lambda param, own=together: own):
            for _ in range(3):
                for _ in range(2):
                    model(X).backward()
                    assert all(param.grad is None for param in model.parameters())
                optimizer.step()
        models.append(model)
    assert same(*models)


#: What becomes of gradients before they are applied.
CHANGES: list[dict[str, Any]] = [
    {"max_grad_norm": 0.05, "clip": "parameter"},
    {"accumulation_steps": 2},
    {"accumulation_steps": 2, "max_grad_norm": 0.05, "clip": "parameter"},
    {"accumulation_steps": 2, "max_grad_norm": 0.05},
]
NEED_GRADIENTS = (zoopt.Apollo, zoopt.ApolloMini, zoopt.Fira, zoopt.Frugal)


@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_a_layer_is_summed_and_clipped_as_one_by_one(row: Row) -> None:
    """Bit for bit, with the state, over a step that makes new bases."""
    for number, changes in enumerate(CHANGES):
        if number and row.cls in NEED_GRADIENTS:
            break
        dtype = torch.bfloat16 if number % 2 else torch.float32
        models, states = [], []
        for together in (False, True):
            model = net(dtype)
            optimizer = row.build(model)
            zoopt.fuse_backward(model, optimizer, **changes)
            with on_a_gpu(together):
                for _ in range(3):
                    for part in range(changes.get("accumulation_steps", 1)):
                        x, y = batch(dtype)
                        (model(x[part::2]) - y[part::2]).double().pow(2).mean().backward()
                        assert all(param.grad is None for param in model.parameters())
                    optimizer.step()
            models.append(model)
            states.append(optimizer.state_dict())
        assert same(*models)
        assert equal(*states)


@pytest.mark.parametrize("place", ["_reduce_together", "_foreach_add_"])
def test_summing_that_fails_is_tried_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last layer of the second pass: before anything of it is summed, or between the sums
    of two kinds of parameters."""
    models = []
    monkeypatch.setattr(core, "launches", _yes)
    for fails in (False, True):
        model = Blocks()
        optimizer = zoopt.GaLoreAdamW(model.named_parameters(), seed=1, rank=4)
        zoopt.fuse_backward(model, optimizer, accumulation_steps=2, max_grad_norm=0.05)
        model(X).backward()
        loss, owner = model(X), zoopt.GaLoreAdamW if place == "_reduce_together" else torch
        right, calls = getattr(owner, place), [0]

        def failing(*args: Any, right: Any = right, calls: list[int] = calls) -> Any:
            calls[0] += 1
            # Each of the four layers has matrices and vectors.
            if calls[0] == (7 if place == "_reduce_together" else 8):
                raise torch.OutOfMemoryError("in a sum")
            return right(*args)

        if fails:
            with monkeypatch.context() as change:
                change.setattr(owner, place, failing)
                with pytest.raises(torch.OutOfMemoryError):
                    loss.backward()
        else:
            loss.backward()
        optimizer.step()
        models.append(model)
    assert same(*models)


def test_a_pass_has_one_callback_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was one a parameter, of which all but the first did nothing."""
    engine, queued = torch.autograd.Variable._execution_engine, []

    class Engine:
        def queue_callback(self, callback: Any) -> None:
            queued.append(callback)
            engine.queue_callback(callback)

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

    monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", Engine())
    model = Blocks()
    optimizer = zoopt.AdamW(model.named_parameters(), seed=1)
    zoopt.fuse_backward(model, optimizer)
    for step in range(1, 4):
        model(X).backward()
        optimizer.step()
        assert len(queued) == step


def test_a_closure_and_gradients_by_hand() -> None:
    models = []
    for fused in (False, True):
        model = Blocks()
        optimizer = zoopt.AdamW(model.named_parameters(), seed=1)
        if fused:
            zoopt.fuse_backward(model, optimizer)

        def closure(model: Blocks = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(X)
            loss.backward()
            return loss.detach()

        assert float(optimizer.step(closure)) > 0
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("fails", [False, True])
def test_lets_go_of_everything(fails: bool) -> None:
    model = Blocks()
    optimizer = zoopt.AdamW(model.named_parameters())
    handle = zoopt.fuse_backward(model, optimizer)
    model(X).backward()
    optimizer.step()
    loss = model(X)
    if fails:
        hook = model.first.weight.register_hook(lambda grad: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        hook.remove()
    watched: list[weakref.ref[Any]] = [weakref.ref(param) for param in model.parameters()]
    watched += [weakref.ref(thing) for thing in (model, optimizer, handle)]
    del model, optimizer, handle, loss
    gc.collect()
    assert sum(reference() is not None for reference in watched) == 0


def test_loading_drops_what_waits() -> None:
    model = Blocks()
    optimizer = zoopt.AdamW(model.named_parameters())
    zoopt.fuse_backward(model, optimizer)
    model(X).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    handle = model.first.weight.register_hook(lambda grad: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        model(X).backward()
    handle.remove()
    before = copy.deepcopy(model)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert same(model, before)
