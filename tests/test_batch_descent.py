"""Shaped and ruled updates of batches: with the bits of the operation on each tensor alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_batch import DRAWS, DTYPES, batch_of, bits
from zoopt.kernels import available_impls
from zoopt.kernels.batch import Batch
from zoopt.kernels.descent.op import curve_, descend_, energies, small_elements, turn_
from zoopt.kernels.descent.rule import Rule, Shape
from zoopt.kernels.noise.key import NoiseKey

IMPLS = [impl for impl in available_impls() if impl != "triton"]
SHAPES = {
    "plain": Shape(),
    "small": Shape("small"),
    "kept": Shape("kept"),
    "scaled": Shape("scaled"),
    "cone": Shape("cone", 0.3, -0.7),
}
RULES = {
    "none": Rule(),
    "momentum": Rule("momentum", (0.9, -0.1)),
    "sign": Rule("sign", (-0.1,)),
    "adam": Rule("adam", (0.9, 0.1, 0.99, 0.01, 0.5, -0.1, 1e-8)),
}
#: Every rule with a plain shape and another one, every shape with a rule and without.
CASES = [("plain", rule) for rule in RULES]
CASES += [("small", "adam"), ("kept", "momentum"), ("kept", "none"), ("small", "sign")]
CASES += [("scaled", "none"), ("cone", "none"), ("scaled", "adam"), ("cone", "momentum")]


def beside_of(shape: str, batch: Batch) -> list[Tensor] | None:
    """What a shape reads: limits, bools, or positive numbers."""
    if shape == "plain":
        return None
    if shape == "small":
        return [tensor.float().abs().median().reshape(()) for tensor in batch.tensors]
    found = [torch.linspace(0.5, 2.0, tensor.numel()) for tensor in batch.tensors]
    return [own > 1.0 for own in found] if shape == "kept" else found


def states(rule: str, batch: Batch) -> dict[str, list[Tensor]]:
    """A rule's state, which is not 0."""
    names = ("first", "second")[: RULES[rule].states]
    counts = batch.counts
    return {name: [torch.linspace(0.1, 1.0, count) for count in counts] for name in names}


def descends(
    shape: str, rule: str, batch: Batch, impl: str, **options: Any
) -> tuple[Batch, dict[str, list[Tensor]]]:
    """The batch and its state after one update."""
    state = states(rule, batch)
    numbers = ([0.1, -0.2, 0.3, 0.5, -0.7], [1.0, 0.0, -0.5, 0.25, 2.0])
    descend_(
        *(batch, *numbers),
        draws=DRAWS,
        shape=SHAPES[shape],
        rule=RULES[rule],
        beside=beside_of(shape, batch),
        decay=0.9,
        rounding="stochastic",
        impl=impl,
        **state,
        **options,
    )
    return batch, state


def singly(batch: Batch) -> list[Batch]:
    """Each tensor alone, in memory of its own."""
    indices = batch.indices or [None] * len(batch)
    return [
        Batch([tensor.clone()], [key], None if own is None else [own])
        for tensor, key, own in zip(batch.tensors, batch.keys, indices, strict=True)
    ]


def agree(shape: str, rule: str, impl: str, batch: Batch) -> None:
    """The update of the batch leaves what the reference's leaves of each tensor alone."""
    alone = [descends(shape, rule, own, "reference") for own in singly(batch)]
    _, state = descends(shape, rule, batch, impl)
    for i, (own, expected) in enumerate(alone):
        assert torch.equal(bits(batch.tensors[i]), bits(own.tensors[0])), i
        for name, tensors in state.items():
            assert torch.equal(bits(tensors[i]), bits(expected[name][0])), (i, name)


def indexed(batch: Batch) -> Batch:
    """Some elements of each tensor that has some, in an order of their own."""
    kept = [i for i, tensor in enumerate(batch.tensors) if tensor.numel()]
    tensors = [batch.tensors[i] for i in kept]
    indices = [torch.randperm(tensor.numel())[: tensor.numel() // 2 + 1] for tensor in tensors]
    return Batch(tensors, [batch.keys[i] for i in kept], indices)


def whole(batch: Batch) -> Batch:
    """The batch without empty tensors, of which no limit can be taken."""
    kept = [i for i, tensor in enumerate(batch.tensors) if tensor.numel()]
    return Batch([batch.tensors[i] for i in kept], [batch.keys[i] for i in kept])


def state_agrees(impl: str, batch: Batch) -> None:
    """So do changes of state alone, masks by magnitude, and sums of squares to rounding."""
    changes: list[Callable[..., Any]] = [
        lambda own, impl: curve_(own, [0.5, 0.25], draws=DRAWS[:2], base=0.9, impl=impl),
        lambda own, impl: curve_(own, [0.1] * 5, draws=DRAWS, base=1.0, impl=impl),
        lambda own, impl: turn_(
            own, [0.5] * 5, draws=DRAWS, radial=0.3, keep=0.9, grow=0.1, impl=impl
        ),
    ]
    for change in changes:
        alone = [change(own, "reference") for own in singly(batch)]
        change(batch, impl)
        for tensor, own in zip(batch.tensors, alone, strict=True):
            assert torch.equal(bits(tensor), bits(own.tensors[0]))
    for options in ({}, {"coefficients": [1.0, -2.0], "draws": DRAWS[:2]}):
        squares = energies(batch, **options, impl=impl)  # type: ignore[arg-type]
        own = [energies(each, **options, impl="reference") for each in singly(batch)]  # type: ignore[arg-type]
        # Sums of at most 2^14 products in float64.
        torch.testing.assert_close(squares, torch.cat(own), rtol=2.0**-38, atol=0.0)


def masks_agree(impl: str, batch: Batch) -> None:
    limits = beside_of("small", batch)
    assert limits is not None
    masks = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in batch.tensors]
    small_elements(batch, limits, masks, impl=impl)
    for tensor, limit, mask in zip(batch.tensors, limits, masks, strict=True):
        assert torch.equal(mask, tensor.abs() <= limit)
        assert mask.any() or not tensor.numel()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_a_batch_is_its_tensors_one_by_one(
    shape: str, rule: str, dtype: torch.dtype, impl: str
) -> None:
    agree(shape, rule, impl, whole(batch_of(dtype)))
    if shape == "plain":
        agree(shape, rule, impl, batch_of(dtype, "rademacher", 0.3, offset=2**32 - 5))
        agree(shape, rule, impl, indexed(batch_of(dtype, offset=5)))


@pytest.mark.parametrize("impl", IMPLS)
def test_state_and_masks(impl: str) -> None:
    state_agrees(impl, batch_of(torch.float32, offset=3))
    for dtype in DTYPES:
        masks_agree(impl, whole(batch_of(dtype)))


@pytest.mark.parametrize("impl", IMPLS)
def test_copies_leave_theta_alone(impl: str) -> None:
    batch = whole(batch_of(torch.bfloat16))
    before = copy.deepcopy(batch.tensors)
    out = [torch.empty_like(tensor) for tensor in batch.tensors]
    descends("kept", "none", batch, impl, out=out)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, batch.tensors, strict=True))
    descends("kept", "none", batch, "reference")
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(out, batch.tensors, strict=True))


X, KEY = torch.zeros(8), NoiseKey(1, 2)
PLAIN: dict[str, Any] = {"draws": [1], "shape": Shape(), "rule": Rule()}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: descend_(Batch([X], [KEY]), [1.0], [1.0], **{**PLAIN, "rule": RULES["adam"]}),
            ValueError,
            "first must be given",
        ),
        (
            lambda: descend_(Batch([X], [KEY]), [1.0], [1.0], **PLAIN, beside=[X.clone()]),
            ValueError,
            "beside must be None",
        ),
        (
            lambda: descend_(
                Batch([X], [dataclasses.replace(KEY, density=0.5)]),
                *([1.0], [1.0]),
                **{**PLAIN, "shape": SHAPES["cone"]},
                beside=[X.clone()],
            ),
            ValueError,
            "density must be 1",
        ),
        (
            lambda: turn_(
                Batch([X.bfloat16()], [KEY]), [], draws=[], radial=0.0, keep=1.0, grow=0.0
            ),
            TypeError,
            "state must be of float32 or float64",
        ),
        (
            lambda: Batch([X], [KEY], [torch.tensor([1], dtype=torch.int32)]),
            ValueError,
            "indices must be int64",
        ),
        (lambda: Batch([X], [KEY], []), ValueError, "indices must have one tensor for each"),
    ],
)
def test_refuses_what_kernels_cannot_take(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
    assert not X.any()
