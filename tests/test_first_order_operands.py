"""What a step is given: gradients and parameters in any memory, of any kind, under any modes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import zoopt
from tests.compare import equal, same
from tests.first_order_table import ROWS, Row, backward, batch, net
from zoopt.first_order.projected.subspace import subspace

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
every_class = pytest.mark.parametrize(
    "row", list({row.cls: row for row in reversed(ROWS)}.values()), ids=str
)


def expanded(values: Tensor) -> Tensor:
    return values.mean().expand(values.shape)


def every_other(values: Tensor) -> Tensor:
    return torch.stack((values, -values), -1)[..., 0]


def every_other_first(values: Tensor) -> Tensor:
    return torch.stack((values, -values), 1)[:, 0] if values.dim() else values


def transposed(values: Tensor) -> Tensor:
    return values.t().contiguous().t() if values.dim() == 2 else values


def overlapping(values: Tensor) -> Tensor:
    """Rows that begin in one another."""
    if values.dim() != 2:
        return values
    return values.flatten().as_strided(values.shape, (1, 1))


def negative(values: Tensor) -> Tensor:
    """Whose memory holds the opposite."""
    return torch._neg_view(-values)


LAYOUTS = (expanded, every_other, every_other_first, transposed, overlapping, negative)


@every_row
def test_a_gradient_is_its_values_whatever_its_memory(row: Row) -> None:
    """The bits are those of a dense gradient of the same values."""
    models = []
    for dense in (True, False):
        model = net()
        optimizer = row.build(model)
        for step in range(3):
            backward(model)
            for i, param in enumerate(model.parameters()):
                values = LAYOUTS[(i + step) % len(LAYOUTS)](param.grad)
                param.grad = values.contiguous().resolve_neg().clone() if dense else values
            optimizer.step()
        models.append(model)
    assert same(*models)


@every_row
def test_a_gradient_may_have_a_dtype_of_its_own(row: Row) -> None:
    """A bfloat16 weight's float32 gradient: steps, and stays finite."""
    model = net(torch.bfloat16)
    optimizer = row.build(model)
    wide = net()
    for _ in range(2):
        backward(wide)
        for param, other in zip(model.parameters(), wide.parameters(), strict=True):
            param.grad_dtype = torch.float32
            param.grad = other.grad
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not same(model, net(torch.bfloat16))


class Wrapper(Tensor):
    """A wrapper that torch's compiler does not know of: its own memory is none."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*(a.inner if isinstance(a, Wrapper) else a for a in args), **(kwargs or {}))
        return Wrapper(out) if isinstance(out, Tensor) else out


@every_class
def test_refuses_gradients_without_memory_of_their_own(row: Row) -> None:
    model = net()
    optimizer = row.build(model)
    backward(model)
    model[7].weight.grad = TwoTensor(torch.ones(4, 48), torch.ones(4, 48))
    message = r"needs a gradient of its parameter's kind, Parameter, got TwoTensor .* '7\.weight'"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert same(model, net())
    assert not optimizer.state


@every_class
def test_refuses_parameters_without_memory_of_their_own(row: Row) -> None:
    lazy = nn.LazyLinear(3)
    shared = torch.zeros(3, 1).expand(3, 4)
    for param, message in (
        (nn.Parameter(TwoTensor(torch.ones(3, 4), torch.ones(3, 4))), "the subclass TwoTensor"),
        (nn.Parameter(Wrapper(torch.ones(3, 4))), "the subclass Wrapper"),
        (lazy.weight, "must have a shape, got an uninitialized one"),
        (shared.requires_grad_(), "must not share memory"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            row.cls([param], **row.options)  # type: ignore[call-arg]


@every_class
def test_refuses_to_step_a_parameter_without_values(row: Row) -> None:
    """On the meta device, where it gets no gradient either: nothing would happen, in silence."""
    model = net()
    model[2].weight = nn.Parameter(model[2].weight.to("meta"))
    optimizer = row.build(model)
    for param in model.parameters():
        param.grad = None if param.is_meta else torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"'2\.weight' must hold values, got one on the meta"):
        optimizer.step()
    assert torch.equal(model[7].weight, net()[7].weight)
    assert not optimizer.state
    with pytest.raises(RuntimeError, match=r"'2\.weight' must hold values, got one on the meta"):
        zoopt.fuse_backward(model, optimizer)


@every_row
def test_a_step_at_zero_rate_and_gradient_counts(row: Row) -> None:
    """As torch counts it: a warm-up from 0 over a gradient of 0, LoRA's A, is such a step."""
    model = net()
    optimizer = row.build(model, lr=0.0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert all(int(step) == 1 for step in steps)


def test_lora_under_warm_up_is_torchs_adamw() -> None:
    """Six steps of LoRA: B begins as 0, so A's first gradient is 0, at a rate of 0."""
    runs = []
    for cls in (zoopt.AdamW, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
        y = torch.randn(32, 4, generator=generator, dtype=torch.float64)
        a = nn.Parameter(torch.randn(8, 2, generator=generator, dtype=torch.float64))
        b = nn.Parameter(torch.zeros(2, 4, dtype=torch.float64))
        optimizer: Any = cls([a, b], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
        for _ in range(6):
            optimizer.zero_grad()
            (x @ a @ b - y).square().mean().backward()
            optimizer.step()
            schedule.step()
        runs.append((a.detach(), b.detach()))
    for ours, theirs in zip(*runs, strict=True):
        # float64: a few roundings a step, relative to weights of order 1.
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-14)


@every_row
def test_a_graph_that_is_gone_through_again_does_not_see_other_weights(row: Row) -> None:
    model = net()
    optimizer = row.build(model)
    x, y = batch()
    loss = (model(x) - y).square().mean()
    loss.backward(retain_graph=True)
    versions = [param._version for param in model.parameters()]
    optimizer.step()
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic(mode: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


@every_row
def test_no_ambient_mode_changes_a_step(row: Row) -> None:
    """bfloat16 weights, whose rounding and bases are the most delicate; with a refresh on the way.

    Where the state is made matters too: under the modes, it is used without.
    """
    runs = []
    for ambient in (False, True):
        model = net(torch.bfloat16)
        optimizer = row.build(model)
        for step in range(3):
            backward(model)
            with contextlib.ExitStack() as modes:
                if ambient and step < 2:
                    modes.enter_context(torch.autocast("cpu", torch.bfloat16))
                    modes.enter_context(torch.device("meta"))
                    modes.enter_context(default_dtype(torch.float64))
                    modes.enter_context(deterministic(False))
                    modes.enter_context(torch.inference_mode())
                optimizer.step()
        runs.append((model.state_dict(), optimizer.state_dict()))
    assert equal(*runs)


@every_class
def test_no_ambient_mode_changes_a_fused_step(row: Row) -> None:
    runs = []
    for ambient in (False, True):
        model = net(torch.bfloat16)
        optimizer = row.build(model)
        with zoopt.fuse_backward(model, optimizer):
            for step in range(2):
                x, y = batch(torch.bfloat16)
                loss = (model(x) - y).square().mean()
                with contextlib.ExitStack() as modes:
                    if ambient and step < 1:
                        modes.enter_context(torch.autocast("cpu", torch.bfloat16))
                        modes.enter_context(torch.device("meta"))
                        modes.enter_context(default_dtype(torch.float64))
                    loss.backward()
                    optimizer.step()
        runs.append((model.state_dict(), optimizer.state_dict()))
    assert equal(*runs)


def _makes_bases(row: Row) -> bool:
    group = row.build(net()).param_groups[0]
    return "update_proj_gap" in group and group["projector"] not in ("random", "columns")


@pytest.mark.parametrize("row", [row for row in ROWS if _makes_bases(row)], ids=str)
def test_a_step_that_fails_moves_nothing(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear algebra that fails, of the last but one of four matrices or earlier."""
    model = net()
    optimizer = row.build(model, update_proj_gap=1)
    backward(model)
    optimizer.step()
    backward(model)
    before = copy.deepcopy(model)
    kept = {
        param: {name: value.clone() for name, value in state.items() if "basis" not in name}
        for param, state in optimizer.state.items()
    }
    calls = []

    def failing(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the algorithm failed to converge")
        return subspace(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("zoopt.first_order.projected.basis.subspace", failing)
        with pytest.raises(RuntimeError, match="failed to converge"):
            optimizer.step()
    assert same(model, before)
    for param, values in kept.items():
        for name in values.keys() - {"agreements", "doublings"}:
            assert torch.equal(optimizer.state[param][name], values[name])
    optimizer.step()
    assert not same(model, before)
