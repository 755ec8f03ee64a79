"""Hybrid: the late gradient, accumulation, memory, checkpoints, skipped evaluations, bad input."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.utils.checkpoint import checkpoint

import zoopt
from tests.meter import peak_bytes
from zoopt import noise

PERTURBATIONS = ["inplace", "virtual"]
FIRST_ORDER: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: AdamW(params, lr=0.02, weight_decay=0.1),
}
#: Every zeroth-order optimizer that a Hybrid takes, in ways that evaluate differently.
ZEROTH_ORDER: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "MeZO": (zoopt.MeZO, {"lr": 1e-3, "momentum": 0.9}),
    "MeZO probes": (zoopt.MeZO, {"lr": 1e-3, "num_probes": 3}),
    "MeZO one-sided": (zoopt.MeZO, {"lr": 1e-3, "num_probes": 2, "estimator": "one-sided"}),
    "MeZO mask": (zoopt.MeZO, {"lr": 1e-3, "mask": "random", "density": 0.25}),
    "MeZO magnitude": (zoopt.MeZO, {"lr": 1e-3, "mask": "magnitude", "density": 0.5}),
    "MeZO blocks": (zoopt.MeZO, {"lr": 1e-3, "blocks": ["0.*", "*"]}),
    "ZOAdam": (zoopt.ZOAdam, {"lr": 1e-3}),
    "ZOAdam window": (zoopt.ZOAdam, {"lr": 1e-3, "state": "window", "window": 3}),
    "ZOSignSGD": (zoopt.ZOSignSGD, {"lr": 1e-3}),
    "FZOO": (zoopt.FZOO, {"lr": 1e-3, "num_probes": 4}),
    "LOZO": (zoopt.LOZO, {"lr": 1e-3, "basis_update_gap": 2, "momentum": 0.7}),
    "SubZero": (zoopt.SubZero, {"lr": 1e-3, "rank": 2}),
    "ZOMuon": (zoopt.ZOMuon, {"lr": 1e-3}),
    "HiZOO": (zoopt.HiZOO, {"lr": 1e-3, "hessian_smooth": 1e-3}),
    "ConMeZO": (zoopt.ConMeZO, {"lr": 1e-3}),
}


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        *(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh()),
        *(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2)),
    )
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return model.to(dtype)


LATE = ("4.", "6.", "7.")


def split(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    named = list(model.named_parameters())
    early = [(name, param) for name, param in named if not name.startswith(LATE)]
    return early, [(name, param) for name, param in named if name.startswith(LATE)]


def hybrid(
    model: nn.Module,
    first_order: Callable[[Any], Optimizer] = FIRST_ORDER["SGD"],
    cls: type[Any] = zoopt.MeZO,
    **options: Any,
) -> zoopt.Hybrid:
    early, late = split(model)
    return zoopt.Hybrid(cls(early, **{"lr": 1e-3, "seed": 7, **options}), first_order(late))


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 6, generator=generator)
    return x.to(dtype), torch.stack((x.sum(1).tanh(), x[:, 0] * x[:, 1]), 1).to(dtype)


def closure_of(model: nn.Module, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    """The loss in float32 at least: of bfloat16 it would be mostly rounding."""
    x, y = data(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return lambda: (model(x) - y).to(wide).square().mean()


def bits(tensors: Any) -> list[Tensor]:
    return [tensor.detach().clone().view(torch.uint8) for tensor in tensors]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def loss_at(weights: dict[str, Tensor]) -> Tensor:
    x, y = data()
    return (torch.func.functional_call(mlp(), weights, (x,)) - y).square().mean()


def by_hand(
    steps: int, kind: str, *, num_probes: int, one_sided: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """MeZO on the early parameters; SGD or AdamW, as published, on the mean late gradient."""
    lr, zo_eps = 1e-3, 1e-3
    theta = {name: param.detach().clone() for name, param in mlp().named_parameters()}
    early = [name for name in theta if not name.startswith(LATE)]
    late = [name for name in theta if name.startswith(LATE)]
    first = {name: torch.zeros_like(theta[name]) for name in late}
    second = {name: torch.zeros_like(theta[name]) for name in late}
    means = []

    def evaluate(z: dict[str, Tensor], scale: float) -> tuple[float, list[Tensor]]:
        weights = {name: theta[name] + scale * zo_eps * z[name] for name in early}
        leaves = [theta[name].clone().requires_grad_() for name in late]
        loss = loss_at({**weights, **dict(zip(late, leaves, strict=True))})
        return loss.item(), list(torch.autograd.grad(loss, leaves))

    for step in range(steps):
        draws = range(step * num_probes, (step + 1) * num_probes)
        zs = [
            {
                name: noise.normal(
                    theta[name].numel(), seed=7, stream=noise.stream(name), draw=draw
                )
                .double()
                .view_as(theta[name])
                for name in early
            }
            for draw in draws
        ]
        base = evaluate(zs[0], 0.0)
        points = [base] if one_sided else []
        update = {name: torch.zeros_like(theta[name]) for name in early}
        losses = []
        for z in zs:
            plus = evaluate(z, 1.0)
            points.append(plus)
            other = base
            if not one_sided:
                other = evaluate(z, -1.0)
                points.append(other)
            slope = (plus[0] - other[0]) / (zo_eps if one_sided else 2 * zo_eps)
            losses.append((plus[0] + other[0]) / 2)
            for name in early:
                update[name] += slope * z[name] / num_probes
        means.append(sum(losses) / num_probes)
        for i, name in enumerate(late):
            grad = sum(grads[i] for _, grads in points) / len(points)
            if kind == "SGD":
                first[name] = 0.9 * first[name] + grad + 0.01 * theta[name]
                theta[name] = theta[name] - 0.05 * first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.999 * second[name] + 0.001 * grad**2
                mean = first[name] / (1 - 0.9 ** (step + 1))
                root = (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
                theta[name] = theta[name] * (1 - 0.02 * 0.1) - 0.02 * mean / (root + 1e-8)
        for name in early:
            theta[name] = theta[name] - lr * update[name]
    return theta, means


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("kind", FIRST_ORDER)
@pytest.mark.parametrize(("num_probes", "one_sided"), [(1, False), (3, False), (2, True)])
def test_equals_the_computation_by_hand(
    kind: str, num_probes: int, one_sided: bool, perturbation: str
) -> None:
    """Five steps in float64, to 1e-10."""
    expected, losses = by_hand(5, kind, num_probes=num_probes, one_sided=one_sided)
    model = mlp()
    optimizer = hybrid(
        model,
        FIRST_ORDER[kind],
        num_probes=num_probes,
        estimator="one-sided" if one_sided else "two-sided",
        perturbation=perturbation,
    )
    for loss in losses:
        assert optimizer.step(closure_of(model)) == pytest.approx(loss, rel=1e-10)
    for name, param in model.named_parameters():
        assert (param - expected[name]).abs().max() <= 1e-10, name
        assert param.grad is None


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_takes_every_zeroth_order_optimizer(name: str, perturbation: str) -> None:
    """Early: the same bits as without Hybrid. Late: the mean of autograd's at the points seen."""
    cls, options = ZEROTH_ORDER[name]
    options = {"seed": 7, "perturbation": perturbation, **options}
    model, alone = mlp(), mlp()
    optimizer = hybrid(model, cls=cls, **options)
    other = cls(split(alone)[0], **options)
    points: list[dict[str, Tensor]] = []
    seen: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        # Read through an operator, a parameter is where the evaluation has it.
        points.append({n: (p * 1.0).detach().clone() for n, p in split(model)[0]})
        assert not any(p.requires_grad for _, p in split(model)[0])
        assert all(p.requires_grad for _, p in split(model)[1])
        return closure_of(model)()

    def record(*_: Any) -> None:
        seen.append({n: p.grad.clone() for n, p in split(model)[1]})

    optimizer.first_order.register_step_pre_hook(record)
    for step in range(4):
        points.clear()
        late = {n: p.detach().clone() for n, p in split(model)[1]}
        with torch.no_grad():
            for (_, p), (_, q) in zip(split(alone)[1], split(model)[1], strict=True):
                p.copy_(q)
        loss = optimizer.step(closure)
        assert loss == other.step(closure_of(alone))
        assert same_bits(*(bits(p for _, p in split(m)[0]) for m in (model, alone)))
        record_ = optimizer.zeroth_order.last_step
        assert record_.step == step + 1
        if step == 0:  # the run's first evaluation is made once more
            assert all(torch.equal(p, points[0][n]) for n, p in points.pop(0).items())
        for n, grad in seen[step].items():
            leaf = late[n].clone().requires_grad_()
            grads = [
                torch.autograd.grad(loss_at({**point, **late, n: leaf}), leaf)[0]
                for point in points
            ]
            assert (grad - sum(grads) / len(points)).abs().max() <= 1e-13
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_two_sided_late_gradients_are_second_order_accurate() -> None:
    """||mean - grad at theta|| falls by 4 as zo_eps is halved, one-sided by 2."""
    errors: dict[str, list[float]] = {"two-sided": [], "one-sided": []}
    for estimator, off in errors.items():
        for zo_eps in (4e-2, 2e-2):
            model = mlp()
            optimizer = hybrid(model, lr=0.0, zo_eps=zo_eps, estimator=estimator)
            closure_of(model)().backward(inputs=[p for _, p in split(model)[1]])
            exact = [p.grad for _, p in split(model)[1]]
            optimizer.zero_grad()
            optimizer.probe(closure_of(model))
            pairs = zip(split(model)[1], exact, strict=True)
            off.append(math.sqrt(sum(float((p.grad - g).square().sum()) for (_, p), g in pairs)))
    assert errors["two-sided"][0] / errors["two-sided"][1] == pytest.approx(4.0, rel=0.1)
    assert errors["one-sided"][0] / errors["one-sided"][1] == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("last", ["step()", "step(closure)"])
@pytest.mark.parametrize("name", ["MeZO", "MeZO one-sided", "ZOAdam", "LOZO", "HiZOO"])
def test_accumulation_equals_the_whole_batch(name: str, last: str, perturbation: str) -> None:
    cls, options = ZEROTH_ORDER[name]
    whole, parts = mlp(), mlp()
    x, y = data()
    results = []
    for model, micro in ((whole, 1), (parts, 4)):
        optimizer = hybrid(
            model, FIRST_ORDER["AdamW"], cls, **{**options, "perturbation": perturbation}
        )
        for _ in range(3):
            closures = [
                lambda model=model, rows=rows: (model(x[rows]) - y[rows]).square().sum() / y.numel()
                for rows in torch.arange(64).chunk(micro)
            ]
            for closure in closures[:-1] if last == "step(closure)" else closures:
                optimizer.probe(closure)
            optimizer.step(*(closures[-1:] if last == "step(closure)" else []))
        results.append(optimizer.zeroth_order.last_step.projected_grads[0])
    # Sums in another order, divided by 2 zo_eps; Adam's first steps divide by sqrt(v) again.
    assert results[0] == pytest.approx(results[1], rel=1e-9, abs=1e-9)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-10


def test_between_probes_late_gradients_are_the_sum_of_means() -> None:
    """Where torch users clip, they read what they would after backward passes."""
    model = mlp()
    optimizer = hybrid(model, zo_eps=1e-6, num_probes=2)
    late = [p for _, p in split(model)[1]]
    expected = torch.autograd.grad(closure_of(model)(), late)
    for times in (1, 2, 3):
        optimizer.probe(closure_of(model))
        for p, grad in zip(late, expected, strict=True):
            assert (p.grad - times * grad).abs().max() <= 1e-8
    optimizer.zero_grad()
    assert all(p.grad is None for p in late)
    before = bits(model.parameters())
    assert optimizer.step() is None, "zero_grad drops what both halves have added up"
    assert same_bits(before, bits(model.parameters()))


def test_a_step_without_anything_pending_changes_nothing() -> None:
    model = mlp()
    optimizer = hybrid(model, FIRST_ORDER["AdamW"])
    start = bits(model.parameters())
    assert optimizer.step() is None
    assert same_bits(start, bits(model.parameters()))
    # Gradients are a backward pass's, whose caller takes this for an optimizer that reads them.
    model(data()[0]).sum().backward()
    before, grads = bits(model.parameters()), bits(p.grad for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure, or probes that are pending"):
        optimizer.step()
    assert same_bits(before, bits(model.parameters()))
    assert same_bits(grads, bits(p.grad for p in model.parameters()))
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("name", ["MeZO", "ZOAdam", "LOZO", "FZOO", "HiZOO"])
@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_resume_is_exact(kind: str, name: str, perturbation: str, dtype: torch.dtype) -> None:
    """Saved at step 3, loaded into a new model and optimizer, run on to 7: the same bits."""
    cls, options = ZEROTH_ORDER[name]
    options = {**options, "perturbation": perturbation}

    def run(model: nn.Module, optimizer: zoopt.Hybrid, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(closure_of(model, dtype))

    whole = mlp(dtype)
    run(whole, hybrid(whole, FIRST_ORDER[kind], cls, **options), 7)
    model = mlp(dtype)
    optimizer = hybrid(model, FIRST_ORDER[kind], cls, **options)
    run(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = mlp(dtype)
    resumed.load_state_dict(weights)
    # Other hyperparameters: the checkpoint's take their place.
    restored = hybrid(resumed, FIRST_ORDER[kind], cls, **{**options, "seed": 999, "lr": 0.5})
    restored.load_state_dict(state)
    run(resumed, restored, 4)
    assert same_bits(bits(resumed.parameters()), bits(whole.parameters()))
    assert restored.zeroth_order.last_step.step == 7


def deep(layers: int, width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh()))
    )


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_memory(kind: str, perturbation: str, micro_batches: int) -> None:
    """Forward, late activations and late gradients; 4 times below backprop through all layers.

    With a an activation's bytes, of L layers k late: autograd keeps each late layer's input and the
    last one's output, (k + 1) a; evaluations and backward passes work on as much as the forward
    (2 a). A gradient of each late parameter adds up, and one is in the making; after the first
    micro-batch, the sum over earlier ones is there too. Virtually, one early weight is perturbed
    at a time.
    """
    layers, late_layers, width, batch = 24, 3, 128, 2048
    x = torch.randn(batch, width)
    activation, weight = batch * width * 4, width * width * 4

    def build() -> tuple[nn.Sequential, Callable[[], Tensor]]:
        model = deep(layers, width)
        return model, lambda: model(x).mean()

    model, closure = build()
    with torch.no_grad():
        forward = peak_bytes(closure, [x, *model.parameters()])
    assert forward == 2 * activation

    backprop = FIRST_ORDER[kind](model.parameters())

    def backprop_step() -> None:
        closure().backward()
        backprop.step()
        backprop.zero_grad()

    full = peak_bytes(backprop_step, [x, *model.parameters()])
    assert full >= layers * activation

    model, closure = build()
    late = {
        f"{2 * i}.{kind}"
        for i in range(layers - late_layers, layers)
        for kind in ("weight", "bias")
    }
    named = list(model.named_parameters())
    optimizer = zoopt.Hybrid(
        zoopt.MeZO([(n, p) for n, p in named if n not in late], perturbation=perturbation, seed=1),
        FIRST_ORDER[kind]([(n, p) for n, p in named if n in late]),
    )
    gradients = sum(p.nbytes for n, p in named if n in late)

    def step() -> None:
        for _ in range(micro_batches - 1):
            optimizer.probe(closure)
        optimizer.step(closure)

    for _ in range(2):
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        peak = peak_bytes(step, [x, *model.parameters(), *state])
        bound = forward + (late_layers + 1) * activation + micro_batches * gradients + weight
        bound += weight if perturbation == "virtual" else 0
        assert peak <= bound
        assert peak < full / 4


def test_nothing_of_the_early_layers_is_saved() -> None:
    """What autograd packs in an evaluation: late layers' inputs, and their own parameters."""
    model = mlp()
    optimizer = hybrid(model)
    x, y = data()
    saved: list[int] = []
    calls = 0

    def closure() -> Tensor:
        nonlocal calls

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            saved.clear()
            hidden = model[:4](x)
            assert not saved
            assert not hidden.requires_grad
            loss = (model[4:](hidden) - y).square().mean()
        assert hidden.data_ptr() in saved
        assert not {p.data_ptr() for _, p in split(model)[0]} & set(saved)
        calls += 1
        return loss

    optimizer.step(closure)
    assert calls == 3


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("at_call", [1, 2, 3, 6])
def test_an_exception_is_the_users_own(
    at_call: int, accumulated: bool, estimator: str, perturbation: str
) -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = hybrid(model, perturbation=perturbation, estimator=estimator, num_probes=5)
    if accumulated:
        optimizer.probe(closure_of(model))
    before = [p.detach().clone() for p in model.parameters()]
    required = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = str(optimizer.state_dict())
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = closure_of(model)()
        if calls == at_call:
            raise ZeroDivisionError("mine")
        return loss

    for call in (optimizer.step, optimizer.probe):
        calls = 0
        with pytest.raises(ZeroDivisionError, match=r"^mine$"):
            call(closure)
        assert str(optimizer.state_dict()) == state
        assert [p.requires_grad for p in model.parameters()] == required
        for param, value, grad in zip(model.parameters(), before, grads, strict=True):
            # In place, each of at most 24 passes rounds a weight below 2.
            bound = 0.0 if perturbation == "virtual" else 24 * 2.0**-53 * 2
            assert (param.detach() - value).abs().max() <= bound
            assert param.grad is grad is None or torch.equal(param.grad, grad)
    assert (optimizer.step() is not None) is accumulated


def non_finite_at(calls: set[int], model: nn.Module, value: float) -> Callable[[], Tensor]:
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        return closure_of(model)() * (value if count in calls else 1.0)

    return closure


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
@pytest.mark.parametrize("calls", [{1}, {2}, {1, 2}])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_step_without_a_usable_direction_changes_nothing(
    accumulate: bool, calls: set[int], estimator: str, value: float
) -> None:
    """One of a pair is enough: neither half moves, although the other has a gradient."""
    model = mlp()
    optimizer = hybrid(
        model, FIRST_ORDER["AdamW"], perturbation="virtual", estimator=estimator, weight_decay=0.1
    )
    optimizer.step(closure_of(model))
    before, state = bits(model.parameters()), copy.deepcopy(optimizer.first_order.state_dict())
    closure = non_finite_at(calls, model, value)
    first_order_steps: list[int] = []
    optimizer.first_order.register_step_pre_hook(lambda *_: first_order_steps.append(1))
    if accumulate:
        optimizer.probe(closure)
        assert all(p.grad is None for p in model.parameters())
    with pytest.warns(UserWarning, match="skipped 1 of 1 probes because a loss was not finite"):
        optimizer.step(*(() if accumulate else (closure,)))
    assert same_bits(before, bits(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert str(optimizer.first_order.state_dict()) == str(state)
    assert optimizer.zeroth_order.skipped_probes == 1
    assert not first_order_steps
    optimizer.step(closure_of(model))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not same_bits(before, bits(model.parameters()))


def test_of_several_evaluations_the_finite_ones_count() -> None:
    """Probes 1 and 3 of 3 are usable; the late mean is over the 5 finite evaluations."""
    model = mlp()
    optimizer = hybrid(model, num_probes=3, perturbation="virtual")
    optimizer.zeroth_order.param_groups[0]["step"] = 1  # past the evaluation made twice
    points: list[dict[str, Tensor]] = []
    closure = non_finite_at({4}, model, math.nan)

    def watched() -> Tensor:
        points.append({n: (p * 1.0).detach() for n, p in split(model)[0]})
        return closure()

    optimizer.probe(watched)
    del points[3]
    for n, p in split(model)[1]:
        late = {name: q.detach() for name, q in split(model)[1]}
        leaf = late[n].clone().requires_grad_()
        grads = [
            torch.autograd.grad(loss_at({**point, **late, n: leaf}), leaf)[0] for point in points
        ]
        assert (p.grad - sum(grads) / 5).abs().max() <= 1e-13
    with pytest.warns(UserWarning, match="skipped 1 of 3"):
        optimizer.step()


def test_a_micro_batch_without_a_usable_direction_is_left_out() -> None:
    """The step is that of the other micro-batches, in both halves."""
    models = mlp(), mlp()
    for model, extra in zip(models, (False, True), strict=True):
        optimizer = hybrid(model, FIRST_ORDER["AdamW"], perturbation="virtual")
        optimizer.probe(closure_of(model))
        if extra:
            optimizer.probe(non_finite_at({2}, model, math.inf))
            with pytest.warns(UserWarning, match="skipped 1 of 3"):
                optimizer.step(closure_of(model))
        else:
            optimizer.step(closure_of(model))
    assert same_bits(*(bits(model.parameters()) for model in models))


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_run_again_at_the_same_point(
    perturbation: str, use_reentrant: bool
) -> None:
    """A segment with early and late parameters: backward recomputes it with both perturbed."""
    results = []
    for checkpointed in (False, True):
        model = mlp()
        optimizer = hybrid(model, zo_eps=0.1, perturbation=perturbation)
        x, y = data()

        def closure(model=model, checkpointed=checkpointed, x=x, y=y) -> Tensor:
            hidden = model[:2](x)
            if checkpointed:
                # Reentrant checkpoints need an input that requires a gradient.
                hidden = hidden.requires_grad_(use_reentrant)
                output = checkpoint(model[2:], hidden, use_reentrant=use_reentrant)
            else:
                output = model[2:](hidden)
            return (output - y).square().mean()

        optimizer.probe(closure)
        results.append([p.grad.clone() for _, p in split(model)[1]])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-14


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("cls", [zoopt.MeZO, zoopt.LOZO])
@pytest.mark.parametrize("tied", ["early", "late"])
def test_tied_weights(tied: str, cls: type[Any], perturbation: str) -> None:
    """In the early half, perturbed where the head reads it; in the late half, whole gradients."""
    embedding, hidden = nn.Embedding(11, 6).double(), nn.Linear(6, 6).double()
    body = nn.Linear(6, 6).double()
    tokens = torch.arange(20) % 11

    def loss(embed: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, embed) @ inner.T
        return nn.functional.cross_entropy(torch.tanh(x @ outer.T) @ embed.T, tokens.roll(1))

    def closure() -> Tensor:
        points.append([(p * 1.0).detach() for p in early])
        return loss(embedding.weight, body.weight, hidden.weight)

    points: list[list[Tensor]] = []
    early = [embedding.weight, body.weight] if tied == "early" else [body.weight]
    late = [hidden.weight] if tied == "early" else [hidden.weight, embedding.weight]
    optimizer = zoopt.Hybrid(cls(early, seed=3, perturbation=perturbation), SGD(late, lr=0.1))
    optimizer.zeroth_order.param_groups[0]["step"] = 1  # past the evaluation made twice
    optimizer.probe(closure)
    assert len(points) == 2
    expected = [torch.zeros_like(p) for p in late]
    for point in points:
        leaves = [p.detach().clone().requires_grad_() for p in late]
        if tied == "early":
            value = loss(point[0], point[1], leaves[0])
        else:
            value = loss(leaves[1], point[0], leaves[0])
        for total, grad in zip(expected, torch.autograd.grad(value, leaves), strict=True):
            total += grad / 2
    for p, grad in zip(late, expected, strict=True):
        assert (p.grad - grad).abs().max() <= 1e-14
    assert all(p.grad is None for p in early)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_dropout_is_the_same_in_every_evaluation(perturbation: str) -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(), nn.Linear(64, 64), nn.Dropout())
    x, masks = torch.randn(8, 4), []
    model[3].register_forward_hook(lambda _m, _i, output: masks.append(output.detach() == 0))
    optimizer = zoopt.Hybrid(
        zoopt.MeZO(model[0].parameters(), num_probes=2, perturbation=perturbation, seed=1),
        SGD(model[2].parameters(), lr=0.1),
    )
    for _ in range(2):
        masks.clear()
        optimizer.step(lambda: model(x).square().mean())
        assert len(masks) in (4, 5)
        assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_frozen_parameters_stay_frozen() -> None:
    """Frozen after the halves were built: an early one rests, a late one has no gradient."""
    model = mlp()
    optimizer = hybrid(model, FIRST_ORDER["AdamW"])
    for frozen in (model[0].weight, model[4].weight):
        frozen.requires_grad_(False)
    before = bits([model[0].weight, model[4].weight])
    optimizer.step(closure_of(model))
    assert same_bits(before, bits([model[0].weight, model[4].weight]))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "0.weight",
        "4.weight",
    ]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_drive_both_halves(tensor_lr: bool) -> None:
    model = mlp()
    lr: Any = torch.tensor(1e-3) if tensor_lr else 1e-3
    optimizer = hybrid(model, FIRST_ORDER["AdamW"], lr=lr)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates = []
    for _ in range(3):
        optimizer.step(closure_of(model))
        rates.append(
            (
                float(optimizer.zeroth_order.param_groups[0]["lr"]),
                float(optimizer.first_order.param_groups[0]["lr"]),
            )
        )
        scheduler.step()
    for i, (zeroth, first) in enumerate(rates):
        assert zeroth == pytest.approx(1e-3 * 0.5**i, rel=1e-6)
        assert first == pytest.approx(0.02 * 0.5**i)
    # After a load, the groups are others; the scheduler writes to those.
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert optimizer.first_order.param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**4)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.first_order.param_groups[0]["lr"] == pytest.approx(0.002 * 0.5**4)
    one_cycle = lr_scheduler.OneCycleLR(
        optimizer, [1e-2, 1e-1], total_steps=5, cycle_momentum=False
    )
    one_cycle.step()
    assert len(one_cycle.get_last_lr()) == 2


def test_step_hooks_of_all_three_run_and_can_clip() -> None:
    model = mlp()
    optimizer = hybrid(model, lambda params: SGD(params, lr=1.0))
    late = [p for _, p in split(model)[1]]
    before = [p.detach().clone() for p in late]
    events: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: events.append("hybrid"))
    optimizer.zeroth_order.register_step_pre_hook(lambda *_: events.append("zeroth"))
    optimizer.first_order.register_step_pre_hook(lambda *_: events.append("first"))
    optimizer.first_order.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(late, 1e-3) and None
    )
    optimizer.step(closure_of(model))
    assert events == ["hybrid", "zeroth", "first"]
    pairs = zip(late, before, strict=True)
    moved = sum(float((p.detach() - q).square().sum()) for p, q in pairs) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_state_dict_hooks_run_and_are_honoured() -> None:
    model = mlp()
    optimizer = hybrid(model)
    events: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: events.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": len(events)})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, **state.pop("inner")})
    optimizer.register_load_state_dict_post_hook(lambda _: events.append("after"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict({"inner": state})
    assert events == ["before", "after"]


def test_copies_and_pickles_go_on_alike() -> None:
    model = mlp()
    optimizer = hybrid(model, FIRST_ORDER["AdamW"])
    optimizer.step(closure_of(model))
    lr_scheduler.ConstantLR(optimizer)
    optimizer.probe(closure_of(model))
    pair = copy.deepcopy((model, optimizer))
    again = pickle.loads(pickle.dumps((model, optimizer)))
    for twin, other in (pair, again):
        assert other.step() is None, "a copy starts without what is pending"
        other.zero_grad()
        other.step(closure_of(twin))
    optimizer.zero_grad()
    optimizer.step(closure_of(model))
    for twin, _ in (pair, again):
        assert same_bits(bits(twin.parameters()), bits(model.parameters()))


def test_looks_like_an_optimizer() -> None:
    model = mlp()
    optimizer = hybrid(model, FIRST_ORDER["AdamW"])
    assert isinstance(optimizer, Optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 6]
    assert optimizer.param_groups[1] is optimizer.first_order.param_groups[0]
    text = repr(optimizer)
    assert text.startswith("Hybrid (")
    assert "zeroth_order: MeZO (" in text
    assert "first_order: AdamW (" in text
    optimizer.step(closure_of(model))
    assert set(optimizer.state) == {p for _, p in split(model)[1]}
    with pytest.raises(RuntimeError, match="call add_param_group of its zeroth_order or its first"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    for closure in (3, "loss"):
        for call in (optimizer.step, optimizer.probe):
            with pytest.raises(TypeError, match="needs a closure that evaluates the loss"):
                call(closure)


def test_constructor_errors() -> None:
    early, late = split(mlp())
    first = SGD(late, lr=0.1)

    def refused(error: type[Exception], message: str, zeroth: Any, first: Any) -> None:
        with pytest.raises(error, match=message):
            zoopt.Hybrid(zeroth, first)

    mezo = zoopt.MeZO(early)
    for wrong in (first, None, zoopt.MeZO, zoopt.Hybrid(mezo, first)):
        refused(TypeError, "zeroth_order must be one of zoopt's, zoopt.MeZO say, got", wrong, first)
    for cls, why in (
        (zoopt.ZOConservativeSGD, "the points that it compares would count"),
        (zoopt.ForwardGrad, "its evaluations carry a derivative forward"),
        (zoopt.EvolutionStrategy, "fitness, which it evaluates, has no gradient"),
    ):
        refused(TypeError, f"zeroth_order must not be {cls.__name__}: {why}", cls(early), first)
    for wrong in (zoopt.MeZO(late), torch.optim.LBFGS([p for _, p in late]), SGD, None):
        refused(TypeError, "first_order must be an optimizer that steps from grad", mezo, wrong)
    refused(
        ValueError,
        "no parameter may be in both optimizers, got '0.weight'; leave it out of one",
        mezo,
        SGD([*late, early[0]], lr=0.1),
    )
    refused(ValueError, "in both optimizers, got 1;", mezo, SGD([late[0][1], early[0][1]], lr=0.1))
    late[1][1].requires_grad_(False)
    refused(ValueError, "must require a gradient, got '4.bias' without; unfreeze it", mezo, first)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda loss, _: loss.item(), RuntimeError, "must return the loss as a tensor that dep"),
        (lambda loss, _: loss.detach(), RuntimeError, "that depends on first_order's parameters"),
        (lambda loss, _: loss.backward() or loss, RuntimeError, "and not call backward"),
        (lambda loss, _: None, TypeError, "got NoneType; end it with `return loss`"),
        (lambda loss, _: loss.expand(2), ValueError, "the closure must return one real number"),
        (
            lambda loss, spare: loss.detach() + spare,
            RuntimeError,
            "that depends on first_order's parameters differentiably",
        ),
    ],
)
def test_what_a_closure_may_not_do(closure, error, message: str, perturbation: str) -> None:
    model, spare = mlp(), nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = hybrid(model, perturbation=perturbation)
    before = [p.detach().clone() for p in model.parameters()]
    for call in (optimizer.step, optimizer.probe):
        with pytest.raises(error, match=message):
            call(lambda: closure(closure_of(model)(), spare))
    for p, value in zip(model.parameters(), before, strict=True):
        assert (p - value).abs().max() <= 1e-15
        assert p.requires_grad
        assert p.grad is None


def test_zero_grad_in_the_closure_does_no_harm() -> None:
    """As torch's own closures begin; here it must not clear an earlier evaluation's gradient."""
    models = mlp(), mlp()
    for model, clears in zip(models, (False, True), strict=True):
        optimizer = hybrid(model)

        def closure(model=model, clears=clears, optimizer=optimizer) -> Tensor:
            if clears:
                optimizer.zero_grad()
            return closure_of(model)()

        for _ in range(2):
            optimizer.step(closure)
    assert same_bits(*(bits(model.parameters()) for model in models))


def test_load_state_dict_errors() -> None:
    model = mlp()
    optimizer = hybrid(model, FIRST_ORDER["AdamW"])
    optimizer.step(closure_of(model))
    before = str(optimizer.state_dict())
    early, late = split(mlp())
    other = zoopt.Hybrid(zoopt.MeZO(early), AdamW(late[:-1], lr=0.1))
    fewer = zoopt.Hybrid(zoopt.MeZO(early[:-1]), AdamW(late, lr=0.1))
    for wrong, message in (
        (optimizer.zeroth_order.state_dict(), r"with classes \['MeZO', 'AdamW'\], got None;"),
        (hybrid(mlp()).state_dict(), r"got \['MeZO', 'SGD'\]; build it from the optimizers"),
        (hybrid(mlp(), cls=zoopt.ZOSignSGD).state_dict(), r"got \['ZOSignSGD', 'SGD'\]"),
        (other.state_dict(), r"with late_shapes \[\[\[8, 8\], .* got \[\[\[8, 8\]"),
        (fewer.state_dict(), "as many parameters a group as the optimizer"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
        assert str(optimizer.state_dict()) == before


def test_loading_drops_what_is_pending() -> None:
    model = mlp()
    optimizer = hybrid(model)
    optimizer.probe(closure_of(model))
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step() is None


def test_a_closure_that_draws_new_data_is_warned_of_once() -> None:
    """The run's first evaluation is made twice; its gradient counts once."""
    model = mlp()
    optimizer = hybrid(model)
    scale = iter(range(1, 100))
    with pytest.warns(UserWarning, match="the closure must compute the same function each time"):
        optimizer.step(lambda: closure_of(model)() * next(scale))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: closure_of(model)() * next(scale))


@pytest.mark.parametrize("half", ["zeroth_order", "first_order"])
def test_a_damaged_checkpoint_changes_neither_half(half: str) -> None:
    model = mlp()
    optimizer = hybrid(model, lambda late: zoopt.AdamW(late, seed=7), momentum=0.9)
    optimizer.step(closure_of(model))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step(closure_of(model))
    optimizer.probe(closure_of(model))
    before = copy.deepcopy(optimizer.state_dict())
    _twin, other = copy.deepcopy((model, optimizer))
    saved[half]["param_groups"][0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be a finite number"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)
    # The probe that is pending still is; a copy has none.
    optimizer.step()
    assert other.step() is None
    assert optimizer.zeroth_order.last_step.step == 3


def test_a_loss_of_16_bits_is_warned_of_once() -> None:
    """Half the graph is the closure's own: its dtype has to reach the probe."""
    model = mlp(torch.float32)
    optimizer = hybrid(model, zo_eps=1e-5)
    loss = closure_of(model, torch.float32)
    for call in (optimizer.step, optimizer.probe):
        optimizer.zeroth_order._judged = optimizer.zeroth_order._coarse = 0
        with pytest.warns(UserWarning, match="compute the loss in float32") as caught:
            call(lambda: (3.0 + 0.01 * loss()).bfloat16())
        assert len(caught) == 1


#: Where an error ends the second step: what raises, and in which of its calls.
CUTS: dict[str, tuple[str, str, set[int]]] = {
    "first half": ("first_order", "step", {1}),
    "late update": ("first_order", "_update_together", {1}),
    "early update": ("zeroth_order", "_update", {2}),
    "early update, twice": ("zeroth_order", "_update", {2, 3}),
    "warning": ("zeroth_order", "_warn_of_skipped", {1}),
}


@pytest.mark.parametrize("between", ["nothing", "zero_grad", "state_dict", "copy"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_a_step_that_an_error_cuts_short_is_finished(
    cut: str, accumulate: bool, between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves have taken the same steps then, with the bits of a run without errors."""

    def build() -> tuple[nn.Sequential, zoopt.Hybrid]:
        model = mlp()
        options: dict[str, Any] = {"momentum": 0.9, "perturbation": "virtual"}
        return model, hybrid(model, lambda late: zoopt.AdamW(late, lr=0.02, seed=7), **options)

    def step(model: nn.Module, optimizer: zoopt.Hybrid) -> float | None:
        if accumulate:
            optimizer.probe(closure_of(model))
            optimizer.probe(closure_of(model))
        return optimizer.step(*(() if accumulate else (closure_of(model),)))

    whole, expected = build()
    losses = [step(whole, expected) for _ in range(3)]
    model, optimizer = build()
    assert step(model, optimizer) == losses[0]
    half, method, failing = CUTS[cut]
    calls, original = 0, getattr(getattr(optimizer, half), method)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise torch.OutOfMemoryError
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(optimizer, half), method, call, raising=False)
        with pytest.raises(torch.OutOfMemoryError):
            step(model, optimizer)
    vars(getattr(optimizer, half)).pop(method, None)
    if between == "zero_grad":
        optimizer.zero_grad()
    elif between == "state_dict":
        optimizer.state_dict()
    elif between == "copy":
        optimizer, model = copy.deepcopy((optimizer, model))
    assert optimizer.step() == (losses[1] if between in ("nothing", "zero_grad") else None)
    assert optimizer.step() is None
    assert all(param.grad is None for param in model.parameters())
    assert step(model, optimizer) == losses[2]
    assert same_bits(bits(model.parameters()), bits(whole.parameters()))
    assert str(optimizer.state_dict()) == str(expected.state_dict())


def test_a_new_step_finishes_the_one_before() -> None:
    """Memory for the state of the late half is found only in the second try."""
    model, whole = mlp(), mlp()
    expected = hybrid(whole, FIRST_ORDER["AdamW"], perturbation="virtual")
    optimizer = hybrid(model, FIRST_ORDER["AdamW"], perturbation="virtual")
    failures = iter([True, False, False])

    def fail(*_: Any) -> None:
        if next(failures):
            raise torch.OutOfMemoryError

    optimizer.first_order.register_step_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(closure_of(model))
    expected.step(closure_of(whole))
    assert optimizer.step(closure_of(model)) == expected.step(closure_of(whole))
    assert same_bits(bits(model.parameters()), bits(whole.parameters()))


def test_zero_grad_drops_both_halves_though_the_record_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = hybrid(model)
    recorder = optimizer.zeroth_order.record(tmp_path / "run", sync_every=0.0)
    optimizer.probe(closure_of(model))

    def failing(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            optimizer.zero_grad()
    assert not optimizer.zeroth_order.has_pending
    assert all(param.grad is None for _, param in split(model)[1])
    recorder.close()
