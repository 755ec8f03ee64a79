"""Batches: one pass over many tensors, with the bits of the operation on each alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zoopt import kernels
from zoopt.kernels.batch import Batch, share_no_memory
from zoopt.kernels.noise.key import NoiseKey

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = [impl for impl in kernels.available_impls() if impl != "triton"]
#: One element, a block and some, none, several blocks of every kernel, and one short of a block.
SIZES = (1, 4096 + 17, 0, 9000, 4095)
DRAWS = (1, 2**32 - 1, 7, 65536, 3)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def batch_of(
    dtype: torch.dtype, distribution: Any = "normal", density: float = 1.0, offset: int = 0
) -> Batch:
    """Tensors of several magnitudes, each with a stream; the offset is one tensor's only."""
    torch.manual_seed(7)
    tensors = [(torch.randn(n) * 10.0 ** torch.randint(-9, 5, (n,))).to(dtype) for n in SIZES]
    keys = [
        NoiseKey(2**63 + 5, 2**31 + i, offset * (i == 3), distribution, density)
        for i in range(len(SIZES))
    ]
    return Batch(tensors, keys)


def _apply(count: int, rounding: str) -> Callable[..., Any]:
    options = {"draws": DRAWS[:count], "decay": 0.9, "rounding": rounding}
    numbers = [0.1, -0.2, 0.3, 0.5, -0.7][:count]
    return lambda theta, buffer, **kw: kernels.apply_(theta, numbers, **options, **kw)


def _momentum(count: int) -> Callable[..., Any]:
    options = {"draws": DRAWS[:count], "momentum": 0.9, "step_size": -0.1, "decay": 0.99}
    numbers = [0.1, -0.2, 0.3, 0.5, -0.7][:count]
    return lambda theta, buffer, **kw: kernels.momentum_(
        *(theta, buffer, numbers, numbers), rounding="stochastic", **options, **kw
    )


def _window(theta: Any, buffer: Any, **kw: Any) -> Any:
    numbers = ([0.1, 0.0, 0.0], [1.0, -2.0, 0.5], [0.0, 0.3, 1.0], [0.0, 0.4, 1.0])
    closes = [False, True, True]
    options = {"draws": DRAWS[:3], "eps": 1e-8, "step_size": -0.1, "rounding": "stochastic"}
    return kernels.adam_window_(theta, *numbers, closes, **options, **kw)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "apply 1": _apply(1, "nearest"),
    "apply 4": _apply(4, "stochastic"),
    "apply 5": _apply(5, "stochastic"),
    "decay": lambda theta, buffer, **kw: kernels.apply_(theta, [], draws=[], decay=0.5, **kw),
    "momentum 2": _momentum(2),
    "momentum 5": _momentum(5),
    "add": lambda theta, buffer, **kw: kernels.add_(theta, buffer, [0.5], draws=[3], **kw),
    "window": _window,
}


def agree(operation: str, impl: str, batch: Batch) -> None:
    """The operation on the batch leaves what the reference leaves of each tensor alone."""
    run = OPERATIONS[operation]
    tensors = copy.deepcopy(batch.tensors)
    buffers = [torch.linspace(-1, 1, t.numel()) for t in tensors]
    expected = copy.deepcopy(buffers)
    assert run(batch, buffers, impl=impl) is batch
    for i, (theta, key) in enumerate(zip(tensors, batch.keys, strict=True)):
        run(theta, expected[i], key=key, impl="reference")
        assert torch.equal(bits(batch.tensors[i]), bits(theta)), i
        assert torch.equal(bits(buffers[i]), bits(expected[i])), i


def perturb_agrees(impl: str, batch: Batch) -> None:
    """So do copies at a displacement, and the displacement in place."""
    expected = [
        kernels.perturb(theta, 0.1, key=key, draw=3, impl="reference")
        for theta, key in zip(batch.tensors, batch.keys, strict=True)
    ]
    before = copy.deepcopy(batch.tensors)
    copies = kernels.perturb(batch, 0.1, draw=3, impl=impl)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, batch.tensors, strict=True))
    assert kernels.perturb(batch, 0.1, draw=3, out=batch.tensors, impl=impl) is batch.tensors
    for result in (copies, batch.tensors):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(result, expected, strict=True))
    scales = [torch.linspace(-1, 2, len(tensor)) for tensor in batch.tensors]
    scaled = kernels.perturb(batch, 0.1, draw=3, row_scale=scales, impl=impl)
    for i, (theta, key) in enumerate(zip(expected, batch.keys, strict=True)):
        own = {"key": key, "row_scale": scales[i], "impl": "reference"}
        assert torch.equal(bits(scaled[i]), bits(kernels.perturb(theta, 0.1, draw=3, **own)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_batch_is_its_tensors_one_by_one(operation: str, dtype: torch.dtype, impl: str) -> None:
    agree(operation, impl, batch_of(dtype))
    agree(operation, impl, batch_of(dtype, "rademacher", 0.3, offset=2**32 - 5))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb(dtype: torch.dtype, impl: str) -> None:
    perturb_agrees(impl, batch_of(dtype))
    perturb_agrees(impl, batch_of(dtype, "rademacher", offset=5))


def test_tensors_that_are_not_row_major_are_written_where_they_lie() -> None:
    base = torch.randn(6, 4)
    keys = [NoiseKey(1, 2), NoiseKey(1, 3)]
    expected = kernels.apply_(base.t().contiguous(), [0.5], draws=[1], key=keys[0])
    strided, dense = base.clone().t(), torch.randn(5)
    kernels.apply_(Batch([strided, dense], keys), [0.5], draws=[1])
    assert torch.equal(strided, expected)
    outs = [torch.empty(4, 6).t(), torch.empty(5)]
    before = base.clone()
    kernels.perturb(Batch([base, dense], keys), 0.5, draw=1, out=outs)
    assert torch.equal(outs[0], kernels.perturb(base, 0.5, draw=1, key=keys[0]))
    assert torch.equal(base, before)


def test_tensors_may_move_between_uses() -> None:
    """`param.data = ...` under a batch: the operation follows the parameter, not its old memory."""
    param, key = torch.nn.Parameter(torch.zeros(8)), NoiseKey(1, 2)
    batch = Batch([param, torch.zeros(3)], [key, NoiseKey(1, 3)])
    with torch.no_grad():
        kernels.apply_(batch, [1.0], draws=[1])
        old = param.data
        param.data = torch.zeros(4, 4).t()
        kernels.apply_(batch, [1.0], draws=[1])
    assert torch.equal(old, kernels.apply_(torch.zeros(8), [1.0], draws=[1], key=key))
    moved = kernels.apply_(torch.zeros(16), [1.0], draws=[1], key=key)
    assert torch.equal(param.detach().reshape(-1), moved)
    param.data = torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="share dtype and device"):
        kernels.apply_(batch, [1.0], draws=[1])


def test_the_address_of_a_tensor_alone_is_the_present_one() -> None:
    """An empty one is at 0; a check of one that is not must forget that."""
    param = torch.nn.Parameter(torch.zeros(0))
    batch = Batch([param], [NoiseKey(1, 2)])
    batch.check()
    assert batch.addresses == (0,)
    param.data = torch.ones(1000)
    batch.check()
    assert batch.addresses == (param.data_ptr(),)
    param.data = torch.zeros(0)
    for _ in range(2):
        batch.check()
        assert batch.addresses == (0,)
        assert batch.row_major() is batch


def test_a_check_that_fails_is_not_remembered() -> None:
    """The layout that it found belongs to tensors that were refused."""
    param, base = torch.nn.Parameter(torch.zeros(4, 3).t()), torch.zeros(12)
    batch, old = Batch([param, base], [NoiseKey(1, 2), NoiseKey(1, 3)]), param.data
    assert batch.row_major() is not batch
    param.data = base.view(3, 4)
    with pytest.raises(ValueError, match="share no memory"):
        batch.check()
    param.data = old
    batch.check()
    assert batch.row_major() is not batch


def test_another_layout_of_the_same_memory_is_checked() -> None:
    param = torch.nn.Parameter(torch.zeros(4, 4).t())
    batch = Batch([param, torch.zeros(3)], [NoiseKey(1, 2), NoiseKey(1, 3)])
    param.data = param.data[:1].expand(4, 4)
    with pytest.raises(ValueError, match="is expanded"):
        batch.check()


A, B = NoiseKey(1, 2), NoiseKey(1, 3)
X = torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Batch([], []), ValueError, "must have at least one tensor"),
        (lambda: Batch([X], [A, B]), ValueError, "got 1 tensors and 2 keys"),
        (
            lambda: Batch([X, X.clone()], [A, NoiseKey(2, 3)]),
            ValueError,
            "must share seed, distribution and density",
        ),
        (lambda: Batch([X, X.double()], [A, B]), ValueError, "must share dtype and device"),
        (lambda: Batch([X, X], [A, B]), ValueError, "share no memory"),
        (lambda: Batch([X[:5], X[4:]], [A, B]), ValueError, "share no memory"),
        (lambda: Batch([X, X.long()], [A, B]), TypeError, "must have one of the dtypes"),
        (lambda: Batch([X.to_sparse()], [A]), TypeError, "must be a dense tensor"),
        (lambda: Batch([X.to("meta")], [A]), ValueError, "must have values"),
        (lambda: Batch([X[:1].expand(4)], [A]), ValueError, "is expanded"),
        (lambda: Batch([1.0], [A]), TypeError, "must be a tensor, got float"),
        (lambda: kernels.apply_(X, [1.0], draws=[1]), TypeError, "key must be a NoiseKey"),
        (
            lambda: kernels.apply_(Batch([X], [A]), [1.0], draws=[1], key=A),
            TypeError,
            "key must be left out with a batch",
        ),
        (
            lambda: kernels.add_(Batch([X], [A]), [X.clone(), X.clone()], [], draws=[]),
            ValueError,
            "update must have one tensor for each of the batch's 1, got 2",
        ),
        (
            lambda: kernels.perturb(Batch([X], [A]), 1.0, draw=1, out=[]),
            ValueError,
            "out must have a tensor for each of the batch's 1, got 0",
        ),
    ],
)
def test_refuses_what_kernels_cannot_take(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
    assert not X.any()


@given(st.data())
def test_tensors_share_memory_where_their_elements_do(data: st.DataObject) -> None:
    """Against the sets of their elements' places, for slices and transposes of one matrix."""
    whole, places = torch.zeros(6, 8), torch.arange(48).view(6, 8)
    tensors, sets = [], []
    for _ in range(data.draw(st.integers(2, 4))):
        cuts = []
        for size in whole.shape:
            first, last = sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))
            cuts.append(slice(first, last, data.draw(st.integers(1, 3))))
        tensor, own = whole[tuple(cuts)], places[tuple(cuts)]
        tensors.append(tensor.t() if data.draw(st.booleans()) else tensor)
        sets.append(set(own.flatten().tolist()))
    apart = sum(map(len, sets)) == len(set().union(*sets))
    assert share_no_memory(tensors) is apart
