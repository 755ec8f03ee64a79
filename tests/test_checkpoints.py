"""Checkpoints of a release: present code loads them and goes on as the release did."""

from __future__ import annotations

import functools
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_cases import CASES, END, SAVED, digest, model_of, run

_RELEASES = sorted((Path(__file__).parent / "data").glob("release-*.pt.xz"))
every = pytest.mark.parametrize("name", CASES)


@functools.cache
def release(path: Path) -> dict[str, Any]:
    with lzma.open(path) as file:
        records: dict[str, Any] = torch.load(file, weights_only=True)
    return records


@pytest.mark.parametrize("path", _RELEASES, ids=lambda path: path.name.removesuffix(".pt.xz"))
@every
def test_checkpoints_of_a_release_go_on(path: Path, name: str) -> None:
    """To the same bits, but where a library's matrix product is in the step.

    Those are summed in the library's order, which depends on the processor: 12 terms at most, in
    float32, 12 * 6e-8 of |w| < 4 a product. A few of them a step, five steps, and quotients such as
    Adam's that carry a relative error over: 1e-5 leaves room for ten of each. A counter that is
    off by one, or a moment that is lost, moves the weights by some lr = 1e-3 or more.
    """
    case, saved = CASES[name], release(path)[name]
    model = model_of(case)
    with torch.no_grad():
        for param, value in zip(model.parameters(), saved["weights"], strict=True):
            param.copy_(value)
    optimizer = case.build(model)
    optimizer.load_state_dict(saved["optimizer"])
    run(case, model, optimizer, SAVED, END)
    if case.exact:
        assert digest(model) == saved["end"]
        return
    for param, end in zip(model.parameters(), saved["end"], strict=True):
        torch.testing.assert_close(param.detach(), end, rtol=0.0, atol=1e-5)


def test_a_release_is_there() -> None:
    assert [path.name for path in _RELEASES] == ["release-0.1.0.pt.xz"]
