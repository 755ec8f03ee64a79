"""Checkpoints of a release: present code loads them and goes on as the release did."""

from __future__ import annotations

import functools
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from tests.checkpoint_cases import CASES, END, SAVED, digest, model_of, run, wave

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


class Tied(nn.Module):
    """An embedding and an output layer, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 8)
        self.fc = nn.Linear(8, 12)
        self.lm_head = nn.Linear(12, 20, bias=False)


def test_embeddings_that_a_release_projected_are_projected_on() -> None:
    """Release 0.1.0 told no layers by their names. The error says how to go on with its runs.

    The file holds the state after 4 steps, the weights there, and those after 9.
    """
    with lzma.open(Path(__file__).parent / "data" / "embeddings-0.1.0.pt.xz") as file:
        saved = torch.load(file, weights_only=True)
    model = Tied()
    with torch.no_grad():
        for param, value in zip(model.parameters(), saved["weights"], strict=True):
            param.copy_(value)
    named = list(model.named_parameters())
    options: dict[str, Any] = {"lr": 1e-2, "update_proj_gap": 3, "seed": 7}
    optimizer = zoopt.GaLoreAdamW(named, rank=3, **options)
    match = r"\[2, 2\], got \[4\]; release 0.1.0 projected embeddings .* 'rank': 3\}\], \.\.\.\)"
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved["optimizer"])
    optimizer = zoopt.GaLoreAdamW([{"params": named, "rank": 3}], **options)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(SAVED, END):
        for i, param in enumerate(model.parameters()):
            gradient = wave(tuple(param.shape), 100 + step + i).float()
            param.grad = gradient * param.detach()
        optimizer.step()
    # The tolerance is that of the other runs above, whose steps are the same.
    for param, end in zip(model.parameters(), saved["end"], strict=True):
        torch.testing.assert_close(param.detach(), end, rtol=0.0, atol=1e-5)
