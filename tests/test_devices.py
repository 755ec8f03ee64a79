"""The cases that a GPU is asked, asked of the CPU without numba, beside the CPU with it."""

from __future__ import annotations

import contextlib

import pytest

from tests import device_cases
from tests.device_cases import CLASSES, REFERENCE
from tests.first_order_table import Row

#: One that is element by element, one with a basis, and one with codes.
SOME = [row for row in CLASSES if row.cls.__name__ in ("SM3", "GaLoreAdamW", "QGaLoreAdamW")]


@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_first_order_follows_its_cpu_run(row: Row) -> None:
    device_cases.follows_its_cpu_run(row, REFERENCE)


@pytest.mark.parametrize("row", SOME, ids=str)
def test_fused_backward(row: Row) -> None:
    device_cases.fused_backward_is_the_unfused_step(row, REFERENCE)


@pytest.mark.parametrize("row", SOME, ids=str)
def test_resumes_to_the_bit(row: Row) -> None:
    device_cases.resumes_to_the_bit(row, REFERENCE)


@pytest.mark.parametrize("row", SOME, ids=str)
def test_moved_after_the_optimizer_was_made(row: Row) -> None:
    device_cases.moved_after_the_optimizer_was_made(row, REFERENCE)


def test_two_devices_in_one_optimizer() -> None:
    device_cases.two_devices_in_one_optimizer(REFERENCE)


def test_empty_and_single_tensors() -> None:
    device_cases.empty_and_single_tensors(REFERENCE)


def test_long_tensor() -> None:
    device_cases.long_tensor(REFERENCE, (1 << 20) + 8)


def test_another_stream() -> None:
    device_cases.another_stream(REFERENCE, contextlib.nullcontext())


def test_cases_fail_on_a_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are off by one rounding at one place are found."""
    right = device_cases.trained

    def wrong(row: Row, place: device_cases.Place, *dtype: object) -> object:
        model = right(row, place, *dtype)  # type: ignore[arg-type]
        if place is REFERENCE:
            weight = next(model.parameters()).data
            weight.view(-1)[3] *= 1 + 2**-7
        return model

    monkeypatch.setattr(device_cases, "trained", wrong)
    for case in (device_cases.follows_its_cpu_run, device_cases.resumes_to_the_bit):
        with pytest.raises(AssertionError):
            case(SOME[-1] if case is device_cases.resumes_to_the_bit else _elementwise(), REFERENCE)


def _elementwise() -> Row:
    return next(row for row in device_cases.ELEMENTWISE if row in CLASSES)
