"""Operands in any memory: kernels read what a tensor means or refuse it, and touch nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from tests.test_kernels_adam import moments
from zoopt.kernels import NoiseKey, adam_, adamw_, add_product_, available_impls, sm3_
from zoopt.kernels import operands as checks
from zoopt.kernels.adam.moments import Moment

KEY = NoiseKey(7, 9, 3)
M, N, R = 6, 8, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = [impl for impl in available_impls() if impl != "triton"]
Operands = dict[str, Tensor]


def whole(*shape: int, seed: int) -> Tensor:
    """Small whole numbers, whose sums have no order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


class Operation(NamedTuple):
    """An operation on operands by name: contiguous values, and which of them are written.

    Attributes:
        values: dtype -> the operands.
        run: operands, implementation -> all that the operation has written.
        written: operands that are written in place; `dense` ones must be contiguous.
    """

    values: Callable[[torch.dtype], Operands]
    run: Callable[[Operands, str | None], list[Tensor]]
    written: tuple[str, ...]
    dense: tuple[str, ...] = ()


def adamw_values(dtype: torch.dtype) -> Operands:
    return {"theta": whole(M, N, seed=1).to(dtype), "gradient": whole(M, N, seed=2).to(dtype)}


def stored(first: Moment, second: Moment) -> list[Tensor]:
    found = (first.codes, second.codes, first.scale, second.scale)
    return [tensor for tensor in found if tensor is not None]


def run_adamw(operands: Operands, impl: str | None) -> list[Tensor]:
    pair = moments(M * N, "int8")
    numbers: dict[str, Any] = {"betas": (0.9, 0.99), "scale": -0.1, "eps": 1e-8, "decay": 0.9}
    draws = {"moment_draw": 3, "rounding_draw": 4}
    adamw_(operands["theta"], operands["gradient"], *pair, key=KEY, impl=impl, **numbers, **draws)
    return [operands["theta"], *stored(*pair)]


def adam_values(dtype: torch.dtype) -> Operands:
    zeros = {"out": torch.zeros(M, N), "norms": torch.zeros(2, M)}
    moment = {"first": whole(M, N, seed=3), "second": whole(M, N, seed=4).square()}
    return {"gradient": whole(M, N, seed=2).to(dtype), **moment, **zeros}


def run_adam(operands: Operands, impl: str | None) -> list[Tensor]:
    pair = [
        Moment(operands[name], None, M * N, signed)
        for name, signed in (("first", True), ("second", False))
    ]
    # With scale 0 the norms are whole numbers, hence the same in any order.
    numbers: dict[str, Any] = {"betas": (0.5, 0.5), "scale": 0.0, "eps": 1.0}
    rest = {"out": operands["out"], "norms": operands["norms"]}
    adam_(operands["gradient"], *pair, key=KEY, impl=impl, **numbers, **rest)
    return [operands[name] for name in ("out", "norms", "first", "second")]


def sm3_values(dtype: torch.dtype) -> Operands:
    bounds = {"rows": whole(M, seed=5).abs(), "columns": whole(N, seed=6).abs()}
    return {**adamw_values(dtype), **bounds, "buffer": whole(M, N, seed=7)}


def run_sm3(operands: Operands, impl: str | None) -> list[Tensor]:
    names = ("theta", "rows", "columns", "buffer")
    theta, rows, columns, buffer = (operands[name] for name in names)
    numbers: dict[str, Any] = {"step_size": -0.1, "momentum": 0.5, "rounding_draw": 2}
    sm3_(theta, operands["gradient"], [rows, columns], buffer=buffer, key=KEY, impl=impl, **numbers)
    return [operands[name] for name in names]


def product_values(dtype: torch.dtype) -> Operands:
    return {
        **adamw_values(dtype),
        "left": whole(M, R, seed=3),
        "right": whole(N, R, seed=4),
        "channel_scale": whole(M, 1, seed=5),
        "sign_left": whole(M, R, seed=6),
        "sign_right": whole(N, R, seed=7),
    }


def run_product(operands: Operands, impl: str | None) -> list[Tensor]:
    add_product_(
        operands["theta"],
        operands["left"],
        operands["right"],
        alpha=0.5,
        gradient=operands["gradient"],
        channel_scale=operands["channel_scale"],
        sign_of=(operands["sign_left"], operands["sign_right"]),
        sign_step=2.0,
        key=KEY,
        rounding_draw=5,
        impl=impl,
    )
    return [operands["theta"]]


OPERATIONS = {
    "adamw_": Operation(adamw_values, run_adamw, ("theta",)),
    "adam_": Operation(
        adam_values,
        run_adam,
        ("out", "norms", "first", "second"),
        ("out", "norms", "first", "second"),
    ),
    "sm3_": Operation(sm3_values, run_sm3, ("theta", "rows", "columns", "buffer"), ("buffer",)),
    "add_product_": Operation(product_values, run_product, ("theta",)),
}
POSITIONS = [(name, place) for name, op in OPERATIONS.items() for place in op.values(torch.float32)]
READ = [(name, place) for name, place in POSITIONS if place not in OPERATIONS[name].written]


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [tensor.detach().clone().contiguous().view(torch.uint8).tolist() for tensor in tensors]


def laid_out(
    values: Tensor, order: list[int], steps: list[int], offset: int, negative: bool
) -> tuple[Tensor, Tensor]:
    """The values in memory with gaps, axes in another order; and all of that memory."""
    axes = [axis for axis in order if axis < values.dim()]
    permuted = values.permute(axes)
    room = [size * step for size, step in zip(permuted.shape, steps, strict=False)]
    memory = torch.full((offset + int(torch.tensor(room).prod()) + 5,), torch.nan).to(values.dtype)
    view = memory[offset : offset + int(torch.tensor(room).prod())].view(room)
    view = view[tuple(slice(None, None, step) for step in steps[: values.dim()])]
    view = view.permute([axes.index(axis) for axis in range(values.dim())])
    view.copy_(-values if negative else values)
    return (torch._neg_view(view) if negative else view), memory


@pytest.mark.parametrize(("name", "place"), POSITIONS)
@settings(max_examples=10, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.permutations([0, 1]),
    steps=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    offset=st.integers(0, 3),
    negative=st.booleans(),
    impl=st.sampled_from([None, *IMPLS]),
)
def test_an_operand_may_lie_in_memory_in_any_way(
    name: str,
    place: str,
    dtype: torch.dtype,
    order: list[int],
    steps: list[int],
    offset: int,
    negative: bool,
    impl: str | None,
) -> None:
    operation = OPERATIONS[name]
    expected = bits(operation.run(operation.values(dtype), "reference"))
    given_ = operation.values(dtype)
    given_[place], memory = laid_out(given_[place], order, steps, offset, negative)
    before = memory.clone()
    if place in operation.dense and not given_[place].is_contiguous():
        with pytest.raises(ValueError, match="contiguous"):
            operation.run(given_, impl)
        assert bits([memory]) == bits([before])
        return
    if place in operation.dense and negative:
        with pytest.raises(ValueError, match="contiguous"):
            operation.run(given_, impl)
        return
    assert bits(operation.run(given_, impl)) == expected
    gaps = torch.ones_like(memory, dtype=torch.bool)
    gaps.as_strided(given_[place].shape, given_[place].stride(), offset).fill_(False)
    assert bits([memory[gaps]]) == bits([before[gaps]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "place"), READ)
def test_what_is_read_may_be_expanded(name: str, place: str, impl: str) -> None:
    """As the gradient of a mean is."""
    operation = OPERATIONS[name]
    plain, expanded = operation.values(torch.float32), operation.values(torch.float32)
    plain[place] = torch.full_like(plain[place], 2.0)
    expanded[place] = torch.tensor(2.0).expand(plain[place].shape)
    expected = bits(operation.run(plain, "reference"))
    assert bits(operation.run(expanded, impl)) == expected


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "place"), READ)
def test_what_is_read_may_be_zeros_without_memory(name: str, place: str, impl: str) -> None:
    operation = OPERATIONS[name]
    plain, lazy = operation.values(torch.float32), operation.values(torch.float32)
    plain[place] = torch.zeros_like(plain[place])
    lazy[place] = torch._efficientzerotensor(plain[place].shape)
    expected = bits(operation.run(plain, "reference"))
    assert bits(operation.run(lazy, impl)) == expected


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, place in READ if place != "channel_scale"]
)
def test_what_is_read_may_be_part_of_what_is_written(name: str, place: str, impl: str) -> None:
    """It is as it was before; and where it is the very same elements, too."""
    operation = OPERATIONS[name]
    target = operation.written[0]
    for shift in (0, 1):
        shared = operation.values(torch.float32)
        memory = torch.arange(M * N + 1.0)
        count = shared[place].numel()
        shared[target] = memory[: M * N].view(M, N)
        shared[place] = memory[shift : shift + count].view(shared[place].shape)
        apart = {key: value.clone() for key, value in shared.items()}
        expected = bits(operation.run(apart, "reference"))
        assert bits(operation.run(shared, impl)) == expected


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "wrapper": (lambda t: TwoTensor(t, t.clone()), "TwoTensor"),
    "meta": (lambda t: t.to("meta"), "meta"),
    "sparse": (lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(), "layout"),
    "nested": (lambda t: torch.nested.as_nested_tensor([t], layout=torch.strided), "nested"),
    "integers": (lambda t: t.to(torch.int32), "dtype|codes|accumulators|norms|buffer"),
    "complex": (lambda t: t.to(torch.complex64), "dtype|codes|accumulators|norms|buffer"),
    "another shape": (lambda t: torch.cat((t, t)), "shape|elements|values|numel|norms|r\\)"),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse CSR).*:UserWarning")
@pytest.mark.parametrize("impl", [None, *IMPLS])
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize(("name", "place"), POSITIONS)
def test_what_has_no_memory_is_refused(name: str, place: str, kind: str, impl: str | None) -> None:
    """Before anything changes."""
    operation = OPERATIONS[name]
    given_ = operation.values(torch.float32)
    before = bits(list(given_.values()))
    bad, message = REFUSED[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        operation.run({**given_, place: bad(given_[place])}, impl)
    assert bits(list(given_.values())) == before


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "place"), POSITIONS)
@pytest.mark.parametrize("left", [0, 16])
def test_memory_that_has_been_freed_is_not_touched(
    name: str, place: str, impl: str, left: int
) -> None:
    """As FSDP frees parameters between their uses."""
    operation = OPERATIONS[name]
    given_ = operation.values(torch.float32)
    given_[place] = given_[place].clone()
    given_[place].untyped_storage().resize_(left)
    with pytest.raises(ValueError, match="freed or cut"):
        operation.run(given_, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "place"),
    [(n, p) for n, p in POSITIONS if p in OPERATIONS[n].written and p not in ("norms",)],
)
def test_what_is_written_must_not_share_memory(name: str, place: str, impl: str) -> None:
    operation = OPERATIONS[name]
    given_ = operation.values(torch.float32)
    shape = given_[place].shape
    strides = [(0,) * len(shape), (1, 1), (2, 3), (7, 1)]
    for stride in strides:
        if len(stride) != len(shape):
            continue
        bad = torch.zeros(100).as_strided(shape, stride)
        with pytest.raises(ValueError, match=r"share memory|contiguous"):
            operation.run({**given_, place: bad}, impl)


def test_axes_that_interlock_share_no_memory() -> None:
    """Offsets 0 2 4 and 3 5 7: further apart than either axis alone would say."""
    assert not checks._shares_memory(torch.zeros(20).as_strided((3, 2), (2, 3)))
    assert checks._shares_memory(torch.zeros(20).as_strided((4, 2), (2, 4)))


@pytest.mark.parametrize("impl", IMPLS)
def test_two_results_must_not_share_memory(impl: str) -> None:
    both = torch.zeros(M * N + 4)
    pair = [Moment(both[i : i + M * N], None, M * N, i == 0) for i in (0, 4)]
    numbers: dict[str, Any] = {"betas": (0.9, 0.9), "scale": 1.0, "eps": 1e-8, "key": KEY}
    with pytest.raises(ValueError, match="first and second must not share memory"):
        adam_(torch.ones(M, N), *pair, impl=impl, **numbers)
    theta = torch.zeros(M, N)
    pair = [Moment(theta, None, M * N, True), Moment(torch.zeros(M, N), None, M * N, False)]
    with pytest.raises(ValueError, match="theta and first must not share memory"):
        adamw_(theta, torch.ones(M, N), *pair, decay=1.0, impl=impl, **numbers)


@pytest.mark.parametrize(
    ("codes", "scale", "signed"),
    [
        (torch.zeros(48, dtype=torch.float16), None, True),
        (torch.zeros(48, dtype=torch.int8), None, True),
        (torch.zeros(48, dtype=torch.uint8), torch.zeros(1), True),
        (torch.zeros(48, dtype=torch.int8), torch.zeros(1), False),
        (torch.zeros(24, dtype=torch.int8), torch.zeros(1), True),
        (torch.zeros(48), torch.zeros(1), True),
        (torch.zeros(48, dtype=torch.int8), torch.zeros(1, dtype=torch.float64), True),
        (torch.zeros(48, dtype=torch.int8), torch.zeros(1, device="meta"), True),
    ],
)
def test_moments_have_the_dtypes_of_their_format(
    codes: Tensor, scale: Tensor | None, signed: bool
) -> None:
    with pytest.raises((TypeError, ValueError), match=r"codes|scale"):
        Moment(codes, scale, 48, signed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [[0, 6], [-1, 2], [2, 2], [3, 1]])
def test_rows_of_a_sparse_gradient_lie_in_it(rows: list[int], impl: str) -> None:
    gradient = torch.sparse_coo_tensor(
        torch.tensor([rows]), torch.ones(2, N), (M, N), check_invariants=False, is_coalesced=True
    )
    theta, bounds = torch.zeros(M, N), [torch.zeros(M), torch.zeros(N)]
    with pytest.raises(IndexError, match="distinct rows"):
        sm3_(theta, gradient, bounds, step_size=-0.1, key=KEY, impl=impl)
    assert not theta.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ambient_mode_changes_no_bit(name: str, dtype: torch.dtype, impl: str) -> None:
    """Autocast, another default device, another default dtype."""
    operation = OPERATIONS[name]
    expected = bits(operation.run(operation.values(dtype), impl))
    given_ = [operation.values(dtype) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        assert bits(operation.run(given_[0], impl)) == expected
    if name != "adamw_":  # Whose moments are made by this test.
        with torch.device("meta"):
            found = operation.run(given_[1], impl)
        assert bits(found) == expected
    torch.set_default_dtype(torch.float64)
    try:
        found = operation.run(given_[2], impl) if name != "adamw_" else []
    finally:
        torch.set_default_dtype(torch.float32)
    assert bits(found) == (expected if name != "adamw_" else [])


def test_addresses_are_taken_in_one_place() -> None:
    kernels = Path(checks.__file__).parent
    found = {
        path.relative_to(kernels).as_posix()
        for path in kernels.rglob("*.py")
        if re.search(r"\.data_ptr\b", path.read_text())
    }
    # places.py only compares where tensors are with where they were; a batch hands on the places of
    # its own tensors once it has checked them.
    assert found == {"operands.py", "places.py", "batch.py"}
