"""The model of many ranks in bench.scaling."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pytest
import torch.distributed as dist

from bench import scaling
from zoopt.distributed.exchange import Exchange


def test_more_ranks_cost_more_and_trees_beat_rings() -> None:
    rows = scaling.modelled(0.1)
    assert [row["ranks"] for row in rows] == list(scaling.MODELLED)
    for before, after in itertools.pairwise(rows):
        for part in ("tree", "ring", "straggler"):
            assert after[part] > before[part]
        assert after["efficiency"] < before["efficiency"]
    last = rows[-1]
    # 28 messages of 20 us, and 2 x 9,999 of them.
    assert last["tree"] == pytest.approx(28 * 20e-6, rel=1e-2)
    assert last["ring"] == pytest.approx(2 * 9_999 * 20e-6, rel=1e-2)
    assert last["efficiency"] > 0.8


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_the_payload_is_that_of_an_exchange() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exchange = Exchange(dist.group.WORLD, "data")
        vector = exchange._vector([0.0] * (6 + 2), exchange.data)
        assert vector.nbytes == scaling.PAYLOAD
    finally:
        dist.destroy_process_group()


def test_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"ranks": 1, "bytes": 0, "step": 1.0, "exchange": 1e-4}]

    def measured(options: argparse.Namespace) -> list[dict[str, float]]:
        return rows

    monkeypatch.setattr(scaling, "measured", measured)
    output = tmp_path / "scaling.json"
    figures = scaling.main(["--output", str(output)])
    assert figures["measured"] == rows
    assert output.exists()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
