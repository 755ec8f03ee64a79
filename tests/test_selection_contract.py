"""What holds of every choice of what trains, whatever wraps the optimizer: one row each.

A run that is loaded in its middle continues to the bit, in float32 and in bfloat16, from files that
`torch.load(..., weights_only=True)` reads; the same seed is the same run; what does not train keeps
its bits; and undone, the model trains as before.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

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
            key for key in run.optimizer.param_groups[0] if key.startswith(("green", "half"))
        ]
