"""What the planner remembers, of operators and of forward passes, against what runs each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from tests.test_memory_depth import FEW, KINDS, quiet
from zoopt.memory.meter import StorageMeter
from zoopt.memory.methods import methods
from zoopt.memory.recall import Recall
from zoopt.memory.simulate import Simulation, fake
from zoopt.memory.tape import Tape, Unplayable

#: New tensors, views, several results, in place, of lists, and with what torch keeps values of.
OPERATORS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "product": lambda x, y: x @ y.T,
    "view": lambda x, y: x[1:].t().unsqueeze(0),
    "alias": lambda x, y: x.detach(),
    "expanded": lambda x, y: x[:1].expand(7, -1) + 1,
    "in place": lambda x, y: x.mul_(y),
    "cast": lambda x, y: x.to(torch.float64),
    "scaled": lambda x, y: (x * 2, x * 2.0, x.to(torch.int32) * 2, x.to(torch.int32) * 2.0),
    "several": lambda x, y: torch.linalg.qr(x),
    "chunks": lambda x, y: x.chunk(2, dim=1),
    "lists": lambda x, y: torch._foreach_add([x, y], 1.0),
    "lists in place": lambda x, y: torch._foreach_mul_([x, y], 2.0),
    "out": lambda x, y: torch.add(x, y, out=torch.empty_like(x)),
    "reshaped": lambda x, y: x.clone().unsqueeze_(0),
    "constant": lambda x, y: x + torch.tensor(3.0),
    "complex": lambda x, y: torch.fft.rfft(x).conj(),
    "strided": lambda x, y: torch.empty_like(x.t()),
    "boolean": lambda x, y: torch.where(x > 0, x, y).any(),
}


def described(result: Any, *known: Tensor) -> list[Any]:
    """All that is known of fake tensors: metadata, bytes, and which storages they share."""
    storages = [tensor.untyped_storage()._cdata for tensor in known]
    rows: list[Any] = []
    for tensor in tree_leaves(result):
        if not isinstance(tensor, Tensor):
            rows.append(tensor)
            continue
        assert isinstance(tensor, FakeTensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages.append(storage._cdata)
        rows.append(
            (
                tensor.shape,
                tensor.stride(),
                tensor.storage_offset(),
                tensor.dtype,
                tensor.device,
                tensor.requires_grad,
                tensor.is_conj(),
                storage.nbytes(),
                storages.index(storage._cdata),
                [other is tensor for other in known],
            )
        )
    return rows


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_make_again_what_they_made(name: str) -> None:
    """Metadata and storages, of the first call, of a second and of one with other shapes."""
    recall = Recall()
    function = OPERATORS[name]
    with FakeTensorMode():
        for shape in ((6, 4), (6, 4), (4, 8)):
            x, y = torch.ones(shape), torch.ones(shape)
            expected = described(function(x, y), x, y)
            x, y = torch.ones(shape), torch.ones(shape)
            with StorageMeter(run=recall):
                result = function(x, y)
            assert described(result, x, y) == expected


def test_what_is_remembered_is_differentiated_and_freed() -> None:
    with FakeTensorMode():
        recall = Recall()
        for _ in range(2):
            x = torch.ones(8, 8, requires_grad=True)
            with StorageMeter(run=recall) as meter:
                meter.track([x], "parameters")
                loss = (x @ x).relu().sum()
                loss.backward()
                assert x.grad is not None
                assert x.grad.shape == (8, 8)
                del loss
                x.grad = None
                assert meter.total == 8 * 8 * 4


def test_operators_whose_results_depend_on_values_fail_as_before() -> None:
    with FakeTensorMode(), StorageMeter(run=Recall()):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="nonzero"):
                torch.ones(4).nonzero()
            assert float(torch.tensor(3.0) + 1) == 4.0


#: Each reads parameters in its own way: gathered rows, products, scales, biases.
FORWARD_ONLY = ["MeZO", "MeZO, in place", "LOZO", "HiZOO", "ConMeZO", "FZOO"]
PLAYABLE = {"llama": FEW, "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}, "t5": KINDS["t5"]}


@pytest.mark.parametrize("kind", [*PLAYABLE, "vit"])
def test_recorded_passes_take_what_passes_under_each_method_take(kind: str) -> None:
    """To the byte. A pass that keeps a view of a parameter (vit's first token) runs each time."""
    spec = quiet(kind, {**KINDS, **PLAYABLE}[kind])
    with fake(torch.bfloat16):
        short = Simulation(spec, False, 8)
        whole = Simulation(spec, False, 8, whole=True)
        for method in methods(8, 4):
            if method.name in FORWARD_ONLY:
                assert short.estimate(method, 2) == whole.estimate(method, 2), method.name
        assert short._whole is not None
        assert whole._whole is not None
        assert (short._whole._tape(2, 8) is not None) == (kind in PLAYABLE)
        assert whole._whole._tape(2, 8) is None


class Keeps(nn.Module):
    """Its first pass leaves a tensor behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kept: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        self.kept = self.linear(input)
        return self.kept


class Writes(nn.Linear):
    """It counts its calls in a parameter."""

    def forward(self, input: Tensor) -> Tensor:
        self.bias.add_(1.0)
        return super().forward(input)


@pytest.mark.parametrize("model", [Keeps, lambda: Writes(8, 8)])
def test_passes_that_differ_from_call_to_call_are_not_recorded(
    model: Callable[[], nn.Module],
) -> None:
    with FakeTensorMode(), pytest.raises(Unplayable):
        Tape(model(), {"input": torch.ones(2, 8)}, Recall())


def test_a_read_that_makes_another_result_ends_the_playing() -> None:
    with fake(torch.float32):
        model = nn.Linear(8, 8)
        tape = Tape(model, {"input": torch.ones(2, 8)}, Recall())
        wider = torch.empty(9, 8)
        with StorageMeter() as meter:
            meter.track([*model.parameters(), wider], "workspace")
            meter.enter_phase("forward")
            known = meter.total
            for trained in (True, False):
                model.requires_grad_(trained)
                meter.forget_peaks()
                tape.play(meter)
                assert meter.total == known
                assert meter.peak == known + 2 * 8 * 4 + 4
            model.requires_grad_()
            model.weight.data, model.bias.data = wider, torch.empty(9)
            with pytest.raises(Unplayable, match=r"linear.* made 72 bytes"):
                tape.play(meter)
