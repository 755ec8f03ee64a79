"""The cases that a GPU is asked, asked of the CPU without numba, beside the CPU with it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import triton
from torch import nn

import zoopt
from tests import device_cases
from tests.device_cases import CLASSES, REFERENCE
from tests.first_order_table import Row
from zoopt.doctor import diagnosis
from zoopt.kernels import NoiseKey, dispatch, perturb

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


@pytest.mark.parametrize(("cls", "options"), device_cases.ON_TWO)
def test_two_devices_in_one_optimizer(cls: type, options: dict[str, object]) -> None:
    device_cases.two_devices_in_one_optimizer(cls, options, REFERENCE)


def test_empty_and_single_tensors() -> None:
    device_cases.empty_and_single_tensors(REFERENCE)


def test_long_tensor() -> None:
    device_cases.long_tensor(REFERENCE, (1 << 18) + 8)


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


#: What a GPU machine may lack, and what is said about it.
LACKS = {
    "Triton": r"Triton 3\.2 or newer is needed, got none.*pip install 'zoopt-torch\[gpu\]'",
    "a new Triton": r"Triton 3\.2 or newer is needed, got 3\.1\.0.*zoopt-torch\[gpu\]",
    "a Triton that works": r"got one that cannot be imported \(AttributeError\).*zoopt-torch",
    "capability": r"compute capability 7\.0 or higher is needed, and cuda:\S+ has 6\.1.*train on",
}


@contextlib.contextmanager
def gpu_without(what: str) -> Iterator[None]:
    """Have CPU tensors taken for those of a GPU whose machine lacks something."""
    caches = (dispatch._triton_version, dispatch._device_obstacle)
    caches = (*caches, dispatch._runs_triton, dispatch._warn_once)
    for cache in caches:
        cache.cache_clear()
    installed = what != "Triton"
    capability = (6, 1) if what == "capability" else (9, 0)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (dispatch, "on_gpu", lambda tensor: True),
            (dispatch, "_installed", lambda package: package != "triton" or installed),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda device: capability),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        if what == "a new Triton":
            stack.enter_context(mock.patch.object(triton, "__version__", "3.1.0"))
        if what == "a Triton that works":
            stack.enter_context(mock.patch.dict("sys.modules", {"triton": object()}))
        try:
            yield
        finally:
            for cache in caches:
                cache.cache_clear()


def stepped(place: contextlib.AbstractContextManager[None]) -> list[torch.Tensor]:
    """Weights after a step of one optimizer of each kind."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    with place:
        for perturbation in ("inplace", "virtual"):
            mezo = zoopt.MeZO(net.parameters(), 1e-2, perturbation=perturbation, seed=1)
            mezo.step(lambda: net(x).square().mean())
        net(x).square().mean().backward()
        for optimizer in (
            zoopt.AdamW(net.parameters(), 1e-2, seed=1, state_dtype="int8"),
            zoopt.GaLoreAdamW(net.parameters(), 1e-2, seed=1, rank=2),
        ):
            optimizer.step()
    return [param.detach() for param in net.parameters()]


@pytest.mark.parametrize("what", LACKS)
def test_a_gpu_without_kernels_warns_once_and_takes_the_reference(what: str) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        got = stepped(gpu_without(what))
    assert len(found) == 1
    assert found[0].filename == __file__
    expected = stepped(device_cases.without_numba())
    assert all(map(torch.equal, got, expected))
    with pytest.warns(UserWarning, match=LACKS[what]), gpu_without(what):
        dispatch._best(torch.zeros(1))
    theta = torch.ones(3)
    with gpu_without(what), pytest.raises(ValueError, match=r"impl='triton' .*(remedy|use)"):
        perturb(theta, 1.0, draw=1, key=NoiseKey(1, 2), out=theta, impl="triton")
    assert theta.eq(1).all()
    with gpu_without(what):
        assert "is needed" in diagnosis._reason("cuda:0", "reference")


def test_a_gpu_with_kernels_takes_them() -> None:
    with gpu_without("nothing"):
        assert dispatch._best(torch.zeros(1)) == "triton"
        assert dispatch.available_impls()[-1] == "triton"
        assert dispatch._best(torch.zeros(1, dtype=torch.float64)) == "reference"
