"""What must hold of optimizers wherever their tensors are.

test_gpu asks it of a GPU, beside the CPU. test_devices asks the same of the CPU without numba,
beside the CPU with it, so that these bodies have run before they meet a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import zoopt
from tests.compare import equal, same
from tests.first_order_table import ROWS, Row, batch, net
from zoopt import kernels, noise
from zoopt.kernels import dispatch
from zoopt.kernels.noise.key import NoiseKey

STEPS = 5


@contextlib.contextmanager
def without_numba() -> Iterator[None]:
    with mock.patch.object(dispatch, "_installed", return_value=False):
        yield


@dataclasses.dataclass(frozen=True)
class Place:
    """Where optimizers run: a device, and what must be so while they do."""

    device: str
    during: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def __str__(self) -> str:
        return self.device


CPU, REFERENCE, CUDA = Place("cpu"), Place("cpu", without_numba), Place("cuda")
#: One variant of each class.
CLASSES = list({row.cls: row for row in ROWS if row.oracle is not None}.values())
#: Those whose updates are element by element: no product, no decomposition.
ELEMENTWISE = [row for row in ROWS if row.cls in (zoopt.AdamW, zoopt.SM3)]


def gradients(step: int, model: nn.Module) -> list[Tensor]:
    """Of each parameter, on the CPU: where it is a matrix, with singular values 1/k or so, so that
    no direction is made of rounding noise."""
    found = []
    for i, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        gradient = torch.randn(param.shape, generator=generator)
        if param.dim() > 1:
            left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
            gradient = (left / torch.arange(1, left.shape[1] + 1)) @ right
        found.append(gradient.view(param.shape).to(param.dtype))
    return found


def run(place: Place, steps: range, model: nn.Module, optimizer: Any) -> None:
    """Steps on gradients that are the same everywhere."""
    with place.during():
        for step in steps:
            for param, grad in zip(model.parameters(), gradients(step, model), strict=True):
                param.grad = grad.to(place.device)
            optimizer.step()


def trained(row: Row, place: Place, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = net(dtype).to(place.device)
    run(place, range(STEPS), model, row.build(model))
    return model


def follows_its_cpu_run(row: Row, place: Place) -> None:
    """Bit for bit where updates are element by element. Elsewhere products are summed in another
    order. In float32 that is 2^-24 of a sum, and Adam divides small entries by themselves: the
    CPU's two implementations part by 7e-7 of the way at most, a GPU's sums are of other widths. It
    tips some roundings of bfloat16 weights, each a 256th of a weight: 6e-2 of the way."""
    if row in ELEMENTWISE:
        assert same(trained(row, CPU), trained(row, place).cpu())
        return
    for dtype, share in ((torch.bfloat16, 0.1), (torch.float32, 1e-4)):
        start, ours, theirs = net(dtype), trained(row, place, dtype).cpu(), trained(row, CPU, dtype)
        parts = zip(start.parameters(), ours.parameters(), theirs.parameters(), strict=True)
        for before, a, b in parts:
            way = (b.double() - before.double()).norm()
            assert way > 0
            assert (a.double() - b.double()).norm() <= share * way


def fused_backward_is_the_unfused_step(row: Row, place: Place) -> None:
    results = []
    for fused in (False, True):
        model = net(torch.bfloat16).to(place.device)
        optimizer = row.build(model)
        with place.during(), contextlib.ExitStack() as stack:
            if fused:
                stack.enter_context(zoopt.fuse_backward(model, optimizer))
            for _ in range(STEPS):
                backward_on(model)
                optimizer.step()
                optimizer.zero_grad()
        results.append((model, optimizer.state_dict()))
    assert same(results[0][0], results[1][0])
    assert equal(results[0][1], results[1][1])


def backward_on(model: nn.Module) -> None:
    param = next(model.parameters())
    x, y = (tensor.to(param.device) for tensor in batch(param.dtype))
    (model(x) - y).double().pow(2).mean().backward()


def resumes_to_the_bit(row: Row, place: Place) -> None:
    """Through the bytes of a file, loaded onto the CPU first, as people do."""
    whole = trained(row, place)
    model = net(torch.bfloat16).to(place.device)
    optimizer = row.build(model)
    run(place, range(2), model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    model = net(torch.bfloat16).to(place.device)
    model.load_state_dict(saved["model"])
    optimizer = row.build(model)
    optimizer.load_state_dict(saved["optimizer"])
    run(place, range(2, STEPS), model, optimizer)
    assert same(whole, model)


def moved_after_the_optimizer_was_made(row: Row, place: Place) -> None:
    """`model.to(device)` keeps the parameters, whose data are elsewhere from then on."""
    model = net(torch.bfloat16)
    optimizer = row.build(model)
    model.to(place.device)
    run(place, range(STEPS), model, optimizer)
    assert same(model, trained(row, place))
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                assert value.device.type == place.device, name


#: Classes whose tensors are on two devices, with options: bits are the CPU's where updates are
#: element by element; elsewhere sums of products part.
ON_TWO: list[tuple[Any, dict[str, Any]]] = [
    (zoopt.AdamW, {"state_dtype": "int8"}),
    (zoopt.SM3, {}),
    (zoopt.GaLoreAdamW, {"rank": 4}),
    (zoopt.Apollo, {"rank": 4}),
    (zoopt.Fira, {"rank": 4}),
    (zoopt.QGaLoreAdamW, {"rank": 4}),
    (zoopt.LDAdamW, {"rank": 4}),
    (zoopt.Frugal, {"rule": "lion"}),
    (zoopt.GaLoreAdafactor, {"rank": 4, "beta1": 0.9}),
    (zoopt.SparseDeltaAdamW, {"density": 0.3}),
    (zoopt.MeZO, {"perturbation": "inplace"}),
    (zoopt.MeZO, {"perturbation": "virtual"}),
    (zoopt.LOZO, {"perturbation": "virtual"}),
]


def two_devices_in_one_optimizer(cls: Any, options: dict[str, Any], place: Place) -> None:
    """Half of the tensors here and half on the CPU step as all of them on the CPU do.

    Losses part by 1e-13 of themselves at most, MeZO's estimates by that over 2 zo_eps: what is
    written to a bfloat16 weight is then the same but for one rounding in 10^7. Products part as in
    `follows_its_cpu_run`.
    """
    shapes = (
        (40, 30),
        (40, 30),
        (24, 36),
        (24, 36),
        (40, 30),
        (40, 30),
        (300,),
        (7,),
        (300,),
        (1,),
    )
    exact = cls in (zoopt.AdamW, zoopt.SM3)
    results = []
    for devices in (("cpu", "cpu"), (place.device, "cpu")):
        model = nn.ParameterDict()
        for i, shape in enumerate(shapes):
            generator = torch.Generator().manual_seed(i)
            value = torch.randn(shape, generator=generator).bfloat16()
            model[f"p{i}"] = nn.Parameter(value.to(devices[i % 2]))
        start = [param.detach().cpu().clone() for param in model.values()]
        optimizer = cls(model.named_parameters(), lr=1e-2, seed=3, **options)
        with place.during():
            for step in range(3):
                for param, grad in zip(model.values(), gradients(step, model), strict=True):
                    param.grad = grad.to(param.device)
                if cls in (zoopt.MeZO, zoopt.LOZO):
                    optimizer.step(
                        lambda m=model: sum(p.double().square().sum().cpu() for p in m.values())
                    )
                else:
                    optimizer.step()
        assert [param.device.type for param in model.values()] == [
            torch.device(devices[i % 2]).type for i in range(len(shapes))
        ]
        results.append([param.detach().cpu() for param in model.values()])
    for before, a, b in zip(start, *results, strict=True):
        way = (a.double() - before.double()).norm()
        assert way > 0
        if exact:
            assert torch.equal(a, b)
        elif cls is zoopt.MeZO:
            assert (a != b).double().mean() <= 1e-3
        else:
            assert (a.double() - b.double()).norm() <= 0.1 * way


def empty_and_single_tensors(place: Place) -> None:
    """Of every class: element by element where there are no products of several numbers."""
    shapes = ((0,), (0, 4), (4, 0), (1,), (1, 1), ())
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for device in ("cpu", place.device):
            params = [
                (f"p{i}", nn.Parameter(torch.ones(shape, dtype=dtype, device=device)))
                for i, shape in enumerate(shapes)
            ]
            with place.during():
                for row in CLASSES:
                    optimizer = row.cls(params, **{**row.options, "lr": 0.25})  # type: ignore[call-arg]
                    for _ in range(2):
                        for _, param in params:
                            param.grad = torch.full_like(param, 0.5)
                        optimizer.step()
                zoopt.MeZO(params, lr=0.1, seed=3).step(
                    lambda ps=params: sum(p.double().sum().cpu() for _, p in ps)
                )
            results.append([param.detach().cpu() for _, param in params])
        for a, b in zip(*results, strict=True):
            # Roots and quotients of one number, some of which torch rounds otherwise on a GPU.
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
            assert a.numel() == 0 or (a != 1).all()


def long_tensor(place: Place, numel: int) -> None:
    """A pass over more elements than an int32 counts reaches the last ones, with their noise and
    their gradients; the last moments too."""
    theta = torch.zeros(numel, dtype=torch.bfloat16, device=place.device)
    key = NoiseKey(seed=5, stream=9)
    with place.during():
        kernels.perturb(theta, 1.0, draw=2, key=key, out=theta)
    tail = 1000
    expected = noise.normal(tail, seed=5, stream=9, draw=2, offset=numel - tail)
    assert torch.equal(theta[-tail:].cpu(), expected.bfloat16())
    assert torch.equal(theta[:tail].cpu(), noise.normal(tail, seed=5, stream=9, draw=2).bfloat16())
    param = nn.Parameter(theta)
    optimizer = zoopt.AdamW([param], lr=0.5, weight_decay=0.0, seed=3, state_dtype="int8")
    # Rounded up to even, the weight is its sign's: the step of the first gradient is 0.5.
    optimizer.param_groups[0].update(rounding="nearest", state_rounding="nearest")
    param.grad = torch.ones_like(param)
    with place.during():
        optimizer.step()
    assert torch.equal(theta[-tail:].cpu(), (expected.bfloat16().float() - 0.5).bfloat16())
    state = optimizer.state[param]
    assert (state["exp_avg"][-tail:] == 127).all()
    assert float(state["exp_avg_scale"][-1]) == float(state["exp_avg_scale"][0]) > 0


def another_stream(place: Place, stream: contextlib.AbstractContextManager[Any]) -> None:
    """A step sees the work that is queued on the current stream, and is seen by what follows."""
    results = []
    for entered in (contextlib.nullcontext(), stream):
        model = net(torch.bfloat16).to(place.device)
        first, second = (
            zoopt.AdamW(model.parameters(), seed=1),
            zoopt.MeZO(model.parameters(), seed=1),
        )
        with entered, place.during():
            for param, grad in zip(model.parameters(), gradients(0, model), strict=True):
                param.grad = grad.to(place.device) * 2
            first.step()
            first.zero_grad()
            second.step(lambda m=model: sum(p.double().square().sum() for p in m.parameters()))
            sums = [param.detach().double().sum() for param in model.parameters()]
        results.append((model, [float(total) for total in sums]))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
