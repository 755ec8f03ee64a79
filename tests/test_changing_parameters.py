"""Parameters that change while a run goes on: state follows, or an error says what to do."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import zoopt
from tests.test_selection_wrappers import IDS, llama

#: peft asks transformers by a name that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FIRST_ORDER: dict[str, Any] = {
    "adamw": lambda params: zoopt.AdamW(params, lr=1e-2),
    "int8": lambda params: zoopt.AdamW(params, lr=1e-2, state_dtype="int8"),
    "galore": lambda params: zoopt.GaLoreAdamW(params, lr=1e-2, rank=2, seed=0),
    "fira": lambda params: zoopt.Fira(params, lr=1e-2, rank=2, seed=0),
    "ldadam": lambda params: zoopt.LDAdamW(params, lr=1e-2, rank=2, seed=0),
    "sm3": lambda params: zoopt.SM3(params, lr=1e-2),
    "spiel": lambda params: zoopt.SparseDeltaAdamW(params, lr=1e-2, density=0.2, seed=0),
}


class Adapter(nn.Module):
    """A frozen layer and a LoRA whose rank grows (TriAdaptLoRA) or shrinks (pruning)."""

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(12, 10).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, 12) / 4)
        self.up = nn.Parameter(torch.randn(10, rank) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return out

    def resize(self, rank: int) -> None:
        """In place, as adapters that grow do: the parameters stay the same objects."""
        with torch.no_grad():
            for param, axis in ((self.down, 0), (self.up, 1)):
                old = param.detach()
                size = list(old.shape)
                size[axis] = rank
                new = torch.zeros(size)
                keep = min(rank, old.shape[axis])
                new.narrow(axis, 0, keep).copy_(old.narrow(axis, 0, keep))
                param.data = new
                param.grad = None


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def loss_of(model: nn.Module) -> torch.Tensor:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    loss: torch.Tensor = (model(x) - x[:, :10].sin()).square().mean()
    return loss


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.parametrize("rank", [7, 2], ids=["grows", "is pruned"])
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_an_adapter_of_another_rank(name: str, rank: int) -> None:
    """Refused before anything changes; with its state dropped the run goes on as a new one does."""
    model = Adapter()
    optimizer = FIRST_ORDER[name](named(model))
    step(model, optimizer)
    model.resize(rank)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"the parameter has changed since; drop its state by"):
        step(model, optimizer)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    for param in (model.down, model.up):
        optimizer.state.pop(param)
    fresh = FIRST_ORDER[name](named(before))
    for _ in range(3):
        step(model, optimizer)
        step(before, fresh)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.declared_state_bytes() == fresh.declared_state_bytes()


@pytest.mark.parametrize("rank", [7, 2], ids=["grows", "is pruned"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_adapter_of_another_rank_by_forward_passes(momentum: float, rank: int) -> None:
    """Without state the run just goes on; a stored buffer is of the old shape."""
    model = Adapter()
    optimizer = zoopt.MeZO(named(model), lr=1e-2, momentum=momentum, seed=0)
    optimizer.step(lambda: loss_of(model))
    model.resize(rank)
    if not momentum:
        before = model.up.detach().clone()
        optimizer.step(lambda: loss_of(model))
        assert not torch.equal(model.up, before)
        return
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="the parameter has changed since; drop its state by"):
        optimizer.step(lambda: loss_of(model))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_columns_that_are_frozen_one_after_the_other(name: str) -> None:
    """LaMDA's: a factor kept as a parameter a column; what is frozen keeps weights and state."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.columns = nn.ParameterList(torch.randn(10, 1) / 4 for _ in range(4))
            self.down = nn.Parameter(torch.randn(4, 12) / 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.down.T @ torch.cat(list(self.columns), 1).T

    model = Columns()
    optimizer = FIRST_ORDER[name](named(model))
    for number, column in enumerate(model.columns):
        step(model, optimizer)
        column.requires_grad_(False)
        column.grad = None
        frozen = [c.detach().clone() for c in model.columns[: number + 1]]
        state = {k: v.clone() for k, v in optimizer.state[column].items()}
        step(model, optimizer)
        for own, kept in zip(model.columns, frozen, strict=False):
            assert torch.equal(own, kept)
        assert all(torch.equal(v, state[k]) for k, v in optimizer.state[column].items())
    live = [param for _, param in named(model)]
    assert live == [model.down]
    assert optimizer.declared_state_bytes() == sum(
        v.nbytes for v in optimizer.state[model.down].values()
    )


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_layers_that_are_pruned_and_experts_that_are_skipped(name: str) -> None:
    """What has no gradient keeps every bit, and its state; the checkpoint stays loadable."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
            self.used = [0, 1, 2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number in self.used:
                x = x + torch.tanh(self.layers[number](x))
            return x[:, :10]

    model = Layers()
    optimizer = FIRST_ORDER[name](named(model))
    step(model, optimizer)
    model.used = [0, 2]
    weight = model.layers[1].weight
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    step(model, optimizer)
    assert torch.equal(weight, before)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[weight].items())
    model.used = [0, 1, 2]
    step(model, optimizer)
    assert not torch.equal(weight, before)
    other = Layers()
    loaded = FIRST_ORDER[name](named(other))
    loaded.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    step(model, optimizer)
    step(other, loaded)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("chosen", [[0], [1]])
def test_adapters_on_some_of_the_layers(chosen: list[int]) -> None:
    """peft's `layers_to_transform` (Flexora): projections and groups follow what there is."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=chosen)
    model = peft.get_peft_model(llama(), config)
    groups = zoopt.lowrank.param_groups(model, rank=2)
    names = [name for name, _ in groups[0]["params"]]
    assert len(names) == 4
    assert all(f".layers.{chosen[0]}." in name for name in names)
    optimizer = zoopt.GaLoreAdamW(groups, lr=1e-2, seed=0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(names)
    mezo = zoopt.MeZO(named(model), lr=1e-3, seed=0)
    mezo.step(lambda: model(input_ids=IDS, labels=IDS).loss)
