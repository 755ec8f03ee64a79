"""SM3: the paper's invariants, Adagrad on vectors, sparse rows, and the kernels' equal bits."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoopt
from tests.reference.sm3_float64 import Cover
from zoopt.kernels import sm3_
from zoopt.kernels.noise.key import NoiseKey

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (300,), (7, 13), (6, 16), (1, 9), (3, 4, 5), (2, 3, 1, 5), (2, 2100), (0, 4)]
KEY = NoiseKey(2**63 + 5, 2**31 + 1, 2**32 - 5)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def zeros(theta: torch.Tensor) -> list[torch.Tensor]:
    """Accumulators."""
    wide = torch.promote_types(theta.dtype, torch.float32)
    return [torch.zeros(size, dtype=wide) for size in tuple(theta.shape) or (1,)]


def gradients(shape: tuple[int, ...], dtype: torch.dtype, steps: int) -> list[torch.Tensor]:
    """Of many magnitudes, squares that underflow among them, and a third of them zero."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(shape, generator=generator)
            * 10.0 ** torch.randint(-30, 3, shape, generator=generator)
            * (torch.rand(shape, generator=generator) > 0.33)
        ).to(dtype)
        for _ in range(steps)
    ]


def kernel_steps(
    impl: str | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    sparse: bool = False,
    steps: int = 2,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """What sums, then averages with momentum, leave of theta, the accumulators and the buffer."""
    theta = torch.linspace(-2, 2, math.prod(shape)).reshape(shape).to(dtype)
    accumulators, buffer = zeros(theta), torch.zeros(shape)
    theta, buffer, *accumulators = (x.to(device) for x in (theta, buffer, *accumulators))
    for step, gradient in enumerate(gradients(shape, dtype, 2 * steps)):
        if sparse:
            rows = torch.arange(shape[0])[step % 2 :: 2]
            gradient = torch.sparse_coo_tensor(
                rows[None], gradient[rows], shape, is_coalesced=True, check_invariants=False
            )
        average = {"beta": 0.9, "momentum": 0.9, "eps": 1e-3, "buffer": buffer, "decay": 0.99}
        options: dict[str, Any] = average if step >= steps else {}
        draw = None if step % 2 else step
        sm3_(
            *(theta, gradient.to(device), accumulators),
            step_size=-0.1,
            rounding_draw=draw,
            impl=impl,
            **options,
            key=KEY,
        )
    return [tensor.cpu() for tensor in (theta, *accumulators, buffer)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numba_has_the_bits_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for a, b in zip(
        kernel_steps("numba", shape, dtype), kernel_steps("reference", shape, dtype), strict=True
    ):
        assert same_bits(a, b)
        assert bool(a.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_numba_has_the_bits_of_the_reference_on_sparse_rows(dtype: torch.dtype) -> None:
    for shape in ((9, 13), (5, 3, 8), (7,)):
        results = (kernel_steps(impl, shape, dtype, sparse=True) for impl in ("numba", "reference"))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_threads_do_not_change_a_bit() -> None:
    """Each has maxima of its own for the columns."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(kernel_steps("numba", (400, 300), torch.bfloat16, steps=1))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_a_wide_gradient_of_narrow_weights() -> None:
    """Its bits count: it is not rounded to theta's dtype."""
    results = []
    for impl in ("numba", "reference"):
        theta = torch.ones(5, 7, dtype=torch.bfloat16)
        accumulators = zeros(theta)
        sm3_(
            theta,
            torch.full((5, 7), 1.0 + 2**-20),
            accumulators,
            step_size=-0.1,
            key=KEY,
            impl=impl,
        )
        results.append([theta, *accumulators])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert bool((results[0][1] > 1.0).all())


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 4),
)
@settings(deadline=None, max_examples=40)
def test_sandwich(shape: tuple[int, ...], seed: int, steps: int) -> None:
    """sum g^2 <= nu_II <= nu_I at every step, A never falls, and nu_II is the paper's.

    Gradients are small integers: their squares' sums are exact, and so is every comparison. With
    theta 0 and step_size 1, the kernel leaves u = g / sqrt(nu) in it, two roundings in all.
    """
    rng = np.random.default_rng(seed)
    one, two, total = Cover(shape), Cover(shape), np.zeros(shape)
    accumulators = zeros(torch.zeros(shape, dtype=torch.float64))
    for _ in range(steps):
        g = rng.integers(-3, 4, shape).astype(np.float64) * (rng.random(shape) < 0.5)
        before = [vector.clone() for vector in accumulators]
        theta = torch.zeros(shape, dtype=torch.float64)
        sm3_(theta, torch.as_tensor(g), accumulators, step_size=1.0, key=KEY)
        total = total + g**2
        nu_one, nu_two = one.step_one(g), two.step_two(g)
        assert (total <= nu_two).all()
        assert (nu_two <= nu_one).all()
        assert torch.cat(accumulators).tolist() == two.mu.tolist()
        assert all(bool((new >= old).all()) for new, old in zip(accumulators, before, strict=True))
        u = np.divide(g, np.sqrt(nu_two), out=np.zeros(shape), where=nu_two > 0)
        assert np.abs(theta.numpy() - u).max() <= 2**-52


@pytest.mark.parametrize("eps", [0.0, 1e-10, 1e-2])
@pytest.mark.parametrize("shape", [(), (50,)])
def test_vectors_get_the_step_of_adagrad(shape: tuple[int, ...], eps: float) -> None:
    """torch.optim.Adagrad's, which divides 0 by 0 where eps is 0: gradients are not zero there.

    float64, 20 steps of length 0.1 at most, each with a few roundings: 20 * 0.1 * 4 * 2^-53.
    """
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    first = zoopt.SM3([ours], lr=0.1, eps=eps)
    second = torch.optim.Adagrad([theirs], lr=0.1, eps=eps)
    for step in range(20):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        if eps and step % 3 == 0:
            gradient = gradient * 0.0
        for param, optimizer in ((ours, first), (theirs, second)):
            param.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).abs().max() <= 20 * 0.1 * 4 * 2**-53 + 4 * 20 * 2**-53
    # torch fuses a multiplication with its addition here and there: a rounding less a step.
    torch.testing.assert_close(
        first.state[ours]["accumulator_0"],
        second.state[theirs]["sum"].view(-1),
        rtol=20 * 2**-52,
        atol=0.0,
    )


def test_averages_fall_and_sums_do_not() -> None:
    """Gradients of 4, then none: at beta 1/2 nu is 8 and halves, exactly."""
    for beta, expected in ((0.5, [8.0, 4.0, 2.0, 1.0]), (0.0, [16.0] * 4)):
        param = torch.zeros(3, 2, 2, requires_grad=True)
        optimizer = zoopt.SM3([param], beta=beta)
        for step, value in enumerate(expected):
            param.grad = torch.full_like(param, 0.0 if step else 4.0)
            optimizer.step()
            for accumulator in optimizer.state[param].values():
                assert bool((accumulator == value).all())


def sparse_gradients(shape: tuple[int, ...], dtype: torch.dtype, steps: int) -> list[torch.Tensor]:
    """Of a few rows each, one of them twice; the last has no row."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for step in range(steps):
        rows = torch.randint(0, shape[0], (4,), generator=generator)
        rows = torch.cat((rows, rows[:1])) if step < steps - 1 else rows[:0]
        values = torch.randn(len(rows), *shape[1:], generator=generator).to(dtype)
        found.append(
            torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True).coalesce()
        )
    return found


@pytest.mark.parametrize("shape", [(30, 8), (12, 5, 3), (20,), (9, 1, 7)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_sparse_rows_are_dense_gradients_with_zero_rows(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Weights (rounded stochastically if narrow) and accumulators, bit for bit."""
    start = torch.randn(shape).to(dtype)
    params = [start.clone().requires_grad_() for _ in range(2)]
    optimizers = [zoopt.SM3([param], seed=5) for param in params]
    for gradient in sparse_gradients(shape, dtype, 6):
        for param, optimizer, grad in zip(
            params, optimizers, (gradient, gradient.to_dense()), strict=True
        ):
            param.grad = grad.clone()
            optimizer.step()
    assert same_bits(params[0].detach(), params[1].detach())
    assert not same_bits(params[0].detach(), start)
    for name, value in optimizers[0].state[params[0]].items():
        assert same_bits(value, optimizers[1].state[params[1]][name]), name


def test_absent_rows_keep_everything() -> None:
    """With averages, momentum and decay too, which a dense zero row would feel."""
    param = torch.randn(6, 4, requires_grad=True)
    optimizer = zoopt.SM3([param], beta=0.5, momentum=0.9, weight_decay=0.1)
    param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    state = optimizer.state[param]
    before = {name: value.clone() for name, value in [*state.items(), ("param", param.detach())]}
    indices = torch.tensor([[1, 4]])
    param.grad = torch.sparse_coo_tensor(
        indices, torch.zeros(2, 4), param.shape, check_invariants=True
    )
    optimizer.step()
    absent = [0, 2, 3, 5]
    for name, value in (*state.items(), ("param", param.detach())):
        if name != "accumulator_1":
            assert same_bits(value[absent], before[name][absent]), name
            assert not torch.equal(value[[1, 4]], before[name][[1, 4]]), name
    # Absent rows still stand for 2, hence no column may fall below.
    assert state["accumulator_0"].tolist() == [2.0, 1.0, 2.0, 2.0, 1.0, 2.0]
    assert state["accumulator_1"].tolist() == [2.0] * 4


def test_trains_a_sparse_embedding() -> None:
    """Whose gradients are not coalesced: the same as a dense one's."""
    losses = []
    for sparse in (True, False):
        embedding = torch.nn.Embedding(20, 8, sparse=sparse)
        torch.nn.init.ones_(embedding.weight)
        optimizer = zoopt.SM3(embedding.parameters(), lr=0.3)
        for step in range(30):
            optimizer.zero_grad()
            loss = embedding(torch.tensor([1, step % 5, 1, 7])).pow(2).mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert torch.equal(embedding.weight[8:], torch.ones(12, 8))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] < 0.1


def test_gradients_sparse_in_more_than_rows_are_refused_before_anything_changes() -> None:
    first, second = (torch.ones(3, 3, requires_grad=True) for _ in range(2))
    optimizer = zoopt.SM3([first, second])
    first.grad, second.grad = torch.ones(3, 3), torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="ones of whole rows, got one of sparse_dim 2 for"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3, 3))
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_nothing_is_divided_by_nothing(dtype: torch.dtype) -> None:
    """Zero gradients, and those whose squares are zero in float32, leave the weights alone."""
    param = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    optimizer = zoopt.SM3([param])
    for value in (0.0, 1e-30 if dtype != torch.float64 else 1e-200):
        param.grad = torch.full_like(param, value)
        optimizer.step()
        assert torch.equal(param, torch.ones_like(param))
    param.grad = torch.full_like(param, 6e-8)
    optimizer.step()
    assert bool((param < 1.0).all())
    assert bool((param > 0.85).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accumulators_of_narrow_weights_do_not_stall(dtype: torch.dtype) -> None:
    """bfloat16 would stop at 256, and float16 overflow: 300 squares of 16 are 76,800."""
    param = torch.ones(2, 2, dtype=dtype, requires_grad=True)
    optimizer = zoopt.SM3([param])
    param.grad = torch.full_like(param, 16.0)
    for _ in range(300):
        optimizer.step()
    assert optimizer.state[param]["accumulator_0"].tolist() == [76_800.0] * 2


def test_narrow_weights_move_by_less_than_their_spacing() -> None:
    """A step of 1e-3 below 1, where bfloat16 is spaced by 2^-8 = 4e-3, in expectation.

    Of 4096 roundings with a standard deviation of 2e-3 at most, the mean is within 4 * 2e-3 / 64.
    """
    for rounding, expected in (("auto", 1e-3), ("stochastic", 1e-3), ("nearest", 0.0)):
        param = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
        optimizer = zoopt.SM3([param], lr=1e-3, rounding=rounding, seed=1)
        param.grad = torch.ones_like(param)
        optimizer.step()
        moved = 1.0 - param.double().mean().item()
        assert abs(moved - expected) <= (1.3e-4 if expected else 0.0), rounding


def test_state_is_no_more_than_asked_for() -> None:
    """The sum of the dimensions; a buffer with momentum; a counter with stochastic rounding."""
    shape = (3, 5, 7)
    axes = {"accumulator_0", "accumulator_1", "accumulator_2"}
    for dtype, options, others in (
        (torch.float32, {}, set()),
        (torch.float32, {"rounding": "stochastic"}, set()),
        (torch.bfloat16, {"rounding": "nearest"}, set()),
        (torch.bfloat16, {}, {"step"}),
        (torch.float32, {"momentum": 0.9}, {"momentum_buffer"}),
    ):
        param = torch.ones(shape, dtype=dtype, requires_grad=True)
        optimizer = zoopt.SM3([param], **options)
        param.grad = torch.ones_like(param)
        optimizer.step()
        state = optimizer.state[param]
        assert set(state) == axes | others
        assert sum(state[name].nbytes for name in axes) == 4 * sum(shape)
    scalar = torch.ones((), requires_grad=True)
    assert zoopt.SM3([scalar]).declared_state_bytes() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    """A transposed parameter, a transposed gradient, and both contiguous: the same bits."""
    start, gradient = torch.randn(6, 10).to(dtype), torch.randn(6, 10).to(dtype)
    results = []
    for transposed in ((False, False), (True, False), (False, True), (True, True)):
        theta, grad = (
            tensor.t().contiguous().t() if turn else tensor.clone()
            for tensor, turn in zip((start, gradient), transposed, strict=True)
        )
        param = theta.requires_grad_()
        optimizer = zoopt.SM3([param], momentum=0.5, seed=3)
        for _ in range(3):
            param.grad = grad
            optimizer.step()
        results.append(param.detach().contiguous())
        assert param.is_contiguous() != transposed[0]
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)])
def test_empty_parameters(shape: tuple[int, ...]) -> None:
    param = torch.ones(shape, requires_grad=True)
    optimizer = zoopt.SM3([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(not value.any() for value in optimizer.state[param].values())


@pytest.mark.parametrize("impl", ["numba", "reference"])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_its_own_weight_only(impl: str, bad: float) -> None:
    theta = torch.zeros(4, 20)
    gradient = torch.ones(4, 20)
    gradient[2, 5] = bad
    accumulators = zeros(theta)
    for _ in range(3):
        sm3_(theta, gradient, accumulators, step_size=-0.1, key=KEY, impl=impl)
        gradient[2, 5] = 1.0
    spoiled = ~theta.isfinite()
    assert spoiled.nonzero().tolist() == [[2, 5]]
    assert not accumulators[0][2].isfinite()
    assert not accumulators[1][5].isfinite()
    assert accumulators[0].isfinite().sum() == 3


def test_addresses_have_64_bits() -> None:
    """Elements of tensors that are longer than 2^31 and of these rows: every offset the GPU kernel
    adds to a pointer is an int64, from a row's number on. (numba's integers are, all of them.)"""
    variants = pytest.importorskip("bench.variants")
    variant = variants.Variant("sm3_momentum", "bf16", rounding="stochastic")
    source = variant.launch("sm_90").compiled.asm["ttir"]
    offsets = re.findall(r"tt\.addptr .*, (\S+) loc", source)
    assert len(offsets) >= 6
    assert all(offset.endswith(("xi64>", "i64")) for offset in offsets), offsets
    assert not re.search(r"arith\.muli .* : (tensor<256x)?i32", source)


def test_refuses_bad_arguments() -> None:
    param = torch.ones(2, 3, requires_grad=True)
    for options, message in (
        ({"momentum": 1.0}, "momentum must be a finite number >= 0 and < 1, got 1.0"),
        ({"beta": -0.1}, "beta must be a finite number >= 0 and < 1, got -0.1"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            zoopt.SM3([param], **options)


def test_the_kernel_refuses_tensors_that_do_not_match() -> None:
    theta, gradient, accumulators = (
        torch.ones(2, 3),
        torch.ones(2, 3),
        [torch.ones(2), torch.ones(3)],
    )
    buffer = torch.ones(3, 2).t()
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 0]]), torch.ones(2, 3), (2, 3), check_invariants=True
    )
    before = copy.deepcopy([theta, *accumulators])
    for arguments, options, message in (
        ((theta, torch.ones(3, 2), accumulators), {}, r"gradient must have theta's shape \(2, 3\)"),
        ((theta, gradient, accumulators[:1]), {}, r"accumulators must be torch.float32 vectors"),
        ((theta, gradient, accumulators), {"buffer": buffer}, "buffer must be contiguous"),
        ((theta, gradient, accumulators), {"beta": 1.0}, "beta must be a finite number >= 0 and"),
        ((theta, gradient, accumulators), {"rounding_draw": -1}, "rounding_draw must be an int in"),
        ((theta, sparse, accumulators), {}, "sparse in its first axis only, and coalesced"),
        ((torch.ones(1, 1).expand(2, 3), gradient, accumulators), {}, "theta is expanded"),
    ):
        with pytest.raises(ValueError, match=message):
            sm3_(*arguments, step_size=-0.1, key=KEY, **options)
    assert all(torch.equal(a, b) for a, b in zip([theta, *accumulators], before, strict=True))
