"""Batches of moments: one pass over many tensors, with the bits of each alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_kernels_adam import CODED, FORMATS, agree, moments
from zoopt import kernels
from zoopt.kernels import NoiseKey
from zoopt.kernels.adam.moments import Moment, decode, encode
from zoopt.kernels.adam.op_average import load_
from zoopt.kernels.batch import Batch
from zoopt.kernels.noise import philox

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = [impl for impl in kernels.available_impls() if impl != "triton"]
#: Two elements, a block and some, none, one short of a block, several blocks.
SIZES = (2, 2048 + 17, 0, 2047, 4096)
#: Rows of one length, of matrices for norms.
SHAPES = ((3, 40), (0, 40), (70, 40), (1, 40))


def keys(count: int, offset: int = 0) -> list[NoiseKey]:
    return [NoiseKey(2**63 + 5, 2**31 + i, offset * (i == 1)) for i in range(count)]


def tensors(dtype: torch.dtype, shapes: Any, *, bad: bool = False) -> list[Tensor]:
    torch.manual_seed(3)
    made = [(torch.randn(shape) * 10.0 ** torch.randint(-3, 1, ())).to(dtype) for shape in shapes]
    if bad:
        made[1].view(-1)[5], made[1].view(-1)[700] = torch.nan, torch.inf
    return made


def pairs(sizes: Any, form: str) -> tuple[list[Moment], list[Moment]]:
    made = [moments(size, form) for size in sizes]
    return [first for first, _ in made], [second for _, second in made]


def stored(found: list[Moment]) -> list[Tensor]:
    return [t for moment in found for t in (moment.codes, moment.scale) if t is not None]


def run(
    operation: str,
    dtype: torch.dtype,
    form: str,
    impl: str,
    *,
    together: bool,
    offset: int = 0,
    draw: int | None = 7,
    bad: bool = False,
) -> list[Tensor]:
    """Two steps, in a batch or tensor by tensor: everything that is written."""
    norms_too = operation == "norms"
    shapes = SHAPES if norms_too else [(size,) for size in SIZES]
    if form == "int4":
        shapes = shapes[:2] + shapes[3:]  # How many bits no codes have cannot be told.
    sizes = [torch.Size(shape).numel() for shape in shapes]
    own = keys(len(shapes), offset)
    theta, firsts, seconds = tensors(dtype, shapes), *pairs(sizes, form)
    written: list[Tensor] = []
    numbers: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "impl": impl}
    for step in range(2):
        gradients = tensors(dtype, shapes, bad=bad and step == 1)
        draws: dict[str, Any] = {"moment_draw": None if draw is None else draw + step}
        if operation == "adamw":
            options = {"scale": -0.1, "decay": 0.9, "rounding_draw": draw, **numbers, **draws}
            if together:
                kernels.adamw_(Batch(theta, own), gradients, firsts, seconds, **options)
            else:
                for i, target in enumerate(theta):
                    kernels.adamw_(
                        target, gradients[i], firsts[i], seconds[i], key=own[i], **options
                    )
            continue
        rows = sum(shape[0] for shape in shapes)
        norms = torch.empty(2, rows) if norms_too else None
        if operation in ("adam", "norms"):
            options = {"scale": 0.5, **numbers, **draws}
            if together:
                batch = Batch(gradients, own)
                written += kernels.adam_(batch, firsts, seconds, norms=norms, **options)
            else:
                start = 0
                for i, gradient in enumerate(gradients):
                    part = torch.empty(2, len(gradient)) if norms_too else None
                    out = kernels.adam_(
                        gradient, firsts[i], seconds[i], key=own[i], norms=part, **options
                    )
                    written.append(out)
                    if part is not None and norms is not None:
                        norms[:, start : start + len(gradient)] = part
                        start += len(gradient)
            written += [] if norms is None else [norms]
            continue
        options = {"impl": impl, **draws}
        if operation == "load":
            # What the first step stores, of both signs.
            for kept, values in ((firsts, gradients), (seconds, [g.abs() for g in gradients])):
                kernels.store_(Batch(values, own), kept, **options)
                outs = [torch.empty_like(own) for own in values]
                if together:
                    load_(Batch(outs, own), kept, impl=impl)
                for i, out in enumerate([] if together else outs):
                    load_(Batch([out], own[i : i + 1]), kept[i : i + 1], impl=impl)
                written += outs
            continue
        if operation == "store":
            for kept, values in ((firsts, gradients), (seconds, [g.abs() for g in gradients])):
                if together:
                    kernels.store_(Batch(values, own), kept, **options)
                for i, value in enumerate([] if together else values):
                    kernels.store_(value, kept[i], key=own[i], **options)
            continue
        average = functools.partial(kernels.average_, **AVERAGES.get(operation, {}), **options)
        if operation == "lerp":
            # On either side of 1/2, where its formula changes.
            average = functools.partial(kernels.lerp_, weight=0.1 + 0.6 * step, **options)
        if together:
            written += average(Batch(gradients, own), firsts)
        else:
            written += [
                average(g, m, key=k) for g, m, k in zip(gradients, firsts, own, strict=True)
            ]
    return [*theta, *stored(firsts), *stored(seconds), *written]


AVERAGES: dict[str, dict[str, Any]] = {
    "momentum": {"look": (0.9, 1.0), "keep": (0.9, 1.0)},
    "lion": {"look": (0.9, 1.0 - 0.9), "keep": (0.99, 1.0 - 0.99), "signs": True},
}
OPERATIONS = ["adamw", "adam", "momentum", "lion", "lerp", "store", "load"]


def all_agree(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(agree(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_batch_is_its_tensors_one_by_one(operation: str, form: str, impl: str) -> None:
    for dtype in DTYPES:
        options: dict[str, Any] = {"offset": 5 if dtype == torch.float16 else 0, "bad": True}
        expected = run(operation, dtype, form, "reference", together=False, **options)
        assert all_agree(run(operation, dtype, form, impl, together=True, **options), expected)
        assert all_agree(run(operation, dtype, form, impl, together=False, **options), expected)
    nearest = {"draw": None}
    expected = run(operation, torch.bfloat16, form, "reference", together=False, **nearest)
    assert all_agree(run(operation, torch.bfloat16, form, impl, together=True, **nearest), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["float32", "int8"])
def test_norms_of_a_batch_are_those_of_its_tensors(form: str, impl: str) -> None:
    got = run("norms", torch.float32, form, impl, together=True)
    expected = run("norms", torch.float32, form, impl, together=False)
    assert all_agree(got, expected)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("operation", AVERAGES)
def test_averages_are_the_formulas(operation: str, form: str) -> None:
    """To nearest, in torch's own operations and `encode`."""
    gradient = torch.randn(5000).bfloat16()
    [moment], [expected] = (pairs([5000], form)[0] for _ in range(2))
    for _ in range(3):
        m = decode(expected)
        options = AVERAGES[operation]
        look, keep = options["look"], options["keep"]
        direction = m * look[0] + gradient * look[1]
        encode(m * keep[0] + gradient * keep[1], expected)
        got = kernels.average_(gradient, moment, key=NoiseKey(1, 2), **options)
        assert agree(got, direction.sign() if options.get("signs") else direction)
        assert all_agree(stored([moment]), stored([expected]))


def expected_bits(key: NoiseKey, count: int, draw: int | None) -> Tensor | None:
    if draw is None:
        return None
    place = torch.arange(key.offset, key.offset + count)
    words = {"seed": key.seed, "stream": key.stream, "draw": draw}
    return philox.halfwords(place, purpose=philox.PURPOSE_MOMENTS, **words)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMATS)
def test_lerp_is_torchs(form: str, impl: str) -> None:
    """To the bit, on either side of 1/2; with the random bits of moments."""
    for weight, draw, dtype in ((0.1, 7, torch.float32), (0.7, None, torch.bfloat16)):
        [gradient], [key] = tensors(dtype, [(5000,)]), keys(1)
        [got], [expected] = (pairs([5000], form)[0] for _ in range(2))
        for _ in range(2):
            average = decode(expected).lerp(gradient.float(), weight)
            encode(average, expected, expected_bits(key, 5000, draw))
            options: dict[str, Any] = {"key": key, "moment_draw": draw, "impl": impl}
            assert agree(kernels.lerp_(gradient, got, weight, **options), average)
            assert all_agree(stored([got]), stored([expected]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMATS)
def test_stored_values_are_encoded_ones(form: str, impl: str) -> None:
    """Whatever the moment was before, signed or unsigned."""
    [key] = keys(1)
    for which, dtype in ((0, torch.float32), (1, torch.bfloat16)):
        [value] = tensors(dtype, [(5000,)])
        value = value if which == 0 else value.abs()
        value[3] = torch.nan
        [got], [expected] = (pairs([5000], form)[which] for _ in range(2))
        encode(value.float(), expected, expected_bits(key, 5000, 7))
        kernels.store_(value, got, key=key, moment_draw=7, impl=impl)
        assert all_agree(stored([got]), stored([expected]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_read_is_what_is_decoded(form: str, impl: str) -> None:
    for which in (0, 1):
        [value], [key] = tensors(torch.float32, [(5000,)]), keys(1)
        [moment] = pairs([5000], form)[which]
        encode(value if which == 0 else value.abs(), moment)
        before = [tensor.clone() for tensor in stored([moment])]
        out = torch.empty(50, 100)
        load_(Batch([out], [key]), [moment], impl=impl)
        assert agree(out.view(-1), decode(moment))
        assert all_agree(stored([moment]), before)
    with pytest.raises(ValueError, match="values must be contiguous"):
        load_(Batch([out.t()], [key]), [moment])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_direction_may_take_the_gradients_place(impl: str) -> None:
    options = AVERAGES["lion"]
    gradients = tensors(torch.bfloat16, [(700,), (50,)])
    expected = [
        kernels.average_(g, m, key=key, **options).bfloat16()
        for g, m, key in zip(gradients, pairs((700, 50), "int8")[0], keys(2), strict=True)
    ]
    batch = Batch(gradients, keys(2))
    got = kernels.average_(batch, pairs((700, 50), "int8")[0], out=gradients, impl=impl, **options)
    assert got is gradients
    assert all_agree(list(got), expected)


@pytest.mark.parametrize("form", CODED)
def test_threads_do_not_change_a_bit(form: str) -> None:
    expected = run("lion", torch.bfloat16, form, "reference", together=True)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        got = run("lion", torch.bfloat16, form, "numba", together=True)
    finally:
        torch.set_num_threads(before)
    assert all_agree(got, expected)


def test_refuses_operands_that_do_not_match_the_batch() -> None:
    x = [torch.zeros(8), torch.zeros(4)]
    batch, (firsts, seconds) = Batch(x, keys(2)), pairs((8, 4), "float32")
    gradients = [torch.ones(8), torch.ones(4)]
    options: dict[str, Any] = {"betas": (0.9, 0.9), "scale": 1.0, "eps": 1e-8, "decay": 1.0}
    mixed = [firsts[0], moments(4, "bfloat16")[0]]
    for operands, message in (
        ((gradients[:1], firsts, seconds), "gradient must be one for each of the batch's 2"),
        ((gradients, firsts[:1], seconds), "first must be one for each"),
        ((gradients[::-1], firsts, seconds), "gradient must have theta's shape"),
        ((gradients, seconds, seconds), "first must be a signed moment of 8 elements"),
        ((gradients, mixed, seconds), "must have one format"),
        ((gradients, [firsts[0], firsts[0]], seconds), "first must be a signed moment of 4"),
        (([gradients[0], gradients[1].double()], firsts, seconds), "one dtype in a batch"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.adamw_(batch, *operands, **options)
    same = [firsts[0], Moment(firsts[0].codes[:4], None, 4, True)]
    with pytest.raises(ValueError, match="must not share memory"):
        kernels.adamw_(batch, gradients, same, seconds, **options)
    assert not any(tensor.any() for tensor in x)
