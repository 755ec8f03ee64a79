"""What the zeroth-order methods promise beyond the contract: estimates, masks, blocks, products."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoopt
from tests.meter import peak_bytes
from tests.optimizer_table import PERTURBATIONS, closure_of, mlp
from zoopt.zeroth_order.engine.mask import magnitude_threshold
from zoopt.zeroth_order.engine.noise import Noise

# --- the estimate ---------------------------------------------------------------------------


class Quadratic(nn.Module):
    """theta^T A theta / 2 + b^T theta over a matrix and a vector, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(5, 4, generator=generator).double())
        self.vector = nn.Parameter(torch.randn(3, generator=generator).double())
        root = torch.randn(23, 23, generator=generator).double()
        self.a, self.b = root @ root.T / 23, torch.randn(23, generator=generator).double()

    def theta(self) -> Tensor:
        return torch.cat((self.matrix.flatten(), self.vector))

    def forward(self) -> Tensor:
        theta = self.theta()
        return 0.5 * theta @ self.a @ theta + self.b @ theta


ESTIMATORS: dict[str, tuple[Callable[..., Any], dict[str, Any], float]] = {
    "two-sided": (zoopt.MeZO, {}, 1.0),
    "one-sided": (zoopt.MeZO, {"estimator": "one-sided"}, 1.0),
    "rademacher": (zoopt.MeZO, {"distribution": "rademacher"}, 1.0),
    # A direction's masked elements are 0, the others estimate the gradient: density of it.
    "random mask": (zoopt.MeZO, {"mask": "random", "density": 0.5}, 0.5),
    "forward": (zoopt.ForwardGrad, {}, 1.0),
    "lozo": (zoopt.LOZO, {"rank": 2, "basis_update_gap": 1}, 1.0),
    "subzero": (zoopt.SubZero, {"rank": 2, "basis_update_gap": 1}, 1.0),
    "hizoo": (zoopt.HiZOO, {"hessian_smooth": 0.0}, 1.0),
    "conmezo": (zoopt.ConMeZO, {"beta": 0.0, "beta_start": 0.0, "cone_angle": np.pi / 2}, 1.0),
}


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_estimates_have_the_gradient_for_mean(name: str) -> None:
    """Within 4 standard errors in each of 23 components, over 300 independent steps of 4 probes.

    A quadratic's difference quotients have no bias: the one-sided one's is a third moment, 0.
    """
    cls, options, fraction = ESTIMATORS[name]
    model = Quadratic()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    gradient = (model.a @ model.theta() + model.b).detach()
    optimizer = cls(model.named_parameters(), lr=1.0, num_probes=4, seed=11, **options)
    samples = []
    for _ in range(300):
        before = model.theta().detach().clone()
        optimizer.step(model)
        samples.append(before - model.theta().detach())
        model.load_state_dict(start)
    estimates = torch.stack(samples)
    error = (estimates.mean(0) - fraction * gradient).abs()
    standard_error = estimates.std(0) / len(samples) ** 0.5
    assert bool((error <= 4 * standard_error).all()), error / standard_error
    # The bound means something: the standard error is small beside the gradient.
    assert standard_error.norm() < 0.5 * gradient.norm()


def test_a_normalised_step_does_not_see_the_losses_scale() -> None:
    """FZOO divides by the losses' own spread: 1000 L gives the steps of L, to rounding (1e-9)."""
    models = [mlp(torch.float64) for _ in range(2)]
    for model, scale in zip(models, (1.0, 1000.0), strict=True):
        optimizer = zoopt.FZOO(model.parameters(), lr=1e-3, seed=1)
        closure = closure_of(model, torch.float64)
        for _ in range(3):
            optimizer.step(lambda closure=closure, scale=scale: scale * closure())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_equal_losses_leave_fzoo_where_it_is() -> None:
    model, twin = mlp(), mlp()
    zoopt.FZOO(model.parameters(), seed=1, perturbation="virtual").step(
        lambda: model(torch.ones(1, 6)).sum() * 0
    )
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# --- masks ----------------------------------------------------------------------------------


def moved(before: Tensor, after: Tensor) -> Tensor:
    return before != after


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"mask": "random", "density": 0.3},
        {"mask": "magnitude", "density": 0.3},
        {"mask": {"weight": torch.arange(0, 3000, 7)}},
    ],
    ids=["random", "magnitude", "indices"],
)
def test_probe_and_update_share_the_mask(options: dict[str, Any], perturbation: str) -> None:
    """Elements that the closure sees moved are those that the update moves."""
    model = nn.Linear(50, 60, bias=False)
    before = model.weight.detach().clone()
    seen = []

    def closure() -> Tensor:
        seen.append((model.weight + 0).detach() != before)
        return model(torch.ones(1, 50)).sum()

    # zo_eps and lr large: what moves, moves by more than half a unit in the last place.
    optimizer = zoopt.MeZO(
        model.named_parameters(), lr=0.1, zo_eps=0.1, perturbation=perturbation, seed=1, **options
    )
    optimizer.step(closure)
    assert torch.equal(seen[0], moved(before, model.weight.detach()))
    if perturbation == "virtual":
        assert torch.equal(seen[0], seen[-1])
    count = int(seen[0].sum())
    if options["mask"] == "random":
        assert abs(count - 900) <= 4 * (3000 * 0.3 * 0.7) ** 0.5
    elif options["mask"] == "magnitude":
        assert count == 900
        largest = before.abs()[seen[0]].max()
        assert bool((before.abs()[~seen[0]] > largest).all())
    else:
        assert count == len(options["mask"]["weight"])


def test_random_masks_have_exactly_the_rate() -> None:
    """4.2 million elements, 3 standard errors; a new mask each step."""
    weight = nn.Parameter(torch.zeros(1 << 22))
    optimizer = zoopt.MeZO(
        [weight], lr=1.0, mask="random", density=0.1, perturbation="virtual", seed=6
    )
    masks = []
    for _ in range(2):
        optimizer.step(lambda: weight[:1000].sum())
        masks.append(weight.detach() != 0)
        weight.detach().zero_()
    standard_error = (0.1 * 0.9 / weight.numel()) ** 0.5
    for mask in masks:
        assert abs(mask.double().mean().item() - 0.1) <= 3 * standard_error
    both = (masks[0] & masks[1]).double().mean().item()
    assert abs(both - 0.01) <= 3 * (0.01 * 0.99 / weight.numel()) ** 0.5


def test_indices_of_one_parameter_leave_the_others_alone() -> None:
    model, twin = mlp(), mlp()
    mask = {"0.weight": torch.tensor([5, 2], dtype=torch.int32)}
    optimizer = zoopt.MeZO(model.named_parameters(), lr=0.1, mask=mask, weight_decay=0.1, seed=1)
    optimizer.step(closure_of(model))
    changed = {
        name: int(moved(p.detach(), q.detach()).sum())
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True)
    }
    assert changed.pop("0.weight") == 2
    assert not any(changed.values())


# --- blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("blocks", ["groups", ["0.*", "2.*", "3.*"]])
def test_resting_blocks_cost_nothing(
    blocks: Any, perturbation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel touches them, and they keep their bits, weight decay or not."""
    model = mlp()
    touched: set[int] = set()
    add_, perturbed = Noise.add_, Noise.perturbed

    def recording(method: Callable[..., Any]) -> Callable[..., Any]:
        def record(self: Noise, param: Tensor, *args: Any, **kwargs: Any) -> Any:
            touched.add(param.data_ptr())
            return method(self, param, *args, **kwargs)

        return record

    monkeypatch.setattr(Noise, "add_", recording(add_))
    monkeypatch.setattr(Noise, "perturbed", recording(perturbed))
    layers = [list(model[i].named_parameters(prefix=str(i))) for i in (0, 2, 3)]
    named = [pair for layer in layers for pair in layer]
    params = [{"params": layer} for layer in layers] if blocks == "groups" else named
    optimizer = zoopt.MeZO(
        params, lr=0.1, weight_decay=0.1, blocks=blocks, perturbation=perturbation, seed=1
    )
    for step in range(6):
        touched.clear()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step(closure_of(model))
        due = {p.data_ptr() for _, p in layers[step % 3]}
        for p, old in zip(model.parameters(), before, strict=True):
            assert bool(moved(old, p.detach()).any()) == (p.data_ptr() in due)
        assert touched - {p.data_ptr() for p in model.parameters()} == set()
        assert touched <= due


def test_random_blocks_are_all_visited_alike_and_follow_the_seed() -> None:
    """Each of 3 blocks in 300 steps 100 times, within 4 standard deviations of 8.2."""

    def visits(seed: int) -> list[int]:
        model = mlp()
        optimizer = zoopt.MeZO(
            model.named_parameters(),
            lr=1e-3,
            blocks=["0.*", "2.*", "3.*"],
            block_order="random",
            seed=seed,
        )
        order = []
        for _ in range(300):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step(closure_of(model))
            changed = {n[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            [block] = changed
            order.append(int(block))
        return order

    first = visits(1)
    assert first == visits(1) != visits(2)
    for block in (0, 2, 3):
        assert abs(first.count(block) - 100) <= 33


def test_all_blocks_at_once_is_plain_descent() -> None:
    models = [mlp(), mlp()]
    for model, options in zip(
        models, ({}, {"blocks": ["0.*", "*"], "block_order": "all"}), strict=True
    ):
        optimizer = zoopt.MeZO(model.named_parameters(), lr=1e-2, seed=1, **options)
        for _ in range(3):
            optimizer.step(closure_of(model))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


# --- products -------------------------------------------------------------------------------


class Products(nn.Module):
    """Every way in which modules multiply by a matrix, and one that no product can stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 8)
        self.conv1d = nn.Parameter(torch.randn(8, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.square = nn.Parameter(torch.randn(5, 5))
        self.kernel = nn.Conv1d(5, 4, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.linear(self.embedding(ids)))  # (B, T, 8)
        x = torch.addmm(self.bias, x.view(-1, 8), self.conv1d).view(*ids.shape, 5)
        x = torch.tanh(x @ self.square) + torch.matmul(x, self.square.T)
        x = torch.mm(x.view(-1, 5), self.square).view(*ids.shape, 5)
        x = self.kernel(x.transpose(1, 2))
        return (
            torch.nn.functional.linear(self.embedding.weight, self.linear.weight).mean() + x.mean()
        )


@pytest.mark.parametrize(
    "build",
    [
        lambda params, **options: zoopt.LOZO(params, rank=2, **options),
        lambda params, **options: zoopt.SubZero(params, rank=2, **options),
        lambda params, **options: zoopt.ZOMuon(params, rank=2, **options),
    ],
    ids=["LOZO", "SubZero", "ZOMuon"],
)
def test_products_with_displaced_matrices_equal_displaced_matrices(
    build: Callable[..., Any],
) -> None:
    """Virtual (x W^T + (x R) L^T) against in place (W + L R^T), in float64: to rounding."""
    torch.manual_seed(4)
    model, ids = Products(), torch.randint(11, (3, 7))
    losses = {}
    for perturbation in PERTURBATIONS:
        optimizer = build(model.named_parameters(), lr=0.0, perturbation=perturbation, seed=1)
        optimizer.step(lambda: model(ids))
        losses[perturbation] = torch.tensor(optimizer.last_step.losses, dtype=torch.float64)
    torch.testing.assert_close(losses["inplace"], losses["virtual"], rtol=0, atol=1e-12)
    assert losses["virtual"].std() > 1e-6


@pytest.mark.parametrize("cls", [zoopt.LOZO, zoopt.SubZero])
def test_low_rank_probes_make_no_copy_of_a_matrix(cls: Any) -> None:
    """Beyond the forward's peak: the factors, some 100 KiB; a matrix of the model has 4 MiB."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    x = torch.randn(4, 1024)
    with torch.no_grad():
        forward = peak_bytes(lambda: model(x).mean(), model.parameters())
    optimizer = cls(model.named_parameters(), rank=2, seed=1)
    assert peak_bytes(lambda: optimizer.step(lambda: model(x).mean()), model.parameters()) <= (
        forward + 200_000
    )


# --- forward gradients ----------------------------------------------------------------------


def test_forward_gradients_hold_one_tangent_at_a_time() -> None:
    """16 matrices of 1 MiB: the peak has room for two copies of one, not for 16."""
    layers = [layer for _ in range(16) for layer in (nn.Linear(512, 512, bias=False), nn.Tanh())]
    model, x = nn.Sequential(*layers), torch.randn(2, 512)
    optimizer = zoopt.ForwardGrad(model.named_parameters(), seed=1)
    optimizer.step(lambda: model(x).mean())
    peak = peak_bytes(lambda: optimizer.step(lambda: model(x).mean()), model.parameters())
    assert peak <= 3 * 2**20


def test_forward_gradients_pass_through_attention_and_embeddings() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 8)
            self.out = nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)[:, None]
            x = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            return self.out(x).square().mean()

    model, ids = Attention().double(), torch.randint(9, (2, 5))
    directions = {}
    optimizer = zoopt.ForwardGrad(model.named_parameters(), lr=0.0, seed=1)
    for site in optimizer._sites():
        directions[site.param] = site.direction.tangent(site.param, 0)
    model(ids).backward()
    expected = sum(float((p.grad * directions[p]).sum()) for p in model.parameters())
    optimizer.step(lambda: model(ids))
    [slope] = optimizer.last_step.projected_grads
    assert slope == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda model: model(torch.ones(1, 6)).sum().item(), TypeError, "return loss, not"),
        (lambda model: torch.tensor(1.0), RuntimeError, "depends on the param"),
        (lambda model: (model(torch.ones(1, 6)) > 0).sum(), RuntimeError, "depends on the param"),
        (lambda model: model(torch.ones(1, 6)), ValueError, "must return one"),
    ],
    ids=["number", "constant", "accuracy", "vector"],
)
def test_forward_gradients_need_a_derivative(
    closure: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    model, twin = mlp(), mlp()
    optimizer = zoopt.ForwardGrad(model.named_parameters(), seed=1)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: closure(model))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert optimizer.param_groups[0]["step"] == 0


# --- conservative steps ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("candidates", ["three", "reused"])
def test_steps_that_lose_are_undone_exactly(candidates: str, dtype: torch.dtype) -> None:
    """At a minimum every candidate is worse, so that 20 tries leave every bit."""
    weight = nn.Parameter(torch.zeros(100, dtype=dtype))
    optimizer = zoopt.ZOConservativeSGD([weight], lr=1.0, candidates=candidates, seed=1)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return (weight.float() ** 2).sum() + 1.0

    for _ in range(20):
        optimizer.step(closure)
    assert not weight.detach().any()
    # One more in the run's first probe, which verifies.
    assert len(calls) == 20 * {"three": 5, "reused": 3}[candidates] + 1


def test_a_one_sided_probes_own_base_is_reused() -> None:
    weight, calls = nn.Parameter(torch.ones(100)), []

    def closure() -> Tensor:
        calls.append(1)
        return (weight**2).sum()

    optimizer = zoopt.ZOConservativeSGD([weight], lr=1e-3, estimator="one-sided", seed=1)
    for _ in range(3):
        optimizer.step(closure)
    assert len(calls) == 3 * 4 + 1


def test_conservative_steps_refuse_to_accumulate() -> None:
    optimizer = zoopt.ZOConservativeSGD(mlp().parameters(), seed=1)
    with pytest.raises(RuntimeError, match=r"call step\(closure\) with one that loops over"):
        optimizer.probe(lambda: 0.0)


# --- windows --------------------------------------------------------------------------------


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def test_a_window_stores_no_tensor() -> None:
    model = mlp()
    optimizer = zoopt.ZOAdam(model.named_parameters(), state="window", window=3, seed=1)
    for _ in range(5):
        optimizer.step(closure_of(model))
    assert not list(tensors(optimizer.state_dict()))
    assert not any(optimizer.state.values())
    assert len(optimizer.param_groups[0]["past"]) == 3


def test_a_window_as_long_as_the_run_is_stored_adam() -> None:
    """Truncated weights are then Adam's own bias correction: equal to rounding of float64."""
    models = [mlp(torch.float64) for _ in range(2)]
    for model, state in zip(models, ("dense", "window"), strict=True):
        optimizer = zoopt.ZOAdam(
            model.named_parameters(), lr=1e-3, state=state, window=8, betas=(0.9, 0.99), seed=1
        )
        for _ in range(8):
            optimizer.step(closure_of(model, torch.float64))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# --- closures -------------------------------------------------------------------------------


def test_a_closure_that_draws_new_data_is_warned_of() -> None:
    model, batches = mlp(), iter(torch.randn(10, 4, 6))
    optimizer = zoopt.MeZO(model.parameters(), seed=1)
    with pytest.warns(UserWarning, match="draw the batch outside the closure") as caught:
        optimizer.step(lambda: model(next(batches)).square().mean())
    assert caught[0].filename == __file__


def test_random_choices_of_python_and_numpy_are_pinned() -> None:
    """Augmentation in the closure is the same in all of a step's evaluations, new in the next."""
    model = mlp()
    seen: list[tuple[float, float]] = []

    def closure() -> Tensor:
        seen.append((random.random(), float(np.random.rand())))
        return model(torch.full((1, 6), seen[-1][0] + seen[-1][1])).sum()

    optimizer = zoopt.MeZO(model.parameters(), num_probes=2, seed=1)
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), float(np.random.rand())
    random.seed(3)
    np.random.seed(3)
    optimizer.step(closure)
    assert set(seen) == {expected}
    optimizer.step(closure)
    assert len(set(seen)) == 2


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_autocast_around_a_step_does_not_hide_the_perturbation(perturbation: str) -> None:
    """It keeps its casts of weights, which in place must not outlive one evaluation."""
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    records = []
    for outside in (True, False):
        optimizer = zoopt.MeZO(
            layer.named_parameters(), lr=0.0, zo_eps=0.1, perturbation=perturbation, seed=1
        )

        def loss() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return layer(x).square().mean()

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
            optimizer.step(loss)
        records.append(optimizer.last_step.projected_grads[0])
    assert records[0] != 0.0
    assert records[0] == pytest.approx(records[1], rel=1e-3)


def test_zero_grad_drops_what_has_been_probed() -> None:
    model, twin = mlp(), mlp()
    optimizer = zoopt.MeZO(model.parameters(), perturbation="virtual", seed=1)
    optimizer.probe(closure_of(model))
    optimizer.zero_grad()
    assert optimizer.step() is None
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# --- losses of 16 bits ----------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_whose_spacing_hides_the_estimate_are_warned_of_once(
    dtype: torch.dtype, perturbation: str
) -> None:
    """Around 3 the spacing is 0.016 in bfloat16, and a perturbation changes the loss by 0.001."""
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    optimizer = zoopt.MeZO(model.named_parameters(), zo_eps=1e-5, perturbation=perturbation, seed=1)
    with pytest.warns(UserWarning, match=r"16 bits, .* compute the loss in float32") as caught:
        optimizer.step(lambda: (3.0 + 0.1 * model(x).square().mean()).to(dtype))
    assert [warning.filename for warning in caught] == [__file__]
    optimizer.step(lambda: (3.0 + 0.1 * model(x).square().mean()).to(dtype))


def test_losses_whose_spacing_is_fine_are_not_warned_of() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    optimizer = zoopt.MeZO(model.named_parameters(), zo_eps=0.1, seed=1)
    for closure in (
        lambda: model(x).square().mean().bfloat16(),
        lambda: (3.0 + 1e-6 * model(x).mean()).float(),
        lambda: float((3.0 + 1e-6 * model(x).mean()).bfloat16()),
    ):
        optimizer.step(closure)


# --- long runs ------------------------------------------------------------------------------


def test_adam_counts_on_beyond_what_float32_can_count() -> None:
    """The count of a checkpoint with a float32 one is converted, and 2^24 + 1 is not 2^24."""
    model = mlp()
    optimizer = zoopt.ZOAdam(model.named_parameters(), seed=1)
    optimizer.step(closure_of(model))
    old = optimizer.state_dict()
    for state in old["state"].values():
        state["step"] = torch.tensor(2.0**24)
    optimizer.load_state_dict(old)
    for _ in range(2):
        optimizer.step(closure_of(model))
    assert all(int(state["step"]) == 2**24 + 2 for state in optimizer.state.values())
    assert all(state["step"].dtype == torch.int64 for state in optimizer.state.values())
    optimizer.param_groups[0]["step"] = 2**40
    for state in optimizer.state.values():
        state["step"].fill_(2**40)
    before = model[0].weight.detach().clone()
    optimizer.step(closure_of(model))
    assert not torch.equal(before, model[0].weight)


# --- parameters that change --------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda params: zoopt.MeZO(params, momentum=0.9, perturbation="inplace", seed=1),
        lambda params: zoopt.ZOAdam(params, seed=1),
        lambda params: zoopt.LOZO(params, momentum=0.9, seed=1),
        lambda params: zoopt.SubZero(params, seed=1),
        lambda params: zoopt.HiZOO(params, seed=1),
        lambda params: zoopt.ConMeZO(params, seed=1),
    ],
    ids=["MeZO", "ZOAdam", "LOZO", "SubZero", "HiZOO", "ConMeZO"],
)
def test_a_parameter_of_a_new_shape_is_refused_and_dropping_its_state_helps(
    build: Callable[..., Any],
) -> None:
    layer = nn.Linear(3, 40, bias=False)
    optimizer = build(layer.named_parameters())
    closure: Callable[[], Tensor] = lambda: layer.weight.square().sum()  # noqa: E731
    optimizer.step(closure)
    layer.weight.data = torch.ones(50, 3)
    with pytest.raises(RuntimeError, match=r"the parameter has changed since; drop its state"):
        optimizer.step(closure)
    assert torch.equal(layer.weight.data, torch.ones(50, 3))
    assert optimizer.param_groups[0]["step"] == 1
    optimizer.state.pop(layer.weight)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["step"] == 2
    assert not torch.equal(layer.weight.data, torch.ones(50, 3))


# --- bad input ------------------------------------------------------------------------------

NAMED = list(mlp().named_parameters())
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (zoopt.MeZO, {"mask": "random", "density": 0.0}, ValueError, "density must be"),
    (zoopt.MeZO, {"mask": "small"}, ValueError, "mask must be one of 'random', 'magnitude'"),
    (zoopt.MeZO, {"mask": 3}, TypeError, "mask must be None, 'random', 'magnitude' or a dict"),
    (zoopt.MeZO, {"density": 0.5}, ValueError, "density must be 1 unless mask is"),
    (
        zoopt.MeZO,
        {"mask": {"nowhere": torch.tensor([0])}},
        ValueError,
        "mask must name parameters of its param group, got 'nowhere'",
    ),
    (zoopt.MeZO, {"mask": {"0.bias": [1]}}, TypeError, "tensor of int64 or int32 flat indices"),
    (
        zoopt.MeZO,
        {"mask": {"0.bias": torch.tensor([1, 1])}},
        ValueError,
        r"must hold distinct flat indices in \[0, 10\)",
    ),
    (zoopt.MeZO, {"mask": {"0.bias": torch.tensor([10])}}, ValueError, r"in \[0, 10\)"),
    (
        zoopt.MeZO,
        {"mask": "magnitude", "density": 0.5, "momentum": 0.9, "momentum_window": 3},
        ValueError,
        "momentum_window must be None with mask='magnitude'",
    ),
    (zoopt.MeZO, {"blocks": "layers"}, TypeError, "blocks must be None, 'groups' or a sequence"),
    (zoopt.MeZO, {"blocks": ["0.*"]}, ValueError, "must belong to a block, but none of"),
    (zoopt.MeZO, {"blocks": ["*"], "block_order": "up"}, ValueError, "block_order must be one of"),
    (zoopt.ZOAdam, {"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
    (zoopt.ZOAdam, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be a finite number"),
    (zoopt.ZOAdam, {"state": "full"}, ValueError, "state must be one of 'dense', 'window'"),
    (zoopt.ZOAdam, {"state": "window", "window": 0}, ValueError, "window must be a positive int"),
    (zoopt.ZOSignSGD, {"form": "round"}, ValueError, "form must be one of 'elementwise'"),
    (
        zoopt.ZOConservativeSGD,
        {"candidates": "reused", "estimator": "two-sided"},
        ValueError,
        "estimator must be 'one-sided' with candidates='reused'",
    ),
    (zoopt.FZOO, {"num_probes": 1}, ValueError, "num_probes must be at least 2, got 1"),
    (zoopt.LOZO, {"rank": 0}, ValueError, "rank must be a positive int, got 0"),
    (
        zoopt.LOZO,
        {"momentum": 0.5, "blocks": ["*"]},
        ValueError,
        "blocks must be None with momentum",
    ),
    (zoopt.SubZero, {"basis_update_gap": 0}, ValueError, "basis_update_gap must be a positive"),
    (zoopt.HiZOO, {"hessian_smooth": 1.0}, ValueError, "hessian_smooth must be a finite number"),
    (zoopt.ConMeZO, {"cone_angle": 0.0}, ValueError, "cone_angle must be a finite number > 0"),
    (zoopt.ConMeZO, {"warmup_steps": -1}, ValueError, "warmup_steps must be an int >= 0, got -1"),
]


@pytest.mark.parametrize(("cls", "options", "error", "message"), BAD)
def test_bad_input(cls: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(NAMED, **options)


def test_patterns_need_names() -> None:
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        zoopt.MeZO(mlp().parameters(), blocks=["*"])


def test_a_refused_group_is_not_added() -> None:
    model = mlp()
    optimizer = zoopt.MeZO(model[0].named_parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="mask must name parameters"):
        optimizer.add_param_group(
            {"params": list(model[3].named_parameters("3")), "mask": {"x": torch.tensor([0])}}
        )
    assert len(optimizer.param_groups) == 1


# --- deterministic algorithms ------------------------------------------------------------------


@pytest.mark.parametrize("density", [1e-9, 0.3, 0.5, 1.0])
def test_the_threshold_of_a_magnitude_mask_is_the_same_under_deterministic_algorithms(
    density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal magnitudes, infinity and NaN too. On CUDA, kthvalue raises under them."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-9, 9, (7, 11), generator=generator) / 8.0
    params = [values, values.bfloat16(), torch.tensor([2.0, float("inf"), -1.0, float("nan")])]
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        plain = [magnitude_threshold(param, density) for param in params]
    finally:
        torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(Tensor, "kthvalue", lambda *_: pytest.fail("not deterministic on CUDA"))
    for param, expected in zip(params, plain, strict=True):
        found = magnitude_threshold(param, density)
        assert found.untyped_storage().nbytes() == 4
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
