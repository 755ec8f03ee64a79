"""The model of many ranks in bench.scaling."""

from __future__ import annotations

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
    # 28 messages of 20 us an exchange, and 2 x 9,999 of them.
    assert last["tree"] == pytest.approx(scaling.EXCHANGES * 28 * 20e-6, rel=1e-2)
    assert last["ring"] == pytest.approx(scaling.EXCHANGES * 2 * 9_999 * 20e-6, rel=1e-2)
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


def test_ratios_are_of_steps_of_one_round() -> None:
    """A machine that becomes twice as slow changes none."""
    first = {"alone": 1.0, "beside": 1.25, "together": 1.5, "exchange": 1e-4}
    found = scaling.summary([first, {name: 2.0 * value for name, value in first.items()}])
    assert found["together / alone"] == found["least together / alone"] == 1.5
    assert found["beside / alone"] == 1.25
    assert found["together / beside"] == 1.2
    assert found["alone"] == 1.5


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_figures_are_measured_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scaling.json"
    small = ["--ranks", "2", "--rounds", "2", "--steps", "2", "--width", "16", "--batch", "2"]
    figures = scaling.main([*small, "--output", str(output)])
    [row] = figures["measured"]
    assert row["ranks"] == 2
    assert all(value > 0 for value in row.values())
    assert "together / alone" in capsys.readouterr().out
    assert output.exists()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
