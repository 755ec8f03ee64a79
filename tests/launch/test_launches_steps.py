"""First-order steps on a stub of a GPU: launches do not depend on the number of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import zoopt
from bench.stub_gpu import Recorded, launches, stub_gpu
from tests.first_order_table import ROWS, Row
from zoopt.first_order.projected.subspace import times
from zoopt.kernels import dispatch
from zoopt.zeroth_order.engine.closure import RecordedLosses

FORMATS = ["float32", "bfloat16", "int8", "int4"]


class Layers(torch.nn.Module):
    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        linears = [
            torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(width)) for _ in range(depth)
        ]
        self.layers = torch.nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            assert isinstance(layer, torch.nn.ModuleList)
            for linear in layer:
                x = linear(x)
        return x.sum()


def step_of(
    cls: type[Any],
    count: int,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]] = ((64, 80),),
    **options: Any,
) -> Recorded:
    """The third step over that many parameters of each shape."""
    params = [
        torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes for _ in range(count)
    ]
    optimizer = cls(params, **{"lr": 1e-3, "seed": 1, **options})
    for param in params:
        param.grad = torch.randn(param.shape).to(dtype)
    with stub_gpu():
        for _ in range(2):
            optimizer.step()
        return launches(optimizer.step)


def counted(cls: type[Any], count: int, dtype: torch.dtype, **options: Any) -> tuple[int, int, int]:
    """Launches, copies and waits of the third step over that many matrices."""
    recorded = step_of(cls, count, dtype, **options)
    return len(recorded.launches), recorded.copies, recorded.waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_adamw_is_one_launch(state_dtype: str, dtype: torch.dtype) -> None:
    assert counted(zoopt.AdamW, 7, dtype, state_dtype=state_dtype) == (1, 0, 0)


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
    assert counted(zoopt.SM3, 7, torch.bfloat16, momentum=momentum) == (1, 0, 0)


def test_plain_parameters_of_projected_classes_are_one_launch() -> None:
    assert counted(zoopt.GaLoreAdamW, 7, torch.bfloat16, rank=None) == (1, 0, 0)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_launches_do_not_depend_on_the_number_of_matrices(row: Row) -> None:
    """Of any first-order optimizer: its moments, norms and writes are launched for all at once."""
    options = {**row.options, "update_proj_gap": 1 << 30, "stagger": False}
    known = inspect.signature(row.cls).parameters
    options = {name: value for name, value in options.items() if name in known}
    # SM3 steps a tensor of more axes by itself.
    shapes = ((64, 80), (80, 64), (5, 12) if row.cls is zoopt.SM3 else (5, 4, 3))
    few, many = (step_of(row.cls, count, torch.bfloat16, shapes, **options) for count in (2, 4))
    more = len(many.launches) - len(few.launches)
    assert more <= 0
    # With torch's, three a matrix, and one more where both of its sides are projected. LDAdam has
    # three products with each of G and E, for its next basis and R.
    sides = 4 if row.options.get("proj_type") == "full" or row.cls is zoopt.GradNormLoRP else 3
    if row.cls is zoopt.LDAdamW and row.options.get("error_feedback", True):
        sides = 6
    each = [len(own.launches) + sum(name != "add" for name in own.others) for own in (few, many)]
    assert each[1] - each[0] <= sides * 2 * len(shapes)
    assert few.waits == many.waits


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_launches_do_not_depend_on_the_number_of_plain_parameters(row: Row) -> None:
    """At most three of Triton's, and as many operations of torch's for 2 parameters as for 8."""
    options = {**row.options, "update_proj_gap": 1 << 30, "stagger": False}
    known = inspect.signature(row.cls).parameters
    options = {name: value for name, value in options.items() if name in known}
    found = []
    for count in (2, 8):
        recorded = step_of(row.cls, count, torch.bfloat16, ((300,),), **options)
        # Tables of addresses are additions; they move with what an allocator returns.
        others = [name for name in recorded.others if name != "add"]
        found.append((len(recorded.launches), len(others), recorded.waits))
    averages = options.get("rule", "adam") != "adam" or options.get("beta1") is not None
    launched, others_of, waits = found[0]
    assert found[1] == found[0]
    expected = 2 if averages else 1
    if row.cls is zoopt.SparseDeltaAdamW and options["density"] < 1.0:
        # The third of four steps, where candidates are summed or bounds are raised.
        expected = 3 if options.get("growth") == "momentum" else 2
    assert (launched, waits) == (expected, 0)
    # Adafactor's means and norms are torch's.
    assert others_of <= (24 if row.cls is zoopt.GaLoreAdafactor else 3)


@pytest.mark.parametrize("growth", ["accumulated", "momentum"])
def test_active_entries_of_all_layers_are_stepped_by_one_launch(growth: str) -> None:
    """Of weights, and of deltas beside frozen ones; each step but those that select candidates or
    replace entries."""
    most = 3 if growth == "momentum" else 2
    for beside in (False, True):
        found = []
        for width in (4, 12):
            model = Layers(1, width).bfloat16()
            params: Any = list(model.named_parameters())
            if beside:
                params = zoopt.nn.convert_to_sparse_delta(model, lambda name, module: True)
            options: dict[str, Any] = {"update_gap": 6, "window": 3, "growth": growth, "seed": 1}
            optimizer = zoopt.SparseDeltaAdamW(params, **options)
            steps = []
            for step in range(1, 12):
                x = torch.ones(2, 64, dtype=torch.bfloat16)
                model(x).backward()
                with stub_gpu():
                    recorded = launches(optimizer.step)
                optimizer.zero_grad()
                # Step 4 selects candidates, and 6 replaces entries.
                if step > 1 and step % 6 not in (0, 4):
                    others = [name for name in recorded.others if name != "add"]
                    steps.append((len(recorded.launches), len(others), recorded.waits))
            found.append(steps)
            # Deltas have their candidates' gradients scaled as their own have been since.
            scales = 2 * beside * (growth == "accumulated")
            assert all(launched <= most + scales and not waits for launched, _, waits in steps)
        assert found[0] == found[1]


#: Of each dtype, without random rounding, and with a limiter or none.
THREE = [
    (zoopt.GaLoreAdamW, {"rank": 8}),
    (zoopt.GaLoreAdamW, {"rank": 8, "rounding": "nearest", "decay": "after", "weight_decay": 0.1}),
    (zoopt.GaLoreAdamW, {"rank": 8, "projector": "random"}),
    (zoopt.Apollo, {"rank": 8}),
    (zoopt.Apollo, {"rank": 8, "projector": "warm", "norm_growth_limit": None}),
    (zoopt.ApolloMini, {}),
    (zoopt.Fira, {"rank": 8}),
    (zoopt.Fira, {"rank": 8, "state_dtype": "int8", "rounding": "nearest"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cls", "options"), THREE)
def test_three_launches_a_matrix_and_none_waited_for(
    cls: type[Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Triton's and torch's together, but for at most 16 tables of addresses, which move with what
    an allocator returns."""
    shapes = ((64, 80), (96, 80))
    few, many = (step_of(cls, count, dtype, shapes, **options) for count in (2, 22))
    counts = [len(recorded.launches) + len(recorded.others) for recorded in (few, many)]
    assert counts[1] - counts[0] <= 3 * 20 * len(shapes) + 16
    assert len(few.launches) == len(many.launches)
    assert few.waits == many.waits == 0


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_way_down_is_one_product_of_16_bits(dtype: torch.dtype, there: bool) -> None:
    """Into float32, where torch.mm can; else float16 is widened in chunks, and bfloat16 summed in
    float32 and rounded."""
    gradient, factor = torch.randn(40, 30).to(dtype), torch.randn(30, 4)
    with stub_gpu(), mock.patch.object(dispatch, "_mm_has_out_dtype", return_value=there):
        for transposed in (False, True):
            own = factor if not transposed else torch.randn(40, 4)
            recorded = launches(lambda t=transposed, f=own: times(gradient, f, transposed=t))
            products = [name for name in recorded.others if "mm" in name]
            expected = "mm into float32"
            if not there:
                chunked = "addmm_" if transposed else "mm"
                expected = "mm" if dtype == torch.bfloat16 else chunked
            assert products == [expected]
            found = times(gradient, own, transposed=transposed)
            exact = (gradient.double().t() if transposed else gradient.double()) @ own.double()
            size = (gradient.abs().double().t() if transposed else gradient.abs().double()) @ (
                own.abs().double()
            )
            # The factor's rounding, and bfloat16's of the product where it is not widened.
            assert found.dtype == torch.float32
            assert ((found.double() - exact).abs() <= 1.01 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_device_that_refuses_float32_products_is_asked_once(
    dtype: torch.dtype, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its dtypes: products are widened from then on. Lack of memory is no refusal."""
    monkeypatch.setattr(dispatch, "_REFUSED", set())
    gradient, factor = torch.randn(40, 30).to(dtype), torch.randn(30, 4)
    expected = gradient.double() @ factor.to(dtype).double()
    asked: list[type[Exception]] = []
    raised = [torch.OutOfMemoryError, error]

    def mm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: Any = None, out: Any = None) -> Any:
        if out_dtype is None:
            return plain(a, b, out=out)
        asked.append(raised[min(len(asked), 1)])
        raise asked[-1]("no such product")

    there = mock.patch.object(dispatch, "_mm_has_out_dtype", return_value=True)
    plain = torch.mm
    with stub_gpu(), there, mock.patch.object(torch, "mm", mm):
        with pytest.raises(torch.OutOfMemoryError):
            times(gradient, factor)
        for into in (None, torch.empty(40, 4)):
            found = times(gradient, factor, out=into)
            assert found.dtype == torch.float32
            # The factor may be rounded before, and a bfloat16 product after.
            torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=0.1)
        assert asked == raised
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        assert dispatch.multiplies_into_float32(torch.zeros(2, dtype=other))
        assert not dispatch.multiplies_into_float32(gradient)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (zoopt.AdamW, {"state_dtype": "int8"}),
        (zoopt.SM3, {}),
        (zoopt.GaLoreAdamW, {"rank": 8}),
        (zoopt.Apollo, {"rank": 8}),
    ],
)
def test_a_fused_layer_is_launched_as_one(cls: type[Any], options: dict[str, Any]) -> None:
    """As many launches for a layer of 6 matrices as for one of 2, and a layer's worth for each."""

    def counted(depth: int, width: int) -> int:
        model = Layers(depth, width).bfloat16()
        optimizer = cls(model.named_parameters(), lr=1e-3, seed=1, **options)
        zoopt.fuse_backward(model, optimizer)
        x = torch.ones(2, 64, dtype=torch.bfloat16)
        with stub_gpu():
            for _ in range(2):
                model(x).backward()
                optimizer.step()
            loss = model(x)
            return len(launches(loss.backward).launches)

    one = counted(1, 2)
    assert 0 < one == counted(1, 6)
    assert counted(3, 2) == 3 * one


#: How gradients are changed before they are applied, and whether the updates are in `step`.
CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({"max_grad_norm": 1.0, "clip": "parameter"}, False),
    ({"accumulation_steps": 2}, True),
    ({"accumulation_steps": 2, "max_grad_norm": 1.0}, True),
    ({"accumulation_steps": 2, "max_grad_norm": 1.0, "clip": "parameter"}, True),
]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (zoopt.AdamW, {}),
        (zoopt.SM3, {}),
        (zoopt.GaLoreAdamW, {"rank": 8}),
        (zoopt.Apollo, {"rank": 8}),
    ],
)
def test_sums_and_clipping_of_a_layer_are_launched_as_one(
    cls: type[Any], options: dict[str, Any]
) -> None:
    """Triton's launches and torch's operations, for a layer of 12 matrices and one of 4, apart
    from those of the backward pass itself: but for the ways of a matrix down and up as many."""
    for changes, deferred in CHANGES[: 1 if cls is zoopt.Apollo else None]:
        found = []
        for width in (4, 12):
            model = Layers(1, width).bfloat16()
            plain = Layers(1, width).bfloat16()
            optimizer = cls(model.named_parameters(), lr=1e-3, seed=1, **options)
            zoopt.fuse_backward(model, optimizer, **changes)
            x = torch.ones(2, 64, dtype=torch.bfloat16)
            passes = changes.get("accumulation_steps", 1)
            with stub_gpu():
                for _ in range(2 * passes):
                    model(x).backward()
                    if int(_ + 1) % passes == 0:
                        optimizer.step()
                for _ in range(passes - 1):
                    model(x).backward()
                backward, step = launches(model(x).backward), launches(optimizer.step)
            own = launches(plain(x).backward)
            recorded = (backward, step)
            # Tables of addresses are additions; they move with what an allocator returns.
            others = [sum(name != "add" for name in each.others) for each in recorded]
            others[0] -= sum(name != "add" for name in own.others)
            assert (len(step.launches) > 0) == deferred == (len(backward.launches) == 0)
            found.append([*others, *(len(each.launches) for each in recorded)])
            assert backward.waits == step.waits == 0
        projected = 0 if "rank" not in options else 12 - 4
        # Down, up, and APOLLO's norm of each gradient, which is in the pass only.
        products = 2 if cls is zoopt.Apollo else 1
        assert found[1][0] - found[0][0] <= products * projected, changes
        assert found[1][1:] == found[0][1:], changes
