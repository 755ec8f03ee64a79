"""Zeroth-order steps on a stub of a GPU: what they ask of it, whatever the model's size."""

from __future__ import annotations

import collections
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from bench.overhead import begun, begun_in_place, calls
from bench.stub_gpu import Recorded, launches, stub_gpu
from tests.optimizer_table import ROWS, Row
from zoopt.kernels.descent.op import energies
from zoopt.zeroth_order import conmezo, muon
from zoopt.zeroth_order.engine import members

#: Passes over the weights beyond one for each evaluation off theta and one for the update.
EXTRA = {
    "HiZOO": 1,  # the Hessian
    "ConMeZO": 3,  # the momentum, and its norm
    "MeZO magnitude mask": 1,  # which elements are small
}
#: Reads of the device's numbers beyond that of the losses: the candidates', the momentum's norm.
WAITS = {"ConMeZO": 1, "ZOConservativeSGD three": 1, "ZOConservativeSGD reused": 1}
#: Slopes of the two directions are read one by one, and then the losses.
SLOPES = {zoopt.ForwardGrad: 3}
INPLACE = [row for row in ROWS if "inplace" in row.perturbations]
PRODUCTS = (zoopt.LOZO, zoopt.SubZero, zoopt.ZOMuon)
LOW_RANK = [row for row in INPLACE if row.cls in PRODUCTS or row.options.get("rank") is not None]
ELEMENTWISE = [row for row in INPLACE if row not in LOW_RANK]


def model(layers: int) -> nn.Sequential:
    """Matrices and vectors of several sizes."""
    return nn.Sequential(*[nn.Linear(20, 20 + 4 * (i % 3)) for i in range(layers)])


def evaluations(row: Row) -> int:
    """How many evaluations of a step are off theta."""
    options = row.options
    if "population_size" in options:
        return int(options["population_size"])
    one_sided = options.get("estimator") == "one-sided" or row.cls is zoopt.FZOO
    one_sided |= row.cls is zoopt.ZOMuon or options.get("candidates") == "reused"
    probes = options.get("num_probes", {zoopt.FZOO: 8, zoopt.ZOMuon: 4}.get(row.cls, 1))
    return int(probes * (1 if one_sided else 2))


def step(row: Row, mode: str, net: nn.Module, *, reads: bool = False) -> Recorded:
    """What the third step asks of the device; of a closure that reads the parameters or not."""
    options: dict[str, Any] = {"perturbation": mode} if row.perturbations else {}
    if "mask" in row.options and isinstance(row.options["mask"], dict):
        options["mask"] = {name: torch.tensor([3, 0, 1]) for name, _ in net.named_parameters()}
    optimizer = row.build(net, **options)
    losses = itertools.cycle(torch.linspace(1.0, 2.0, 7).double().unbind())
    first = next(losses)
    repeated = itertools.chain([first, first], losses)

    x = torch.zeros(4, 20)

    def closure() -> torch.Tensor:
        loss = next(repeated)
        if not reads:
            return loss
        y = net(x)
        if row.cls is not zoopt.ForwardGrad:
            return loss
        return loss + y.double().sum()  # A slope has to depend on the parameters.

    for _ in range(2):
        optimizer.step(closure)
    return launches(lambda: optimizer.step(closure))


@pytest.fixture(autouse=True)
def _norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs, so norms are made up: updates are alike only where numbers are equal."""

    def made_up(*args: Any, **options: Any) -> torch.Tensor:
        return energies(*args, **options).fill_(1.0)

    monkeypatch.setattr(conmezo, "energies", made_up)
    monkeypatch.setattr(muon, "energies", made_up)


@pytest.mark.parametrize("row", ELEMENTWISE, ids=str)
def test_a_step_in_place(row: Row) -> None:
    """A launch a move, one for the update, and a few that are declared; what more directions than
    a few bring to memory is written there by launches too."""
    found = []
    for layers in (3, 7):
        with stub_gpu():
            recorded = step(row, "inplace", model(layers))
        passes = [each for each in recorded.launches if each.kernel != "numbers_kernel"]
        moves = evaluations(row)
        if row.cls is zoopt.ZOConservativeSGD:
            # Both candidates, or the one, and theta between them.
            moves += 1 if row.options.get("candidates") == "reused" else 3
        assert len(passes) <= moves + 1 + EXTRA.get(str(row), 0)
        assert len(passes) > evaluations(row)
        assert recorded.copies == 0
        assert recorded.waits == 1 + WAITS.get(str(row), 0)
        # Where a buffer lies elsewhere than in the last step, its addresses are made by one more.
        others = [name for name in recorded.others if name != "add"]
        found.append(([each.kernel for each in recorded.launches], others))
    assert found[0] == found[1]
    # A copy of each loss, and the differences between all of them.
    assert len(found[0][1]) <= moves + 4


@pytest.mark.parametrize("row", LOW_RANK, ids=str)
def test_a_step_in_place_with_thin_factors(row: Row) -> None:
    """Two kinds of parameters, matrices and vectors; a few launches make the factors of each move,
    one more adds them to all matrices."""
    found = []
    for layers in (4, 7):
        with stub_gpu():
            recorded = step(row, "inplace", model(layers))
        assert recorded.copies == 0
        assert recorded.waits == 1 + (row.cls is zoopt.ZOMuon)
        others = [name for name in recorded.others if name != "add"]
        found.append(([each.kernel for each in recorded.launches], others))
        moves = evaluations(row) + 1
        # Members have two factors, and pass from one draw to another. A generation's update has all
        # draws'.
        each = {zoopt.LOZO: 3, zoopt.EvolutionStrategy: 4}.get(row.cls, 2)
        draws = 2 * row.options.get("population_size", 0)
        names = [name for name in found[-1][0] if name != "numbers_kernel"]
        assert names.count("products_kernel") <= (1 + (row.cls is zoopt.SubZero)) * moves
        assert len(names) <= moves * (each + 2) + draws + 2
    assert found[0] == found[1]


@pytest.mark.parametrize("row", [r for r in LOW_RANK if "blocks" not in r.options], ids=str)
def test_operators_make_two_thin_products(row: Row) -> None:
    """And nothing else, with matrices alone: factors are made once an evaluation."""
    found = []
    for layers in (4, 7):
        net = nn.Sequential(*[nn.Linear(20, 20, bias=False) for _ in range(layers)])
        with stub_gpu():
            recorded = step(row, "virtual", net, reads=True)
        assert (recorded.copies, recorded.waits) == (0, 1)
        found.append(recorded)
    few, many = found
    assert [each.kernel for each in few.launches] == [each.kernel for each in many.launches]
    added = collections.Counter(many.others) - collections.Counter(few.others)
    off = evaluations(row)
    at_theta = row.cls is zoopt.ZOMuon  # which is one-sided
    assert added["addmm_"] == 3 * off
    assert added["mm"] == 3 * (2 * off + at_theta)
    assert added.keys() <= {"mm", "addmm_", "add"}  # the last of addresses, as above


@pytest.mark.parametrize("window", [1 << 26, 1])
def test_members_in_one_batch_are_a_launch_a_draw(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all matrices and vectors together; a window of one parameter has a launch each."""
    monkeypatch.setattr(members, "_TOGETHER_BYTES", window)
    found = []
    for layers in (4, 7):
        net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(layers)])
        options = {"population_size": 6, "rank": 2, "sigma": 1e-3, "seed": 3}
        optimizer = zoopt.EvolutionStrategy(net.named_parameters(), **options)
        x = torch.zeros(6, 20)
        run = functools.partial(optimizer.evaluate_batched, verify=False)
        with stub_gpu():
            recorded = launches(lambda run=run, net=net, x=x: run(lambda: net(x).sum(1)))
        found.append(len(recorded.launches))
        assert {each.kernel for each in recorded.launches} == {"sum_kernel"}
    draws = 3
    assert found == ([draws, draws] if window > 1 else [2 * 4 * draws, 2 * 7 * draws])


#: Calls of functions at an operator that reads two parameters, of Python and of C, in a whole
#: virtual step beyond those of the forward passes. When sites and windows were not kept between
#: steps MeZO made 230, and ConMeZO 517.
MOST_CALLS = {
    "MeZO": 18,
    "MeZO, momentum": 19,
    "MeZO, random mask": 18,
    "MeZO, magnitude mask": 21,
    "ZOAdam": 20,
    "ZOAdam, window": 18,
    "HiZOO": 26,
    "ConMeZO": 19,
    "EvolutionStrategy, rank 1": 28,
    "LOZO": 26,
    "SubZero": 30,
}
#: The same for each tensor of a step in place, without what one `map` asks of all of them. MeZO
#: made 237, LOZO 567.
MOST_CALLS_IN_PLACE = {
    "MeZO": 0.5,
    "MeZO, momentum": 1.5,
    "ZOAdam": 1.5,
    "ZOAdam, window": 0.5,
    "ZOSignSGD": 0.5,
    "FZOO": 0.5,
    "HiZOO": 1.5,
    "ConMeZO": 1.5,
    "LOZO": 2.0,
    "LOZO, momentum": 4.0,
    "SubZero": 6.0,
}


@pytest.mark.parametrize("name", MOST_CALLS)
def test_a_virtual_step_takes_few_calls(name: str) -> None:
    made = {}
    for layers in (10, 40):
        with begun(name, layers, bias=True) as loop:
            made[layers] = calls(loop.step) - loop.evaluations * calls(loop.evaluate)
    assert (made[40] - made[10]) / (30 * loop.evaluations) <= MOST_CALLS[name]


@pytest.mark.parametrize("name", MOST_CALLS_IN_PLACE)
def test_a_step_in_place_calls_nothing_for_each_tensor(name: str) -> None:
    made = {}
    for tensors in (20, 60):
        with begun_in_place(name, tensors) as loop:
            made[tensors] = calls(loop.step)
    assert (made[60] - made[20]) / 40 <= MOST_CALLS_IN_PLACE[name]


VIRTUAL = [row for row in ROWS if row not in LOW_RANK]


# Slopes of temporaries that hold nothing.
@pytest.mark.filterwarnings("ignore:skipped . of . probes")
@pytest.mark.parametrize("row", VIRTUAL, ids=str)
def test_a_virtual_evaluation_is_a_launch_for_each_64_mib(row: Row) -> None:
    """However many parameters they are of, once the order of reads is known. With indices torch
    copies a window's parameters by one launch more; blocks of patterns read across two windows."""
    found = []
    for layers in (3, 9):
        net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(layers)])
        with stub_gpu():
            recorded = step(row, "virtual", net, reads=True)
        passes = [each for each in recorded.launches if each.kernel != "numbers_kernel"]
        moves = evaluations(row)
        if row.cls is zoopt.ZOConservativeSGD:
            # Both candidates, or the one.
            moves += 1 if row.options.get("candidates") == "reused" else 2
        extra = 0 if "mask" in row.options else EXTRA.get(str(row), 0)
        assert len(passes) <= moves + 1 + extra + ("blocks" in row.options)
        assert recorded.copies == 0
        assert recorded.waits == SLOPES.get(row.cls, 1) + WAITS.get(str(row), 0)
        others = [name for name in recorded.others if name not in ("add", "addmm")]
        if row.cls is zoopt.ForwardGrad:
            others = []  # Operators compute derivatives too.
        found.append(([each.kernel for each in recorded.launches], others))
    if "blocks" not in row.options:
        assert found[0] == found[1]
