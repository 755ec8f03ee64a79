"""Self-tests on this machine: the noise against known answers, each kernel against the reference.

They take seconds, or up to a minute if kernels must be compiled first.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from zoopt import noise
from zoopt.doctor.diagnosis import devices
from zoopt.dtypes import Rounding
from zoopt.first_order.projected.codecs import moment, moment_specs
from zoopt.kernels import apply_, available_impls, perturb
from zoopt.kernels.adam.moments import Format
from zoopt.kernels.adam.op import adam_
from zoopt.kernels.noise.key import Distribution, NoiseKey

#: Random123's published known answers for Philox4x32-10: counter, key, words.
KNOWN_ANSWERS = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """Numbers of noise version 1: the bits of the first normals, and the first signs."""

    seed: int
    stream: int
    draw: int
    offset: int
    normals: tuple[int, ...]
    signs: str


GOLDEN = (
    Golden(
        *(0x0123456789ABCDEF, 539432606, 7, 0),
        (0x3E30D46B, 0x3F6E2671, 0xBF1750E0, 0x3F12AB0E, 0x3ED1F54E, 0x3F1D9BBF),
        "++--+++--+++-+++",
    ),
    Golden(
        *(42, 3, 1, 2**32 + 5),
        (0xBF222700, 0xBF599298, 0xBEF20FC7, 0xBF930EC2, 0xBF134793, 0xBF61331D),
        "++--+-+--++--+-+",
    ),
)
#: Elements of the parity tests: several tiles and blocks, and an odd remainder.
NUMEL = 20_011
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one self-test; `detail` says what was compared, or what differs."""

    name: str
    passed: bool
    detail: str
    seconds: float


def self_tests() -> Iterator[tuple[str, Callable[[], str]]]:
    """Names, and functions that return what they compared or raise AssertionError."""
    yield "Philox4x32-10, published answers", _known_answers
    for device in devices():
        for impl in _impls(device):
            yield f"noise, {impl} on {device}", functools.partial(_golden, device, impl)
        for impl in _impls(device):
            if impl == "reference" and device == "cpu":
                continue
            for name, parity in {"perturb": _perturb, "apply_": _apply, "adam_": _adam}.items():
                test = functools.partial(_same_as_reference, parity, device, impl)
                yield f"{name}, {impl} on {device}", test


def run(name: str, test: Callable[[], str]) -> Result:
    """Do one self-test. A kernel that cannot run counts as a failed test."""
    start = time.perf_counter()
    try:
        passed, detail = True, test()
    except Exception as error:
        passed, detail = False, (str(error).strip() or type(error).__name__).splitlines()[0]
    return Result(name, passed, detail, time.perf_counter() - start)


def _impls(device: str) -> list[str]:
    """The implementations that run on the device. Triton's interpreter does not test a GPU."""
    fast = "triton" if device.startswith("cuda") else "numba"
    return [impl for impl in available_impls() if impl in ("reference", fast)]


def _known_answers() -> str:
    for counter, key, words in KNOWN_ANSWERS:
        got = noise.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist()
        if got != list(words):
            raise AssertionError(f"counter {counter}: expected {list(words)}, got {got}")
    return f"{len(KNOWN_ANSWERS)} vectors of Random123"


def _golden(device: str, impl: str) -> str:
    for case in GOLDEN:
        key: dict[str, Any] = {
            **{name: getattr(case, name) for name in ("seed", "stream", "draw", "offset")},
            "device": device,
            "impl": impl,
        }
        normals = noise.normal(len(case.normals), **key).cpu().view(torch.int32)
        bits = tuple(value & 0xFFFFFFFF for value in normals.tolist())
        signs = "".join("+" if s > 0 else "-" for s in noise.rademacher(16, **key).tolist())
        if bits != case.normals or signs != case.signs:
            raise AssertionError(f"offset {case.offset}: not the numbers of noise version 1")
    return f"{len(GOLDEN)} runs of noise version 1"


def _same_as_reference(
    operation: Callable[[str, str], list[Tensor]], device: str, impl: str
) -> str:
    """Check that every result has the same bits as the reference on the CPU."""
    results = zip(operation(device, impl), operation("cpu", "reference"), strict=True)
    count = 0
    for count, (got, expected) in enumerate(results, 1):
        off = int((got.cpu().view(torch.uint8) != expected.view(torch.uint8)).sum())
        if off:
            raise AssertionError(f"case {count}, {expected.dtype}: {off} bytes differ")
    return f"{count} results of {NUMEL:,} elements, equal bits"


def _theta(dtype: torch.dtype, device: str) -> Tensor:
    """Weights of several magnitudes, (NUMEL,)."""
    z = noise.normal(NUMEL, seed=1, stream=1, draw=0, impl="reference")
    return (z * z * z).to(dtype).to(device)


def _keys() -> Iterator[NoiseKey]:
    for distribution in get_args(Distribution):
        for density in (1.0, 0.25):
            yield NoiseKey(2**63 + 5, 9, 2**32 - 7, distribution, density)


def _perturb(device: str, impl: str) -> list[Tensor]:
    return [
        perturb(_theta(dtype, device), 1e-3, draw=3, impl=impl, key=key)
        for dtype in DTYPES
        for key in _keys()
    ]


def _apply(device: str, impl: str) -> list[Tensor]:
    options: dict[str, Any] = {"draws": [3, 2**32 - 1], "decay": 0.99, "impl": impl}
    return [
        apply_(_theta(dtype, device), [0.1, -0.2], rounding=rounding, key=key, **options)
        for dtype in DTYPES
        for key in _keys()
        for rounding in get_args(Rounding)
    ]


def _adam(device: str, impl: str) -> list[Tensor]:
    """Directions and moments after two steps, in every format."""
    results = []
    for fmt in get_args(Format):
        specs = {
            **moment_specs("exp_avg", (NUMEL,), fmt, signed=True),
            **moment_specs("exp_avg_sq", (NUMEL,), fmt, signed=False),
        }
        state = {
            name: torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in specs.items()
        }
        options: dict[str, Any] = {
            "betas": (0.9, 0.999),
            "scale": 0.5,
            "eps": 1e-8,
            "key": NoiseKey(7, 9),
            "impl": impl,
        }
        for step in (1, 2):
            first = moment(state, "exp_avg", NUMEL, signed=True)
            second = moment(state, "exp_avg_sq", NUMEL, signed=False)
            gradient = _theta(torch.float32, device) * step
            results.append(adam_(gradient, first, second, moment_draw=step, **options))
        results += state.values()
    return results
