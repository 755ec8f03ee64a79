"""Steps that an error or a signal ends anywhere: each parameter is updated with its state, or not,
and the step goes on where it was."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zoopt
from tests.first_order_table import ROWS, Row
from tests.test_state_contract import bits
from zoopt import interrupts
from zoopt.distributed.sharding import local
from zoopt.first_order import fusion
from zoopt.first_order.fusion import FusedBackward
from zoopt.first_order.projected import core
from zoopt.first_order.projected.core import ProjectedOptimizer
from zoopt.first_order.site import Site
from zoopt.interrupts import uninterrupted
from zoopt.kernels.adam import reference as adam_reference
from zoopt.kernels.product import reference as product_reference
from zoopt.kernels.runtime import threads

CHOICES = (
    *("projector", "queue_size", "state_dtype", "rule"),
    *("growth", "relative_step", "momentum"),
)
#: One of each class, and of each way to make a basis, to store moments, and to step.
CHOSEN = list(
    {
        (row.cls, *(row.options.get(name) for name in CHOICES)): row for row in reversed(ROWS)
    }.values()
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ERRORS = (torch.OutOfMemoryError, KeyboardInterrupt, MemoryError)
#: Of the operations of a step, one in so many fails in turn, another for each row and dtype.
STRIDE = int(os.environ.get("ZOOPT_TEST_STRIDE", "23"))


class Failing(TorchDispatchMode):
    """Lets the operation number `at` fail, counted from 1, before it does anything; 0: none. Those
    of torch count, and kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0) -> None:
        super().__init__()
        self.at, self.calls = at, 0
        run = threads.run
        monkeypatch.setattr(threads, "run", lambda *args: self._called() or run(*args))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        if func.namespace != "profiler":
            self._called()
        return func(*args, **(kwargs or {}))

    def _called(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise ERRORS[self.at % 3]


class Case:
    """Parameters of all shapes and layouts, before a step at which all bases are due.

    Attributes:
        lazy: whether these agree with the last ones, so that the next ones are due later.
    """

    def __init__(self, row: Row, dtype: torch.dtype, *, sharded: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        shapes = [(7,), (96, 60)] if sharded else [(96, 60), (30, 40), (7,), (2, 12, 20)]
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        if not sharded:
            weights[1] = weights[1].t()
        params = [nn.Parameter(weight) for weight in weights]
        if sharded:
            mesh = init_device_mesh("cpu", (1,))
            params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
        groups: list[dict[str, Any]] = [{"params": [(f"w{i}", p) for i, p in enumerate(params)]}]
        if not sharded and issubclass(row.cls, ProjectedOptimizer) and row.cls is not zoopt.AdamW:
            groups = [{"params": groups[0]["params"][:3]}, {"params": groups[0]["params"][3:]}]
            groups[1]["matrices"] = 2
        options = {**row.options}
        cls: Any = row.cls
        optimizer = cls(groups, **options)
        if "stagger" in optimizer.defaults:
            optimizer = cls(groups, **{**options, "stagger": False})
        self._pair, self.gradients = (params, optimizer), list[Tensor]()
        self.lazy = "queue_size" in options
        # SparseDelta changes its entries in step number `update_gap`, counted from 1.
        completed = row.options.get("update_proj_gap", row.options.get("update_gap", 4) - 1)
        for step in range(completed + 1):
            if step:
                optimizer.step()
            if not step or not self.lazy:
                normals = (torch.randn(p.shape, generator=generator) for p in weights)
                self.gradients = [normal.to(dtype) for normal in normals]
            set_gradients(params, self.gradients)
        if isinstance(optimizer, ProjectedOptimizer):
            with optimizer._apart(list(optimizer._sites())) as sites:
                assert all(is_due(optimizer, site) for site in sites)

    def new(self) -> tuple[list[nn.Parameter], Any]:
        params, optimizer = copy.deepcopy(self._pair)
        set_gradients(params, self.gradients)
        return params, optimizer


def is_due(optimizer: ProjectedOptimizer, site: Site) -> bool:
    """Whether the next step makes the parameter's bases, where it has any that serve for more than
    one step."""
    geo = optimizer._geometry(site.param, site.group)
    lasts = geo is not None and "update_proj_gap" in site.group
    return not lasts or optimizer._refresh_due(site, optimizer.state[site.param])


def set_gradients(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(gradient, param.device_mesh, param.placements)  # type: ignore[assignment]


def everything(params: list[nn.Parameter], optimizer: Any) -> list[Any]:
    """Of each parameter, and each matrix of a stack, weights and state."""
    each: list[Any] = []
    for param in params:
        state = {name: local(value) for name, value in optimizer.state.get(param, {}).items()}
        own = local(param.detach())
        if "matrices" in optimizer.param_groups[-1] and param is params[-1]:  # a stack
            parts = [(own[i], {k: v[i] for k, v in state.items()}) for i in range(len(own))]
        else:
            parts = [(own, state)]
        each += [(bits(weights), bits(kept)) for weights, kept in parts]
    return each


def without_bases(each: list[Any]) -> list[Any]:
    """What was made for the step that follows may be there before it."""
    own = ("basis", "agreements", "doublings")
    return [
        (weights, {name: value for name, value in state.items() if not name.startswith(own)})
        for weights, state in each
    ]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three for the largest matrix."""
    monkeypatch.setattr(product_reference, "CHUNK", 2048)
    monkeypatch.setattr(adam_reference, "CHUNK", 2048)


def positions(calls: int, salt: int) -> list[int]:
    """Some, and the last two, where all has been written but the count of the step."""
    return sorted({*range(1 + salt % STRIDE, calls + 1, STRIDE), calls - 1, calls})


def check(case: Case, monkeypatch: pytest.MonkeyPatch, salt: int) -> None:
    """A step in which each operation in turn fails."""
    failing = Failing(monkeypatch)
    params, optimizer = case.new()
    before = everything(params, optimizer)
    with failing:
        optimizer.step()
    after = everything(params, optimizer)
    if case.lazy:
        states = [state for state in optimizer.state.values() if "doublings" in state]
        assert {int(local(state["doublings"]).max()) for state in states} == {1}
    assert failing.calls > 5
    for at in positions(failing.calls, salt):
        failing.at, failing.calls = at, 0
        params, optimizer = case.new()
        with pytest.raises(ERRORS), failing:
            optimizer.step()
        if at % 2:
            # Whoever looks at the state finds parameters updated, or not.
            optimizer.state_dict()
            now = everything(params, optimizer)
            wholes = zip(*map(without_bases, (before, now, after)), strict=True)
            assert all(own in (old, new) for old, own, new in wholes), at
        optimizer.step()
        assert everything(params, optimizer) == after, at


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", CHOSEN, ids=str)
def test_an_error_in_any_operation(
    row: Row, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(Case(row, dtype), monkeypatch, CHOSEN.index(row) * 7 + DTYPES.index(dtype))


@pytest.fixture(scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process, in which parameters can be sharded."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


#: Of all that step shards, the ways in which they differ.
SHARDED = (
    *("SM3", "AdamW", "AdamW int8", "GaLoreAdamW warm", "QGaLoreAdamW gram", "QGaLoreAdamW lazy"),
    *("Apollo", "Fira svd", "LDAdamW", "LDAdamW int8", "Frugal", "GaLoreAdafactor"),
    "GaLoreAdafactor int8",
)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("row", [row for row in CHOSEN if str(row) in SHARDED], ids=str)
def test_an_error_in_any_operation_on_a_shard(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case(row, torch.float32, sharded=True), monkeypatch, CHOSEN.index(row))


#: How gradients are accumulated and clipped, and over how many backward passes; or whether
#: parameters are updated together, as on a GPU.
FUSED: dict[str, dict[str, Any]] = {
    "at once": {},
    "gathered": {},
    "clipped": {"max_grad_norm": 0.5, "clip": "parameter"},
    "accumulated": {"accumulation_steps": 2, "max_grad_norm": 0.5},
    "accumulated, together": {"accumulation_steps": 2, "max_grad_norm": 0.5},
}


#: They need whole gradients.
WHOLE = (zoopt.Apollo, zoopt.ApolloMini, zoopt.Fira, zoopt.Frugal)


class Fused:
    """A step whose updates come as gradients arrive, of one parameter after the other, or of all
    together."""

    def __init__(self, case: Case, way: str) -> None:
        options, self._together = FUSED[way], way == "gathered"
        self.params, self.optimizer = case.new()
        for param in self.params:
            param.grad = None
        self._gradients, self._rounds = case.gradients, options.get("accumulation_steps", 1)
        model = nn.ParameterList(self.params)
        self.fusion = zoopt.fuse_backward(model, self.optimizer, **options)

    def run(self) -> bool:
        """Whether an error came, after which the loop went on."""
        failed = False
        for _ in range(self._rounds):
            pairs = zip(self.params, self._gradients, strict=True)
            losses = [(param * gradient).sum() for param, gradient in pairs]
            if self._together:  # but for the stack's, which is updated when it arrives
                losses = [torch.stack(losses[:-1]).sum(), losses[-1]]
            for loss in losses:
                try:
                    loss.backward()
                except ERRORS:
                    failed = True
        try:
            self.optimizer.step()
        except ERRORS:
            self.optimizer.step()
            failed = True
        return failed


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("row", list({row.cls: row for row in CHOSEN}.values()), ids=str)
def test_an_error_in_any_operation_of_a_fused_backward(
    row: Row, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(row, torch.float32)
    if way.startswith("accumulated") and row.cls in WHOLE:
        way = "clipped"
    failing = Failing(monkeypatch)
    if way in ("gathered", "accumulated, together"):
        for module in (fusion, core):
            monkeypatch.setattr(module, "launches", lambda param: True)
    for name in ("_apply_layer" if way == "gathered" else "_receive", "step"):
        original = getattr(FusedBackward, name)

        def among_ours(self: Any, *args: Any, run: Callable[..., Any] = original) -> Any:
            with failing:
                return run(self, *args)

        monkeypatch.setattr(FusedBackward, name, among_ours)
    fused = Fused(case, way)
    assert not fused.run()
    after = everything(fused.params, fused.optimizer)
    for at in positions(failing.calls, CHOSEN.index(row) + list(FUSED).index(way)):
        failing.at, failing.calls = at, 0
        fused = Fused(case, way)
        assert fused.run()
        assert everything(fused.params, fused.optimizer) == after, at


@pytest.fixture
def _raised_signals() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PACKAGE = str(Path(zoopt.__file__).parent)


@pytest.mark.usefixtures("_raised_signals")
@pytest.mark.parametrize("row", list({row.cls: row for row in CHOSEN}.values()), ids=str)
def test_ctrl_c_at_any_line(row: Row) -> None:
    """Of the package, during a step: each 331st."""
    case = Case(row, torch.float32)
    params, optimizer = case.new()
    optimizer.step()
    after, last = everything(params, optimizer), False
    for position in range(1 + CHOSEN.index(row), 10**6, 331):
        params, optimizer = case.new()
        seen = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal seen
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                seen += 1
                if seen == position:  # noqa: B023
                    signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            optimizer.step()
            last = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if everything(params, optimizer) != after:
            optimizer.step()
        assert everything(params, optimizer) == after, position
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if last:
            break
    assert position > 331


class Terminated(BaseException):
    """What the handler of SIGTERM raises."""


@pytest.fixture
def came() -> Iterator[list[int]]:
    """The signals whose handlers have been called; those of SIGINT and SIGTERM raise."""
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if number != signal.SIGUSR1:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, handle) for number in numbers]
    yield came
    now = [signal.signal(number, handler) for number, handler in zip(numbers, before, strict=True)]
    assert now == [handle] * 3
    assert not uninterrupted._waiting


def test_signals_that_waited_are_delivered_though_a_handler_raises(came: list[int]) -> None:
    sent = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]

    def wait() -> None:
        with uninterrupted():
            for number in sent:
                signal.raise_signal(number)
            assert not came

    with pytest.raises(Terminated):
        wait()
    assert came == sent


def test_a_handler_that_raises_at_any_line_of_the_wait(came: list[int]) -> None:
    """Signals have their handlers back, and those that waited are delivered."""
    handler = signal.getsignal(signal.SIGINT)
    case = Case(next(row for row in CHOSEN if row.cls is zoopt.GaLoreAdamW), torch.float32)
    params, optimizer = case.new()
    optimizer.step()
    after = everything(params, optimizer)

    def wait(sent: list[int]) -> None:
        with uninterrupted():
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGINT):
                sent.append(number)
                signal.raise_signal(number)

    def step(sent: list[int]) -> None:
        optimizer.step()

    for run in (wait, step):
        for position in range(1, 1000):
            params, optimizer = case.new()
            sent, seen = list[int](), 0
            came.clear()

            def trace(frame: Any, event: str, arg: Any) -> Any:
                nonlocal seen
                if frame.f_code.co_filename != interrupts.__file__:
                    return None
                if event == "line":
                    seen += 1
                    if seen == position:  # noqa: B023
                        sent.append(signal.SIGTERM)  # noqa: B023
                        signal.raise_signal(signal.SIGTERM)
                return trace

            sys.settrace(trace)
            with contextlib.suppress(KeyboardInterrupt, Terminated):
                run(sent)
            sys.settrace(None)
            assert sorted(came) == sorted(sent), position
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                assert signal.getsignal(number) is handler, position
            assert not uninterrupted._waiting, position
            if run is step and everything(params, optimizer) != after:
                optimizer.step()
                assert everything(params, optimizer) == after, position
            if seen < position:
                break
        assert position > 40


@pytest.mark.parametrize("row", CHOSEN[:3], ids=str)
def test_what_has_begun_is_finished_before_other_gradients_come(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a checkpoint that is loaded instead is as it was saved."""
    case, failing = Case(row, torch.float64), Failing(monkeypatch)
    params, optimizer = case.new()
    saved = copy.deepcopy(optimizer.state_dict())
    with failing:
        optimizer.step()
    once = everything(params, optimizer)
    set_gradients(params, case.gradients)
    optimizer.step()
    twice = everything(params, optimizer)
    finished = 0
    for at in positions(failing.calls, 0):
        failing.at, failing.calls = at, 0
        params, optimizer = case.new()
        with pytest.raises(ERRORS), failing:
            optimizer.step()
        set_gradients(params, case.gradients)
        optimizer.step()
        steps = [int(optimizer.state[param]["step"].max()) for param in params]
        assert all(own - int(saved["state"][0]["step"].max()) in (1, 2) for own in steps)
        # Those that had been updated, or were finished, have taken two steps.
        for own, first, second in zip(everything(params, optimizer), once, twice, strict=True):
            if own[1]["step"] == second[1]["step"]:
                assert own[0] == second[0]
                finished += 1
            else:
                assert own[1]["step"] == first[1]["step"]
        failing.calls = 0
        params, optimizer = case.new()
        with pytest.raises(ERRORS), failing:
            optimizer.step()
        optimizer.load_state_dict(saved)
        assert bits(optimizer.state_dict()) == bits(saved)
    assert finished
