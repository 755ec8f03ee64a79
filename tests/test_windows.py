"""Temporaries of several parameters by one launch: any order of reads sees the same values."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoopt
from tests.optimizer_table import ROWS as ALL
from tests.optimizer_table import Row, closure_of, mlp
from zoopt.kernels import NoiseKey, dispatch, perturb
from zoopt.kernels.batch import Batch
from zoopt.kernels.noise.op import perturbed_copies
from zoopt.zeroth_order.engine import noise as engine_noise
from zoopt.zeroth_order.engine import windows
from zoopt.zeroth_order.engine.noise import Noise
from zoopt.zeroth_order.engine.sites import Site, Sites, along
from zoopt.zeroth_order.engine.windows import Moves, Reads, Windows


def params_of(count: int, size: int = 40) -> list[Tensor]:
    return [torch.randn(size + i, 3) for i in range(count)]


GROUP: dict[str, Any] = {}


def key_of(params: list[Tensor], param: Tensor) -> NoiseKey:
    return NoiseKey(1, next(i for i, other in enumerate(params) if other is param))


def moves_of(params: list[Tensor]) -> Moves:
    """0.1 z(5) of each."""
    noises = [Noise(key_of(params, param)) for param in params]
    sites = [
        Site(param, GROUP, noise, virtual=True, rounding="nearest", zo_eps=0.1)
        for param, noise in zip(params, noises, strict=True)
    ]
    return Moves(Sites(sites), along(5, 1.0))


def check(params: list[Tensor], taken: list[tuple[Tensor, Tensor]]) -> None:
    for param, temporary in taken:
        assert torch.equal(temporary, perturb(param, 0.1, draw=5, key=key_of(params, param)))
        assert temporary.data_ptr() % 16 == 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many temporaries each launch makes; a buffer takes three of forty rows."""
    sizes: list[int] = []

    def counted(theta: Batch, *numbers: Any, **options: Any) -> list[Tensor]:
        sizes.append(len(theta))
        return perturbed_copies(theta, *numbers, **options)

    monkeypatch.setattr(dispatch, "launches", lambda tensor: True)
    monkeypatch.setattr(engine_noise, "perturbed_copies", counted)
    monkeypatch.setattr(windows, "WINDOW_BYTES", 3 * 45 * 3 * 4)
    return sizes


def read(known: Windows, params: list[Tensor], order: list[int]) -> None:
    reads = Reads(known, moves_of(params))
    check(params, [(params[i], reads.take(params[i])) for i in order])
    known.learn(reads.order)


def test_the_second_evaluation_knows_the_order(made: list[int]) -> None:
    params, known = params_of(7), Windows()
    read(known, params, [0, 1, 2, 3, 4, 5, 6])
    assert made == [1] * 7
    made.clear()
    read(known, params, [0, 1, 2, 3, 4, 5, 6])
    assert made == [3, 3, 1]


@pytest.mark.parametrize(
    "order", [[6, 5, 4, 3, 2, 1, 0], [0, 0, 1, 3, 2], [4, 5, 4, 5, 6], [2], [0, 2, 4, 6, 1, 3, 5]]
)
def test_another_order_costs_launches_and_no_value(order: list[int], made: list[int]) -> None:
    params, known = params_of(7), Windows()
    read(known, params, [0, 1, 2, 3, 4, 5, 6])
    read(known, params, order)
    made.clear()
    read(known, params, order)  # which is now the expected one
    assert len(made) < len(order) or len(order) == 1


def test_one_buffer_lives_at_a_time(made: list[int]) -> None:
    """Unless a temporary outlives its operator: its memory is not made use of again."""
    params, known = params_of(6), Windows()
    read(known, params, list(range(6)))
    reads = Reads(known, moves_of(params))
    kept = reads.take(params[0])
    expected = kept.clone()
    del kept
    held = reads.take(params[1])
    for param in params[2:]:
        reads.take(param)
    assert torch.equal(held, perturb(params[1], 0.1, draw=5, key=NoiseKey(1, 1)))
    assert torch.equal(expected, perturb(params[0], 0.1, draw=5, key=NoiseKey(1, 0)))


def test_large_parameters_and_other_dtypes_are_alone(made: list[int]) -> None:
    params = [*params_of(2), torch.randn(400, 3), *params_of(2), torch.randn(40, 3).bfloat16()]
    known = Windows()
    for _ in range(2):
        made.clear()
        read(known, params, list(range(6)))
    assert made == [2, 1, 2, 1]


@pytest.mark.parametrize("how", ["moved", "grown", "cast", "tied", "emptied", "transposed"])
def test_parameters_may_change_between_evaluations(how: str, made: list[int]) -> None:
    """A window that was made before follows them, or is made again."""
    params, known = params_of(3), Windows()
    for _ in range(2):
        read(known, params, [0, 1, 2])
    params[1].data = {
        "moved": params[1].clone(),
        "grown": torch.randn(100, 3),
        "cast": params[1].bfloat16(),
        "tied": params[0].data,
        "emptied": torch.empty(0, 3),
        "transposed": torch.randn(3, 40).t(),
    }[how]
    made.clear()
    moves = moves_of(params)
    assert (id(params[1]) in moves.sites) == params[1].is_contiguous()
    reads = Reads(known, moves)
    taken = [(param, reads.take(param)) for param in params if id(param) in moves.sites]
    for param, temporary in taken:
        assert torch.equal(temporary, perturb(param, 0.1, draw=5, key=key_of(params, param)))
    assert len(made) == {"moved": 1, "emptied": 1, "transposed": 2}.get(how, 3 - (how == "tied"))


@pytest.mark.parametrize("perturbation", ["inplace", "virtual"])
@pytest.mark.parametrize("how", ["moved", "resized", "cast", "tied"])
def test_parameters_may_change_between_steps(
    how: str, perturbation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where operations are launches, as where they are not."""

    def trained(launching: bool) -> list[Tensor]:
        torch.manual_seed(1)
        layers = [nn.Linear(6, 6, bias=False) for _ in range(4)]
        net = nn.Sequential(*layers)
        optimizer = zoopt.MeZO(net.parameters(), 1e-2, perturbation=perturbation, seed=1)
        x = torch.randn(5, 6)

        def loss() -> Tensor:
            h = x
            for layer in layers:
                h = nn.functional.linear(h.to(layer.weight.dtype), layer.weight)
            return h.double().square().mean()

        monkeypatch.setattr(dispatch, "launches", lambda tensor: launching)
        for _ in range(2):
            optimizer.step(loss)
        weights = [layer.weight for layer in layers]
        old = weights[1].data
        if how == "moved":
            weights[1].data = old.clone()
        elif how == "resized":
            weights[1].data, weights[2].data = torch.randn(9, 6), torch.randn(6, 9)
        elif how == "cast":
            weights[1].data = old.bfloat16()
        else:
            weights[1].data = weights[0].data
        kept = old.clone()
        for _ in range(2):
            optimizer.step(loss)
        assert torch.equal(old, kept)  # Nothing is written where a parameter was before.
        monkeypatch.undo()
        return [weight.detach() for weight in weights]

    for own, other in zip(trained(True), trained(False), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("mode", ["inplace", "virtual"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (zoopt.MeZO, {"momentum": 0.9}),
        (zoopt.MeZO, {"mask": "magnitude", "density": 0.5}),
        (zoopt.HiZOO, {}),
        (zoopt.ConMeZO, {}),
        (zoopt.ZOMuon, {"rank": 2}),
        (zoopt.LOZO, {"rank": 2}),
    ],
)
def test_parameters_tied_by_their_data(
    cls: Any, options: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parameters in one memory: what is only read is read at once, writes take turns."""

    def trained(launching: bool) -> list[Tensor]:
        torch.manual_seed(2)
        first = [nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))]
        params = [*first, *(nn.Parameter(param.data) for param in first)]
        optimizer = cls(params, 1e-3, perturbation=mode, seed=1, **options)
        x = torch.randn(5, 6)

        def loss() -> Tensor:
            h = nn.functional.linear(x, params[0], params[1]).tanh()
            return nn.functional.linear(h, params[2], params[3]).square().mean()

        monkeypatch.setattr(dispatch, "launches", lambda tensor: launching)
        for _ in range(3):
            optimizer.step(loss)
        monkeypatch.undo()
        assert params[0].data_ptr() == params[2].data_ptr()
        return [param.detach() for param in first]

    for own, other in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(own, other, rtol=2e-4, atol=2e-5)


def test_a_step_has_the_bits_of_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows on the CPU, where there are none otherwise: tied weights, an embedding, dropout."""

    def trained(launching: bool) -> list[Tensor]:
        torch.manual_seed(1)
        embedding = nn.Embedding(30, 8)
        net = nn.Sequential(embedding, nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 30))
        net[3].weight = embedding.weight
        optimizer = zoopt.MeZO(net.parameters(), 1e-3, perturbation="virtual", num_probes=2, seed=1)
        ids = torch.arange(12)
        if launching:
            monkeypatch.setattr(dispatch, "launches", lambda tensor: True)
        for _ in range(3):
            optimizer.step(lambda: net(ids).logsumexp(1).mean())
        monkeypatch.undo()
        return [param.detach() for param in net.parameters()]

    for own, other in zip(trained(True), trained(False), strict=True):
        assert torch.equal(own, other)


ROWS = [row for row in ALL if "virtual" in row.perturbations or not row.perturbations]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_class_goes_where_it_goes_one_by_one(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, whose rounding would show another sum. Thin factors are added up in another
    order."""
    thin = row.cls in (zoopt.LOZO, zoopt.SubZero, zoopt.ZOMuon) or row.options.get("rank")

    def trained(launching: bool) -> list[Tensor]:
        model = mlp(torch.bfloat16)
        options = {"perturbation": "virtual"} if row.perturbations else {}
        optimizer = row.build(model, **options)
        if launching:
            monkeypatch.setattr(dispatch, "launches", lambda tensor: True)
        for _ in range(3):
            optimizer.step(closure_of(model, torch.bfloat16))
        monkeypatch.undo()
        return [param.detach() for param in model.parameters()]

    for own, other in zip(trained(True), trained(False), strict=True):
        if thin:
            assert (own - other).norm() <= 0.02 * other.norm()
        else:
            assert torch.equal(own, other)


#: Calls of functions at a linear layer, of Python and of C: 34 with Python 3.11, and 77 when each
#: operator found out anew what its function does and how its parameters are displaced.
MOST_CALLS = 40


def test_an_operator_takes_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond those without the optimizer: a few, whatever the number of parameters."""
    layers = 60
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
    x = torch.ones(2, 4)
    counts: list[int] = []

    def closure() -> Tensor:
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            with torch.no_grad():
                y = net(x).sum()
        finally:
            sys.setprofile(before)
        counts.append(calls)
        return y

    closure()
    optimizer = zoopt.MeZO(net.parameters(), 1e-3, perturbation="virtual", seed=1)
    monkeypatch.setattr(dispatch, "launches", lambda tensor: True)
    unmoved = lambda theta, *_, **__: list(theta.tensors)  # noqa: E731
    monkeypatch.setattr(engine_noise, "perturbed_copies", unmoved)
    optimizer.step(closure)
    optimizer.step(closure)
    assert (counts[-1] - counts[0]) / layers <= MOST_CALLS
