"""Operations on some entries of each tensor: the reference's bits, and those of each tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_kernels_adam import agree
from zoopt.kernels import NoiseKey, available_impls
from zoopt.kernels.batch import Batch
from zoopt.kernels.entries import cpu
from zoopt.kernels.entries.op import adam_entries_, cover_entries_, sum_entries_
from zoopt.kernels.entries.operands import OLDEST, Cover, Entries, Sums, corrections

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = [impl for impl in available_impls() if impl not in ("triton", "reference")]
#: Rows and columns of tensors, and how many of their entries are active: a block and some, a few,
#: none, all.
SIZES = [((60, 41), 1100), ((7, 5), 3), ((3, 5), 0), ((16, 8), 128)]


def keys() -> list[NoiseKey]:
    return [NoiseKey(2**63 + 5, 2**31 + i, 2**33 * (i == 1)) for i in range(len(SIZES))]


def operands(dtype: torch.dtype, *, beside: bool, bad: bool) -> dict[str, list[Tensor]]:
    """Weights, gradients, and the state of entries of several ages; beside a weight, all of the
    tensor is entries."""
    torch.manual_seed(3)
    found: dict[str, list[Tensor]] = {}
    for (m, n), count in SIZES:
        shape = (count,) if beside else (m, n)
        gradient = torch.randn(shape) * 10.0 ** torch.randint(-3, 2, ())
        if bad and gradient.numel() > 10:
            gradient.view(-1)[5], gradient.view(-1)[9] = torch.nan, torch.inf
        made = {
            "theta": torch.randn(shape).to(dtype),
            "gradient": gradient.to(dtype),
            "index": torch.randperm(m * n)[:count].to(torch.int32),
            "base": torch.randn(count).to(dtype),
            "exp_avg": torch.randn(count),
            "exp_avg_sq": torch.rand(count) * 1e-3,
            "age": torch.randint(0, 50, (count,)).to(torch.int16),
            "rows": torch.rand(m),
            "columns": torch.rand(n),
            "total": torch.randn(count).bfloat16(),
            "squares": torch.rand(count).bfloat16(),
        }
        made["age"][:2] = OLDEST
        for name, value in made.items():
            found.setdefault(name, []).append(value)
    return found


def run(
    dtype: torch.dtype, impl: str, *, together: bool, beside: bool = False, draw: int | None = 7
) -> list[Tensor]:
    """Everything that two steps of the operations write, in a batch or tensor by tensor."""
    made, theta = operands(dtype, beside=beside, bad=False), list[Tensor]()
    for step in range(2):
        gradients = operands(dtype, beside=beside, bad=step == 1)["gradient"]
        theta = made["theta"]
        groups = [[*range(len(SIZES))]] if together else [[i] for i in range(len(SIZES))]
        for group in groups:
            own = {name: [values[i] for i in group] for name, values in made.items()}
            read = [gradients[i] for i in group]
            entries = [
                Entries(
                    None if beside else own["index"][i],
                    None if beside else own["base"][i],
                    *(own[name][i] for name in ("exp_avg", "exp_avg_sq", "age")),
                )
                for i in range(len(group))
            ]
            batch = Batch(own["theta"], [keys()[i] for i in group])
            adam_entries_(
                *(batch, read, entries),
                betas=(0.9, 0.99),
                eps=1e-8,
                rate=-0.1,
                decay=0.3,
                rounding_draw=None if draw is None else draw + step,
                impl=impl,
            )
            several = Batch(read, batch.keys, reads=True)
            sums = [
                Sums(None if beside else index, *pair)
                for index, *pair in zip(own["index"], own["total"], own["squares"], strict=True)
            ]
            sum_entries_(several, sums, impl=impl)
            covers = [
                Cover(*each) for each in zip(own["index"], own["rows"], own["columns"], strict=True)
            ]
            cover_entries_(several, covers, picked=beside, impl=impl)
    written = ("exp_avg", "exp_avg_sq", "age", "total", "squares", "rows", "columns")
    return [*theta, *(tensor for name in written for tensor in made[name])]


def same_as_the_reference(impl: str, dtype: torch.dtype, *, together: bool) -> None:
    for options in ({}, {"draw": None}, {"beside": True}):
        case: dict[str, Any] = options
        if "beside" in case and dtype != torch.float32:
            continue  # Deltas are float32.
        expected = run(dtype, "reference", together=False, **case)
        got = run(dtype, impl, together=together, **case)
        assert all(map(agree, got, expected))


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_tensors_one_by_one(dtype: torch.dtype, impl: str) -> None:
    same_as_the_reference(impl, dtype, together=True)
    same_as_the_reference(impl, dtype, together=False)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9994])
def test_the_table_of_corrections_is_the_reference(beta: float) -> None:
    """Of every age, alone or among others: torch's powers and numpy's are rounded alike."""
    table, age = corrections(beta, torch.device("cpu")), torch.arange(OLDEST + 1).double()
    assert torch.equal(table, torch.from_numpy(cpu.corrections(beta)))
    for places in (age, age.flip(0), age[1:], age[::3]):
        expected = (1.0 - beta**places).float()
        assert torch.equal(table[places.long()], expected)


def test_refuses() -> None:
    theta, gradient = torch.zeros(4, 3), torch.ones(4, 3)
    batch = Batch([theta], [NoiseKey(1, 2)])
    index, age = torch.tensor([0, 12], dtype=torch.int32), torch.zeros(2, dtype=torch.int16)
    moments = torch.zeros(2), torch.zeros(2)
    options: dict[str, Any] = {"betas": (0.9, 0.9), "eps": 1e-8, "rate": -1.0}
    good = Entries(index.clamp(max=11), torch.zeros(2), *moments, age)
    for entries, message in (
        (good._replace(positions=index), "positions must be from 0 to 11, got 0 to 12; load"),
        (good._replace(positions=None), "must have both positions and base, or be all of a tensor"),
        (good._replace(age=age.int()), "age must be torch.int16 of 2 elements on cpu, got"),
        (good._replace(exp_avg=torch.zeros(3)), "positions must be torch.int32 of 3 elements"),
        (good._replace(exp_avg=moments[1]), "must not share memory"),
    ):
        with pytest.raises(ValueError, match=message):
            adam_entries_(batch, [gradient], [entries], **options)
    with pytest.raises(ValueError, match="gradient must have theta's 12 elements"):
        adam_entries_(batch, [gradient[0]], [good], **options)
    with pytest.raises(ValueError, match="entries must be one for each of the batch's 1 tensors"):
        adam_entries_(batch, [gradient], [], **options)
    with pytest.raises(ValueError, match="gradient must be of the entries or the matrix"):
        cover_entries_(Batch([gradient], batch.keys), [Cover(index, theta[0], theta[0])])
    assert not theta.any()
