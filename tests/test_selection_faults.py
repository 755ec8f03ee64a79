"""Gradients that are huge or not finite, and errors in the middle, of what chooses what trains."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import zoopt
from tests.test_selection_contract import ROWS, Net, Run, adamw, loss_of, same
from zoopt.selection.cofitune import normalised_importance
from zoopt.selection.ggpo import row_squares

FED_BY_BACKWARD = [name for name in ROWS if name not in ("qzo", "qes")]


def advance(run: Run, steps: int, factor: float = 1.0) -> None:
    """Steps from the gradients of the loss times a factor."""
    for _ in range(steps):
        run.optimizer.zero_grad()
        loss_of(run.model).backward()
        for param in run.model.parameters():
            if param.grad is not None:
                param.grad.mul_(factor)
        run.optimizer.step()


@pytest.mark.parametrize("factor", [1e10, 1e18, 1e30])
@pytest.mark.parametrize("name", FED_BY_BACKWARD)
def test_gradients_that_are_huge_leave_finite_weights(name: str, factor: float) -> None:
    run = ROWS[name](Net(torch.float32), 3)
    advance(run, 2, factor)
    advance(run, 3)
    assert math.isfinite(loss_of(run.model).item())
    for value in run.model.state_dict().values():
        assert not value.is_floating_point() or bool(value.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_row_norms_at_every_scale(dtype: torch.dtype) -> None:
    before = torch.full((6,), 7.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    gradient = torch.ones(6, 4, dtype=dtype)
    most, limit = torch.finfo(dtype).max, torch.finfo(before.dtype).max
    gradient[1], gradient[2], gradient[3, 1] = 3.0, most, math.nan
    gradient[4, 0], gradient[5] = -math.inf, 0.0
    assert row_squares(gradient, before).tolist() == [4.0, 36.0, limit, 7.0, 7.0, 0.0]
    assert row_squares(gradient[:, :0], before) is before
    few = gradient[2:].clone()
    few[0], few[1] = 0.0, 2.0
    for axes in (1, 2):
        made = row_squares(few.to_sparse(axes), before[2:])
        assert made.tolist() == [0.0, 16.0, 7.0, 0.0]


def test_a_gradient_that_is_not_finite_is_forgotten_by_ggpo() -> None:
    """The next noise is that of the last finite gradient. The optimizer here skips such steps."""
    model = Net(torch.float32)
    optimizer = adamw(model)
    ggpo = zoopt.LoRAGGPO(model, optimizer, seed=3)
    run = Run(model, optimizer, ggpo, ggpo)
    advance(run, 2)
    before = {name: value.clone() for name, value in ggpo.state_dict()["squares"].items()}
    loss_of(model).backward()
    for param in model.parameters():
        assert param.grad is not None
        param.grad.fill_(math.nan)
    ggpo._before_step((optimizer,), {})
    ggpo._after_step()
    assert all(torch.equal(v, before[n]) for n, v in ggpo.state_dict()["squares"].items())
    advance(run, 2)
    assert all(bool(param.isfinite().all()) for param in model.parameters())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_importance_at_every_scale(scale: float) -> None:
    gates = torch.tensor([1.0, -2.0, 0.5, 4.0])
    expected = normalised_importance(gates.double()).float()
    torch.testing.assert_close(normalised_importance(gates * scale), expected, rtol=1e-5, atol=0.0)
    assert not normalised_importance(torch.full((3,), scale)).any()
    assert not normalised_importance(torch.zeros(3)).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_of_cofitune_must_be_finite(value: float) -> None:
    model = Net(torch.float32)
    losses = [lambda: loss_of(model) * value]
    with pytest.raises(
        ValueError, match=r"losses must have finite gradients, got .* 'layers.1.up'"
    ):
        zoopt.CoFiTune(model, adamw(model), losses, target=["*.1.up"])
    assert all(param.requires_grad for param in model.parameters())


def test_a_choice_of_green_trainer_does_not_follow_autocast() -> None:
    """At construction, and in the post-hook of a step under it."""
    models = [Net(torch.float32) for _ in range(2)]
    runs, seen = [], []

    def probe(model: nn.Module) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss_of(model, 2)

    for number, model in enumerate(models):
        with torch.autocast("cpu", enabled=bool(number)):
            options: Any = {"budget": 0.5, "select_every": 2}
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            zoopt.GreenTrainer(model, optimizer, lambda model=model: probe(model), **options)
        runs.append(Run(model, optimizer))
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()
            with torch.autocast("cpu", enabled=bool(number)):
                optimizer.step()
    assert same(models[0], models[1])
    assert not any(seen)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_choice_that_fails_is_counted_and_leaves_everything(error: Any) -> None:
    """In the probe, or in the step that is taken back: the run goes on with its last choice."""
    model = Net(torch.float32)
    optimizer = adamw(model)
    fails = [""]

    def probe() -> torch.Tensor:
        if fails[0] == "probe":
            raise error
        return loss_of(model, 2)

    green = zoopt.GreenTrainer(model, optimizer, probe, budget=0.5, select_every=2)
    run, chosen = Run(model, optimizer), list(green.chosen)
    inner = optimizer._update_all

    def update(sites: Any) -> None:
        inner(sites)
        if fails[0] == "step" and green._selecting:
            optimizer._interrupted = (None,)  # as an error inside an update does
            raise error

    optimizer._update_all = update
    for number, where in enumerate(("probe", "step")):
        fails[0] = ""
        run.step()
        # What the step itself makes of the weights, without a choice.
        twin = copy.deepcopy(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(green, "_count", lambda: None)
            saved = copy.deepcopy(optimizer.state_dict())
            run.step()
            expected = copy.deepcopy(model.state_dict()), str(optimizer.state_dict()["state"])
        model.load_state_dict(twin.state_dict())
        optimizer.load_state_dict(saved)
        fails[0] = where
        with pytest.raises(error):
            run.step()
        assert [group["green_step"] for group in optimizer.param_groups] == [2 * number + 2]
        assert all(torch.equal(v, expected[0][n]) for n, v in model.state_dict().items())
        assert str(optimizer.state_dict()["state"]) == expected[1]
        assert all(first is second for first, second in zip(green.chosen, chosen, strict=True))
    fails[0] = ""
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    optimizer.step()  # nothing is left to be finished
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_no_hook_sees_noise() -> None:
    """Also one that was there before."""
    model = Net(torch.float32)
    optimizer = adamw(model)
    seen = []

    def hook(*_: Any) -> None:
        seen.append(copy.deepcopy(model.state_dict()))

    optimizer.register_step_pre_hook(hook)
    zoopt.LoRAGGPO(model, optimizer, seed=3)
    before = copy.deepcopy(model.state_dict())
    Run(model, optimizer).step()
    assert all(torch.equal(value, before[name]) for name, value in seen[0].items())


def test_what_holds_no_plain_matrix_is_refused_at_once() -> None:
    """Of torchao's training tensors, for example: kernels could not write them later."""
    for build in (
        lambda model, optimizer: zoopt.LoRAGGPO(model, optimizer),
        lambda model, optimizer: zoopt.CoFiTune(
            model, optimizer, [lambda: loss_of(model)], target=["head"]
        ),
    ):
        model = Net(torch.float32)
        weight = model.head.weight.detach()
        model.head.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(TypeError, match="must be plain tensors, got the subclass"):
            build(model, optimizer)
        assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("name", ["half fine-tuning", "green trainer", "lora-ggpo", "cofitune"])
def test_handles_are_not_copied(name: str, copied: Any) -> None:
    """A copy would be without hooks, and go on as if nothing were to be chosen."""
    run = ROWS[name](Net(torch.float32), 3)
    with pytest.raises(TypeError, match="cannot be copied or pickled, since the hooks"):
        copied(run.handle)


def test_a_choice_under_inference_mode() -> None:
    models = [Net(torch.float32) for _ in range(2)]
    for number, model in enumerate(models):
        run = ROWS["green trainer"](model, 3)
        for _ in range(4):
            run.optimizer.zero_grad()
            loss_of(model).backward()
            with torch.inference_mode(bool(number)):
                run.optimizer.step()
    assert same(*models)


@pytest.mark.parametrize("form", ["argument", "keyword"])
@pytest.mark.parametrize("name", FED_BY_BACKWARD)
def test_a_step_with_a_closure_is_one_without(name: str, form: str) -> None:
    """As Lightning calls it: gradients come, and weights are perturbed, inside of the step."""
    runs = [ROWS[name](Net(torch.float32), 3) for _ in range(2)]

    def closure(run: Run) -> torch.Tensor:
        run.optimizer.zero_grad()
        loss = loss_of(run.model)
        loss.backward()
        return loss

    for _ in range(6):
        runs[0].step()
        given: Any = functools.partial(closure, runs[1])
        args, kwargs = ((given,), {}) if form == "argument" else ((), {"closure": given})
        runs[1].optimizer.step(*args, **kwargs)
    for run in runs:
        if hasattr(run.handle, "restore"):
            run.handle.restore()
    assert same(runs[0].model, runs[1].model)


def test_a_copy_of_the_model_gets_no_noise() -> None:
    """An average of weights is a copy, with the hooks of the model."""
    model = Net(torch.float32)
    optimizer = adamw(model)
    zoopt.LoRAGGPO(model, optimizer, seed=3)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        Run(model, optimizer).step()
        average.update_parameters(model)
        before = [copy.deepcopy(each.state_dict()) for each in (model, average)]
        loss_of(average)
        loss_of(average.eval())
        for each, own in zip((model, average), before, strict=True):
            assert all(torch.equal(v, own[n]) for n, v in each.state_dict().items())
        average.train()


@pytest.mark.parametrize("kind", ["ggpo", "cofitune", "green", "half"])
@pytest.mark.parametrize("optimizer", ["mezo", "hybrid", "lbfgs"])
def test_optimizers_that_do_not_step_from_own_gradients(kind: str, optimizer: str) -> None:
    model = Net(torch.float32)
    named = list(model.named_parameters())
    own: Any = {
        "mezo": lambda: zoopt.MeZO(named),
        "hybrid": lambda: zoopt.Hybrid(zoopt.MeZO(named[:8]), torch.optim.SGD(named[8:])),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters()),
    }[optimizer]()
    build: Any = {
        "ggpo": lambda: zoopt.LoRAGGPO(model, own),
        "cofitune": lambda: zoopt.CoFiTune(model, own, [lambda: loss_of(model)], target=["head"]),
        "green": lambda: zoopt.GreenTrainer(model, own, lambda: loss_of(model), budget=0.5),
        "half": lambda: zoopt.HalfFineTuning(model, own, round_steps=1),
    }[kind]
    if (kind, optimizer) in (("half", "mezo"), ("half", "hybrid"), ("ggpo", "lbfgs")):
        build()
        return
    with pytest.raises(TypeError, match=r"optimizer must (be a first-order one|update parameters)"):
        build()
    assert all(param.requires_grad for param in model.parameters())


def test_cofitune_says_what_it_could_not_hold_back() -> None:
    run = ROWS["cofitune"](Net(torch.float32), 3)
    run.optimizer.register_step_post_hook(lambda *_: None)
    run.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.handle, "_after_step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.step()
    with pytest.warns(UserWarning, match="CoFiTune could not hold back the last step"):
        run.step()
    run.step()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ["half fine-tuning", "lora-ggpo", "cofitune"])
def test_a_step_may_be_compiled(name: str) -> None:
    """torch's step, whose hooks are none of the graph."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch:
            sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
            patch.setattr("tests.test_selection_contract.adamw", sgd)
            run = ROWS[name](Net(torch.float32), 3)
        take: Any = run.optimizer.step
        if compiled:
            take = torch.compile(take, backend="eager")
        for _ in range(5):
            run.optimizer.zero_grad()
            loss_of(run.model).backward()
            take()
        if hasattr(run.handle, "restore"):
            run.handle.restore()
        runs.append(run)
    assert same(runs[0].model, runs[1].model)


def test_sharded_parameters_of_green_trainer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(torch.float32)
    monkeypatch.setattr("zoopt.selection.green_trainer.is_sharded", lambda param: param.dim() == 2)
    with pytest.raises(TypeError, match="must hold whole parameters under GreenTrainer"):
        zoopt.GreenTrainer(model, adamw(model), lambda: loss_of(model), budget=0.5)


class Embedded(nn.Module):
    """An embedding, whose gradient may be sparse, below repeated layers."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8, sparse=sparse)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.embedding(x)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h


@pytest.mark.parametrize("kind", ["half", "green", "ggpo", "cofitune"])
def test_sparse_gradients_are_those_of_dense_ones(kind: str) -> None:
    """Up to the order of sums over the same index."""
    models = [Embedded(sparse) for sparse in (False, True)]
    loss = lambda model: model(torch.tensor([[1, 2, 2], [7, 1, 19]])).square().mean()  # noqa: E731
    for model in models:
        own: Any = model, torch.optim.SGD(model.parameters(), lr=0.3)
        keep = functools.partial(loss, model)
        if kind == "half":
            zoopt.HalfFineTuning(*own, round_steps=2, seed=1)
        elif kind == "green":
            zoopt.GreenTrainer(*own, keep, budget=0.9, select_every=2)
        elif kind == "ggpo":
            ggpo = zoopt.LoRAGGPO(*own, beta=0.5, seed=1)
        else:
            zoopt.CoFiTune(*own, [keep], target=["layers.*"], seed=1)
        for _ in range(6):
            own[1].zero_grad()
            loss(model).backward()
            own[1].step()
        if kind == "ggpo":
            ggpo.restore()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
