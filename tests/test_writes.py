"""Many writes in one pass: the bits of the same writes made one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.writes import ALL_RULES, batch, one_by_one, script
from zoopt import kernels
from zoopt.kernels import NoiseKey, Write, dispatch
from zoopt.kernels.noise.writes import Script, kept_directions

SIZES = (5000, 37, 2048, 1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOISES: list[dict[str, Any]] = [
    {},
    {"distribution": "rademacher"},
    {"density": 0.25},
    {"distribution": "rademacher", "density": 0.25},
]


def check(
    dtype: torch.dtype,
    noise: dict[str, Any],
    rules: tuple[str, ...],
    impl: str,
    *,
    count: int = 23,
    sizes: tuple[int, ...] = SIZES,
) -> None:
    writes = script(count, stochastic=dtype in DTYPES[1:], rules=rules)
    theta, expected = batch(dtype, sizes, **noise), batch(dtype, sizes, **noise)
    wide = torch.promote_types(dtype, torch.float32)
    buffers = [torch.linspace(-1, 1, t.numel(), dtype=wide) for t in theta.tensors]
    before = [buffer.clone() for buffer in buffers]
    stateful = any(write.rule == "momentum" for write in writes)
    kernels.write_each_(theta, writes, buffer=buffers if stateful else None, impl=impl)
    for i, (tensor, other, key) in enumerate(
        zip(theta.tensors, expected.tensors, theta.keys, strict=True)
    ):
        one_by_one(other, key, writes, before[i])
        if impl == "triton":
            # Which NaN arithmetic returns is the processor's; only that it is one is ours.
            assert torch.equal(tensor.isnan(), other.isnan())
            tensor, other = tensor.nan_to_num(), other.nan_to_num()
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))
        assert torch.equal(buffers[i].view(torch.uint8), before[i].view(torch.uint8))


@pytest.mark.parametrize("noise", NOISES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_have_the_bits_of_each_made_alone(dtype: torch.dtype, noise: dict[str, Any]) -> None:
    check(dtype, noise, ALL_RULES, "numba")
    check(dtype, noise, ("none",), "reference")


def test_the_reference_has_all_rules() -> None:
    check(torch.float32, {}, ALL_RULES, "reference")
    check(torch.float64, {"density": 0.5}, ALL_RULES, "reference")


@given(draws=st.lists(st.integers(0, 9), max_size=40), room=st.integers(1, 5))
def test_directions_are_where_terms_look_for_them(draws: list[int], room: int) -> None:
    """What a term finds at its place is its direction, and nothing is made twice without need."""
    places, made, last = kept_directions(draws, room)
    held: dict[int, tuple[int, int]] = {}
    for j, (draw, place, new) in enumerate(zip(draws, places, made, strict=True)):
        assert 0 <= place < room
        if new:
            assert draw not in {d for d, _ in held.values()}
            held[place] = draw, j
        assert held[place][0] == draw
        assert last[held[place][1]] >= j
        assert last[j] == j or new
    if len({*draws}) <= room:
        assert sum(made) == len({*draws})


def test_a_write_of_more_directions_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are shared then, and directions made anew."""
    many = Write(tuple(range(200)), tuple(1e-3 for _ in range(200)))
    key = NoiseKey(1, 2)
    theta, expected = torch.zeros(300), torch.zeros(300)
    kernels.write_each_(theta, [many, many], key=key)
    one_by_one(expected, key, [many, many], torch.zeros(0))
    assert torch.equal(theta, expected)


def test_a_direction_of_one_term_leaves_those_that_are_kept() -> None:
    """One of an estimate, and one beside a mask, is made while a later term's lies in memory."""
    estimate: dict[str, Any] = {"rule": "sign", "gradients": (1.0,), "step_size": 0.1}
    for options, writes in (
        ({}, [Write((1,), (0.1,), estimate_draws=(5,), **estimate), Write((1, 3), (0.1, 0.2))]),
        ({"density": 0.25}, [Write((1, 2), (0.1, 0.1)), Write((1,), (0.1,))]),
    ):
        for distribution in ("normal", "rademacher"):
            key = NoiseKey(1, 2, distribution=distribution, **options)
            theta, expected = torch.zeros(5000), torch.zeros(5000)
            kernels.write_each_(theta, writes, key=key, impl="numba")
            kernels.write_each_(expected, writes, key=key, impl="reference")
            assert torch.equal(theta, expected)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_sums_after_sums_are_one_write(decay: float) -> None:
    """Moves and updates of a window, beside a step of one direction, which has a loop of its own,
    and a sign step: the bits of each write made alone."""
    window = [
        write
        for draw in range(3, 6)
        for write in (
            Write((draw,), (1e-3,)),
            Write((draw,), (-2e-3,)),
            Write((draw, draw - 1, draw - 2), (1e-3, -1e-4, -1e-5), decay),
        )
    ]
    sign = Write((7,), (0.1,), rule="sign", estimate_draws=(7,), gradients=(1.0,), step_size=1e-3)
    alone = [Write((8,), (0.1,)), Write((8,), (-0.2,)), Write((8,), (0.1,))]
    writes = [*window, sign, *window, *alone, *window]
    key = NoiseKey(1, 2)
    theta, expected = torch.linspace(-1, 1, 5000), torch.linspace(-1, 1, 5000)
    kernels.write_each_(theta, writes, key=key, impl="numba")
    one_by_one(expected, key, writes, torch.zeros(0))
    assert torch.equal(theta.view(torch.int32), expected.view(torch.int32))
    # A decay begins a write; so do a rule, what follows it, and the run of one direction.
    ends, *_ = Script(writes, torch.float32).arrays
    assert len(ends) - 1 == (7 if decay == 1.0 else 16)
    assert len(Script(writes, torch.bfloat16).arrays[0]) - 1 == len(writes)


def test_the_reference_has_buffers_where_triton_would_be_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writes = [Write((1,), (0.1,), 1.0, None, "momentum", (1,), (1.0,), step_size=-0.1)]
    key, theta, expected = NoiseKey(1, 2), torch.ones(9), torch.ones(9)
    buffer, own = torch.ones(9), torch.ones(9)
    one_by_one(expected, key, writes, own)
    monkeypatch.setattr(dispatch, "_best", lambda _: "triton")
    kernels.write_each_(theta, writes, buffer=buffer, key=key, impl="reference")
    assert torch.equal(theta, expected)
    assert torch.equal(buffer, own)
    with pytest.raises(ValueError, match=r"must be made by impl='numba' or 'reference', got"):
        kernels.write_each_(theta, writes, buffer=buffer, key=key)
    assert torch.equal(theta, expected)


def test_what_does_not_fit_is_told() -> None:
    theta, key = torch.zeros(3), NoiseKey(1, 2)
    for write, message in (
        (Write((1,), ()), "coefficients and draws must have equal lengths, got 0 and 1"),
        (Write((1 << 32,), (1.0,)), r"draw must be an int in \[0, 2\^32\), got 4294967296"),
        (Write((), (), rule="adam", estimate_draws=(1,), gradients=(1.0,)), "first and"),
        (Write((), (), rule="other"), "rule must be one of"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            kernels.write_each_(theta, [write], key=key)
    with pytest.raises(ValueError, match="buffer must be given where a write has rule 'momentum'"):
        kernels.write_each_(theta, [Write((1,), (1.0,))], buffer=theta.clone(), key=key)
    assert not theta.any()
    kernels.write_each_(theta, [], key=key)
    assert not theta.any()
