"""What holds of every choice of what trains, whatever wraps the optimizer: one row each.

A run that is loaded in its middle continues to the bit, in float32 and in bfloat16, from files that
`torch.load(..., weights_only=True)` reads; the same seed is the same run; what does not train keeps
its bits; and undone, the model trains as before.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zoopt


class Block(nn.Module):
    """An MLP with a norm, beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    """Repeated blocks between two layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(x)
        return out


def loss_of(model: nn.Module, seed: int = 1) -> torch.Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return (model(x.to(dtype)).float() - torch.sin(3 * x[:, :4])).square().mean()


@dataclasses.dataclass
class Run:
    """A model, its optimizer, and what chooses: `own`, if it has a state dict of its own."""

    model: nn.Module
    optimizer: Any
    own: Any = None
    handle: Any = None

    def parts(self) -> list[Any]:
        """What a checkpoint holds."""
        return [part for part in (self.model, self.optimizer, self.own) if part is not None]

    def step(self) -> float:
        if isinstance(self.optimizer, zoopt.QES | zoopt.MeZO):
            return float(self.optimizer.step(lambda: loss_of(self.model)))
        self.optimizer.zero_grad()
        loss = loss_of(self.model)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def adamw(model: nn.Module, lr: float = 1e-2) -> Any:
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return zoopt.AdamW(params, lr=lr, seed=0)


def half(model: nn.Module, seed: int) -> Run:
    optimizer = adamw(model)
    handle = zoopt.HalfFineTuning(model, optimizer, round_steps=3, seed=seed)
    return Run(model, optimizer, handle=handle)


def green(model: nn.Module, seed: int) -> Run:
    optimizer = adamw(model)
    options = {"budget": 0.5, "select_every": 3}
    handle = zoopt.GreenTrainer(model, optimizer, lambda: loss_of(model, 2), **options)
    return Run(model, optimizer, handle=handle)


def ggpo(model: nn.Module, seed: int) -> Run:
    optimizer = adamw(model)
    handle = zoopt.LoRAGGPO(model, optimizer, seed=seed)
    return Run(model, optimizer, handle, handle)


def cofitune(model: nn.Module, seed: int) -> Run:
    optimizer = adamw(model)
    losses = [lambda: loss_of(model, 2)]
    handle = zoopt.CoFiTune(model, optimizer, losses, target=["*.1.up", "*.1.down"], seed=seed)
    return Run(model, optimizer, handle, handle)


def lora_sb(model: nn.Module, seed: int) -> Run:
    losses = [lambda: loss_of(model, 2)]
    zoopt.nn.convert_to_lora_sb(model, losses, rank=4, lr=1e-3)
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith(".core"))
    return Run(model, adamw(model))


def spiel(model: nn.Module, seed: int) -> Run:
    params = [(n, p) for n, p in model.named_parameters() if p.dim() == 2]
    options = {"density": 0.2, "update_gap": 4, "window": 3, "seed": seed}
    return Run(model, zoopt.SparseDeltaAdamW(params, lr=1e-2, **options))


def spiel_int4(model: nn.Module, seed: int) -> Run:
    zoopt.nn.convert_to_quantised(model, group_size=8)
    deltas = zoopt.nn.convert_to_sparse_delta(model, density=0.2)
    options = {"update_gap": 4, "window": 3, "seed": seed}
    return Run(model, zoopt.SparseDeltaAdamW(deltas, lr=1e-2, **options))


def peqa(model: nn.Module, seed: int) -> Run:
    zoopt.nn.convert_to_quantised(model, group_size=8)
    return Run(model, zoopt.AdamW(zoopt.nn.train_scales(model), lr=1e-2, seed=seed))


def qzo(model: nn.Module, seed: int) -> Run:
    zoopt.nn.convert_to_quantised(model, group_size=8, form="log")
    options = {"lr": 1.0, "zo_eps": 1e-2, "max_projected_grad": 1.0, "num_probes": 8}
    return Run(model, zoopt.MeZO(zoopt.nn.train_scales(model), seed=seed, **options))


def qes(model: nn.Module, seed: int) -> Run:
    zoopt.nn.convert_to_quantised(model, group_size=8)
    return Run(model, zoopt.QES(model, lr=100.0, num_probes=8, window=5, seed=seed))


ROWS: dict[str, Callable[[nn.Module, int], Run]] = {
    "half fine-tuning": half,
    "green trainer": green,
    "lora-ggpo": ggpo,
    "cofitune": cofitune,
    "lora-sb": lora_sb,
    "spiel": spiel,
    "spiel over int4": spiel_int4,
    "peqa": peqa,
    "qzo": qzo,
    "qes": qes,
}
CASES = [(name, dtype) for name in ROWS for dtype in (torch.float32, torch.bfloat16)]


def same(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_resume_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """Saved in the middle of a round, a window, a gap; another seed, and other choices meanwhile,
    are forgotten."""
    run = ROWS[name](Net(dtype), 3)
    again = ROWS[name](Net(dtype), 3)
    file = io.BytesIO()
    for number in range(11):
        if number == 7:
            torch.save([part.state_dict() for part in run.parts()], file)
        assert run.step() == again.step()
    assert same(run.model, again.model)
    assert not same(run.model, ROWS[name](Net(dtype), 3).model)
    resumed = ROWS[name](Net(dtype), 8)
    resumed.step()
    file.seek(0)
    for part, state in zip(resumed.parts(), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for _ in range(4):
        resumed.step()
    assert same(run.model, resumed.model)


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_falls_and_what_rests_keeps_its_bits(name: str) -> None:
    run = ROWS[name](Net(torch.float32), 0)
    start = loss_of(run.model.eval()).item()
    run.model.train()
    for _ in range(12):
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        trains = {n for n, p in run.model.named_parameters() if p.requires_grad}
        run.step()
        if name != "lora-ggpo":  # Its noise is on the weights until the next step.
            moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
            assert moved <= trains
    assert loss_of(run.model.eval()).item() < 0.97 * start
    if run.handle is not None:
        run.handle.remove()
        assert all(param.requires_grad for param in run.model.parameters())
        assert not [
            key for key in run.optimizer.param_groups[0] if key.startswith(("green", "hft"))
        ]


@pytest.mark.parametrize("first", [half, green, ggpo, cofitune])
def test_an_optimizer_is_wrapped_once(first: Callable[[nn.Module, int], Run]) -> None:
    """Noise would be saved as weights, or what rests trained, by a second one; the same holds for
    updates in the backward pass."""
    run = first(Net(torch.float32), 0)
    before = copy.deepcopy(run.model.state_dict())
    trains = [param.requires_grad for param in run.model.parameters()]
    again: list[Callable[[], Any]] = [
        lambda: zoopt.HalfFineTuning(run.model, run.optimizer, round_steps=3),
        lambda: zoopt.GreenTrainer(
            run.model, run.optimizer, lambda: loss_of(run.model), budget=0.5
        ),
        lambda: zoopt.LoRAGGPO(run.model, run.optimizer),
        lambda: zoopt.CoFiTune(
            run.model, run.optimizer, [lambda: loss_of(run.model)], target=["*.1.up"]
        ),
    ]
    for wrap in again:
        with pytest.raises(ValueError, match=r"optimizer must not be under .* yet, got one that"):
            wrap()
    if run.handle.unfused is not None:
        with pytest.raises(ValueError, match=f"must not be under {run.handle.label}, got one that"):
            zoopt.fuse_backward(run.model, run.optimizer)
    assert [param.requires_grad for param in run.model.parameters()] == trains
    assert all(torch.equal(v, before[n]) for n, v in run.model.state_dict().items())
    run.handle.remove()
    other = again[2]()
    run.handle.remove()
    with pytest.raises(ValueError, match="must not be under LoRAGGPO yet"):
        again[2]()
    other.remove()


DAMAGE = [math.nan, -1, "x", 10**400, np.float64(2), None, [], 0.5, True, {"a": None}, [[-1]]]


def saved_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """Where a state dict holds the run's own numbers."""
    found = state.get("param_groups", [state])[0]
    return {key: found[key] for key in found if found is state or key.startswith(("hft", "green"))}


@pytest.mark.parametrize(
    "name", ["half fine-tuning", "green trainer", "lora-ggpo", "cofitune", "qes"]
)
def test_damaged_states_are_refused_whole(name: str) -> None:
    run = ROWS[name](Net(torch.float32), 3)
    for _ in range(4):
        run.step()
    part = run.own or run.optimizer
    saved = copy.deepcopy(part.state_dict())
    trains = [param.requires_grad for param in run.model.parameters()]

    def refused(damaged: dict[str, Any]) -> None:
        with pytest.raises((ValueError, TypeError), match=r"must (be|have)"):
            part.load_state_dict(damaged)
        assert str(part.state_dict()) == str(saved)
        assert [param.requires_grad for param in run.model.parameters()] == trains

    for key, value in saved_numbers(saved).items():
        absent = object()
        for bad in (*DAMAGE, absent):
            if key == "steps" and isinstance(bad, list) and not bad:  # before a first step
                continue
            if key.endswith(("round_steps", "select_every")) and type(bad) is int and bad > 0:
                continue  # as their constructors take
            damaged = copy.deepcopy(saved)
            place = damaged.get("param_groups", [damaged])[0]
            if bad is absent:
                del place[key]
            else:
                place[key] = bad
            refused(damaged)
        if isinstance(value, dict):
            for own in value:
                vector = value[own]
                for tensor in (None, vector.to("meta"), vector[1:], vector.int(), vector[None]):
                    damaged = copy.deepcopy(saved)
                    damaged[key][own] = tensor
                    refused(damaged)
            # Another memory layout, or a wider dtype, holds the same numbers.
            spread = {k: torch.stack((v, v), 1)[:, 0].double() for k, v in value.items()}
            part.load_state_dict({**saved, key: spread})
            assert str(part.state_dict()) == str(saved)


@pytest.mark.parametrize(
    "damage", [[[]], [[(0, math.nan)]], [[(1 << 32, 1.0)]], [[(0,)]], [[0]], [[(0, None)]]]
)
def test_damaged_windows_of_qes_are_refused(damage: Any) -> None:
    run = qes(Net(torch.float32), 3)
    run.step()
    saved = run.optimizer.state_dict()
    with pytest.raises((ValueError, TypeError), match=r"must (be|have)"):
        run.optimizer.load_state_dict({**saved, "steps": damage})
    assert run.optimizer.state_dict() == saved


def test_a_learning_rate_of_qes_may_be_a_tensor() -> None:
    models = Net(torch.float32), Net(torch.float32)
    runs = [qes(model, 3) for model in models]
    runs[1].optimizer.lr = torch.tensor(runs[0].optimizer.lr)
    for run in runs:
        run.step()
    assert same(*models)
    assert runs[0].optimizer.state_dict() == runs[1].optimizer.state_dict()
    file = io.BytesIO()
    torch.save(runs[1].optimizer.state_dict(), file)
    file.seek(0)
    [step] = torch.load(file, weights_only=True)["steps"]
    assert all(type(weight) is float for _, weight in step)


@pytest.mark.parametrize("name", ROWS)
def test_no_default_device_reaches_a_step(name: str) -> None:
    """Rounds, windows and choices are due meanwhile."""
    runs = [ROWS[name](Net(torch.float32), 3) for _ in range(2)]
    losses: dict[int, Any] = {}

    def loss(model: nn.Module, seed: int = 1) -> torch.Tensor:
        with torch.device("cpu"):
            return original(model, seed)

    original = loss_of
    for number, run in enumerate(runs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "loss_of", loss)
            with torch.device("meta" if number else "cpu"):
                losses[number] = [run.step() for _ in range(4)]
    assert losses[0] == losses[1]
    assert same(runs[0].model, runs[1].model)


@pytest.mark.parametrize("form", ["linear", "log"])
@pytest.mark.parametrize("fault", [(0, 4), (4, 0), math.nan, math.inf])
def test_weights_that_no_code_holds_are_refused_whole(fault: Any, form: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's initialisation is a no-op without elements
        sizes = fault if type(fault) is tuple else (4, 4)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(*sizes))
    if type(fault) is float:
        model[1].weight.data[1, 2] = fault
    before = list(model)
    with pytest.raises(ValueError, match=r"must have elements, finite ones, got .* '1.weight'"):
        zoopt.nn.convert_to_quantised(model, ["*"], form=form)
    if type(fault) is tuple:
        with pytest.raises(ValueError, match="base must have weights, got "):
            zoopt.nn.convert_to_sparse_delta(model, ["*"])
    assert list(model) == before


def test_a_pattern_that_is_no_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"target must be a regular expression .* in a list"):
        zoopt.nn.convert_to_quantised(Net(torch.float32), "*.up")


def test_qes_warns_of_a_loss_of_16_bits_once() -> None:
    run = qes(Net(torch.float32), 3)
    run.optimizer.sigma = 1e-6
    with pytest.warns(UserWarning, match=r"has only 16 bits.* or raise sigma") as caught:
        run.optimizer.step(lambda: loss_of(run.model).bfloat16())
    assert len(caught) == 1
    for _ in range(2):
        run.optimizer.step(lambda: loss_of(run.model).bfloat16())


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_green_trainer_keeps_its_choice_at_a_rate_of_zero(rate: Any) -> None:
    """As at the end of a linear schedule, where a step changes nothing."""
    run = green(Net(torch.float32), 3)
    for _ in range(2):
        run.step()
    chosen = run.optimizer.param_groups[0]["green_chosen"]
    run.optimizer.param_groups[0]["lr"] = rate
    for _ in range(4):
        run.step()
    assert run.optimizer.param_groups[0]["green_chosen"] == chosen
    assert run.optimizer.param_groups[0]["green_step"] == 6
