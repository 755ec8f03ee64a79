"""On a GPU (collected only where there is one): the CPU's bits, and what its runs come to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import zoopt
from tests import device_cases, first_order_table, test_kernels_adam, test_kernels_product
from tests.compare import same
from tests.device_cases import CUDA
from tests.optimizer_table import CASES, PERTURBATIONS, Row, mlp, regression
from tests.test_kernels import DISTRIBUTIONS, DTYPES, KEY, WORDS, same_bits, weights
from tests.test_sm3 import SHAPES, kernel_steps
from zoopt import kernels, noise
from zoopt.kernels.adam.moments import Moment
from zoopt.kernels.noise.key import NoiseKey


@pytest.mark.parametrize("offset", [0, 5, 2**32 - 3, 2**40 + 7])
@pytest.mark.parametrize("generate", [noise.normal, noise.rademacher])
def test_noise_has_the_bits_of_the_cpu(generate, offset: int) -> None:
    key = {"seed": 2**63 + 5, "stream": 2**31 + 1, "draw": 3, "offset": offset}
    assert same_bits(generate(1 << 20, device="cuda", **key).cpu(), generate(1 << 20, **key))


@pytest.mark.parametrize(("numel", "offset"), [(1, 3), (100_003, 0), (70_000, 2**32 - 5)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_have_the_bits_of_the_cpu(
    dtype: torch.dtype, distribution: str, numel: int, offset: int
) -> None:
    theta = weights((numel,), dtype)
    key = NoiseKey(**WORDS, offset=offset, distribution=distribution)
    masked = {"key": NoiseKey(**WORDS, offset=offset, distribution=distribution, density=0.25)}
    results: dict[str, list[torch.Tensor]] = {"cuda": [], "cpu": []}
    for device, out in results.items():
        out.append(kernels.perturb(theta.to(device), 1e-3, draw=9, key=key))
        for rounding in ("nearest", "stochastic"):
            whole = {"key": key, "draws": [1, 2**32 - 1], "decay": 0.99, "rounding": rounding}
            out.append(kernels.apply_(theta.to(device, copy=True), [0.1, -0.2], **whole))
            target = theta.to(device, copy=True)
            buffer = torch.linspace(-1, 1, numel).to(device)
            kernels.momentum_(
                target, buffer, [0.1, 0.0], [1.0, 2.0], momentum=0.9, step_size=-0.01, **whole
            )
            out += [target, buffer]
            update = torch.linspace(-1, 1, numel).to(device)
            target = theta.to(device, copy=True)
            out.append(kernels.add_(target, update, [0.1, -0.2], **{**whole, **masked}))
            out.append(
                kernels.adam_window_(
                    theta.to(device, copy=True),
                    *([0.1, 0.0], [1.0, 2.0], [0.3, 0.7], [0.1, 0.9], [True, True]),
                    eps=1e-8,
                    step_size=-0.01,
                    **whole,
                )
            )
    for a, b in zip(*results.values(), strict=True):
        assert same_bits(a.cpu(), b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype: torch.dtype) -> None:
    weight, rows = weights((50, 37), dtype), torch.tensor([[3, 49], [0, 3]])
    got = kernels.perturb_rows(weight.cuda(), rows.cuda(), 0.1, draw=4, key=KEY)
    assert same_bits(got.cpu(), kernels.perturb_rows(weight, rows, 0.1, draw=4, key=KEY))


@pytest.mark.parametrize("shape", [(50, 37), (3, 5000), (9000, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_scales_of_their_own(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    theta, scales = weights(shape, dtype), torch.linspace(-1.0, 2.0, shape[0])
    options = {"draw": 4, "key": KEY}
    got = kernels.perturb(theta.cuda(), 0.1, row_scale=scales.cuda(), **options)
    assert same_bits(got.cpu(), kernels.perturb(theta, 0.1, row_scale=scales, **options))


@pytest.mark.parametrize(("row", "perturbation"), CASES, ids=str)
def test_every_method_follows_its_cpu_run(row: Row, perturbation: str) -> None:
    """Five steps in float64: to 1e-8, what two orders of summation leave of the differences."""
    models = {device: mlp(torch.float64).to(device) for device in ("cpu", "cuda")}
    for device, model in models.items():
        x, y = (t.to(device) for t in regression(torch.float64))
        optimizer = row.build(model, perturbation=perturbation)
        for _ in range(5):
            optimizer.step(lambda model=model, x=x, y=y: (model(x) - y).pow(2).mean())
    for a, b in zip(models["cpu"].parameters(), models["cuda"].parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mezo_trains(dtype: torch.dtype, perturbation: str) -> None:
    model = mlp(dtype).cuda()
    x = torch.randn(64, 6, dtype=dtype, device="cuda")
    optimizer = zoopt.MeZO(model.named_parameters(), 1e-3, perturbation=perturbation, seed=1)
    first = optimizer.step(lambda: model(x).square().double().mean())
    for _ in range(100):
        last = optimizer.step(lambda: model(x).square().double().mean())
    assert last < first


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sm3_has_the_bits_of_the_cpu(dtype: torch.dtype, sparse: bool) -> None:
    """Also of matrices with many programs, whose maxima meet in any order."""
    for shape in [*filter(None, SHAPES), (1000, 1023), (700, 2048)]:
        ours = kernel_steps(None, shape, dtype, sparse=sparse, device="cuda")
        theirs = kernel_steps(None, shape, dtype, sparse=sparse)
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True)), shape


@pytest.mark.parametrize(("numel", "offset"), [(2, 3), (100_097, 0), (70_000, 2**32 - 5)])
@pytest.mark.parametrize("draw", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", test_kernels_adam.FORMATS)
def test_adam_has_the_bits_of_the_cpu(
    form: str, dtype: torch.dtype, draw: int | None, numel: int, offset: int
) -> None:
    case = (numel, form, dtype, dtype == torch.float16, offset, draw, numel == 70_000)
    got = test_kernels_adam.trajectory("triton", *case, device="cuda")
    expected = test_kernels_adam.trajectory("reference", *case)
    assert all(test_kernels_adam.agree(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("terms", test_kernels_product.CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r", "offset"), [(70, 40, 5, 8), (1000, 1001, 300, 3)])
def test_product_is_the_formula(
    dtype: torch.dtype, terms: str, m: int, n: int, r: int, offset: int
) -> None:
    error, bound = test_kernels_product.difference(
        "triton", dtype, terms, m, n, r, offset, device="cuda"
    )
    assert (error <= bound).all()


@pytest.mark.parametrize("terms", ["product", "by row"])
@pytest.mark.parametrize(("m", "n", "r"), [(70, 40, 5), (1000, 1001, 300), (512, 1376, 128)])
def test_bfloat16_factors_on_matrix_units(terms: str, m: int, n: int, r: int) -> None:
    error, bound = test_kernels_product.difference(
        "triton", torch.bfloat16, terms, m, n, r, narrow="both", device="cuda"
    )
    assert (error <= bound).all()


@pytest.mark.parametrize(("rows", "r"), [(3, 5), (700, 128), (5, 3000)])
def test_norms(rows: int, r: int) -> None:
    gradient, norms = torch.randn(rows, r), torch.empty(2, rows, device="cuda")
    moments = [
        Moment(torch.zeros(rows * r, device="cuda"), None, rows * r, sign) for sign in (True, False)
    ]
    out = kernels.adam_(
        gradient.cuda(),
        *moments,
        betas=(0.9, 0.999),
        scale=1.0,
        eps=1e-8,
        norms=norms,
        key=KEY,
    )
    expected = torch.stack((out.cpu(), gradient)).double().square().sum(2)
    assert ((norms.cpu().double() - expected).abs() <= r * 2.0**-24 * expected).all()


@pytest.mark.parametrize("row", first_order_table.ROWS, ids=str)
def test_first_order_follows_its_cpu_run(row: first_order_table.Row) -> None:
    device_cases.follows_its_cpu_run(row, CUDA)


@pytest.mark.parametrize("row", device_cases.CLASSES, ids=str)
def test_fused_backward(row: first_order_table.Row) -> None:
    device_cases.fused_backward_is_the_unfused_step(row, CUDA)


@pytest.mark.parametrize("row", first_order_table.ROWS, ids=str)
def test_resumes_to_the_bit(row: first_order_table.Row) -> None:
    device_cases.resumes_to_the_bit(row, CUDA)


@pytest.mark.parametrize("row", device_cases.CLASSES, ids=str)
def test_moved_after_the_optimizer_was_made(row: first_order_table.Row) -> None:
    device_cases.moved_after_the_optimizer_was_made(row, CUDA)


@pytest.mark.parametrize(("cls", "options"), device_cases.ON_TWO)
def test_two_devices_in_one_optimizer(cls: type, options: dict[str, object]) -> None:
    device_cases.two_devices_in_one_optimizer(cls, options, CUDA)


def test_empty_and_single_tensors() -> None:
    device_cases.empty_and_single_tensors(CUDA)


def test_more_than_2_to_the_31_elements() -> None:
    numel = (1 << 31) + 8
    torch.cuda.empty_cache()
    # theta, its gradient and moments, and room for what poisons uninitialised memory.
    if torch.cuda.mem_get_info()[0] < 6 * 2 * numel:
        pytest.skip("too little memory on this GPU")
    device_cases.long_tensor(CUDA, numel)


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A stream of its own that is busy at first: what is launched elsewhere comes too early."""
    stream, outside = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        yield
    outside.wait_stream(stream)


def test_another_stream() -> None:
    device_cases.another_stream(CUDA, side_stream())


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_cuda_graph_around_a_step(state_dtype: str) -> None:
    """A captured step is not done; replayed once, it is the step that it was captured as."""
    models = []
    for captured in (False, True):
        model = first_order_table.net(torch.bfloat16).cuda()
        optimizer = zoopt.AdamW(model.parameters(), seed=5, state_dtype=state_dtype)
        for param, grad in zip(model.parameters(), device_cases.gradients(0, model), strict=True):
            param.grad = grad.cuda()
        for _ in range(2):
            optimizer.step()
        before = [param.detach().clone() for param in model.parameters()]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
            assert all(map(same_bits, before, model.parameters()))
            graph.replay()
        else:
            optimizer.step()
        torch.cuda.synchronize()
        models.append(model)
    assert same(*models)
